// Attention, straight from pages
#pragma once

#include "pages.hpp"
#include "tiles.hpp"

namespace {

constexpr int MOST = 256;   // queries of an item
constexpr int COLUMNS = KEYS / W;
constexpr int HIGH = 16;    // queries at a time in matrix tiles
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int QUERIES = 6, STRIP = 4;  // at a time, and columns: their sums stay in 32 registers
#else
constexpr int QUERIES = 6, STRIP = 2;  // in 16
#endif

template <class T>
constexpr bool IN_TILES = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool IN_TILES<bf16> = true;
#endif

// A block of one segment's queries over some key-value heads.
struct Glance {
    int64_t first_row, num_rows, first_position, table, first_head, num_heads;
};

// What a thread needs for an item: queries and what they have seen so far, and a block of keys and values; queries, keys
// and values in words of as many as are multiplied at once.
struct Scratch {
    explicit Scratch(int64_t d)
        : q(array<uint32_t>(MOST * d)), k(array<uint32_t>(KEYS * d)), v(array<uint32_t>(KEYS * d)),
          o(array<float>(MOST * d)), total(array<float>(MOST * W)), peak(array<float>(MOST)), at(array<int64_t>(MOST)) {}
    Array<uint32_t> q, k, v;  // words
    Array<float> o, total, peak;
    Array<int64_t> at;
};

// Scores of keys that a query may not see are taken out.
inline void hide(const Scratch& s, const Geometry& g, int query, int64_t first, Vec* score) {
    const int64_t last = s.at[query] - first;  // of the keys that it may see, counted from this block's first
    const int64_t oldest = g.window ? last - g.window + 1 : 0;
    if (last >= KEYS - 1 && oldest <= 0) return;
    const int32_t high = static_cast<int32_t>(std::clamp<int64_t>(last, -1, KEYS));
    const int32_t low = static_cast<int32_t>(std::clamp<int64_t>(oldest, 0, KEYS));
    for (int c = 0; c < COLUMNS; ++c) {
        const Int key = LANES + c * W;
        score[c] = (key <= high) & (key >= low) ? score[c] : all(-INFINITY);
    }
}

// From some queries' scores of a block to the keys' weights, by the highest score so far of each, and by how much what
// it had seen before has to shrink; returns whether any has to. Query by query the sums of one would wait for the peak
// of the other: first all peaks, of which few grow, then all weights.
template <class T, int NEXT>
inline bool weigh(const Scratch& s, const Geometry& g, int query, int num, int64_t first, Vec (*score)[COLUMNS],
                  T (*weight)[NEXT], float* shrink) {
    bool any = false;
    for (int i = 0; i < num; ++i) {
        hide(s, g, query + i, first, score[i]);
        Vec best = score[i][0];
        for (int c = 1; c < COLUMNS; ++c) best = larger(best, score[i][c]);
        const float before = s.peak[query + i];
        shrink[i] = 1.0f;
        if (exceeds(best, all(before))) {
            s.peak[query + i] = highest(best);
            shrink[i] = exponential(all(before - s.peak[query + i]))[0];
            any = true;
        }
    }
    for (int i = 0; i < num; ++i) {
        const Vec peak = all(s.peak[query + i]);
        Vec total = load(s.total.get() + (query + i) * W) * all(shrink[i]);
        for (int c = 0; c < COLUMNS; ++c) {
            const Vec e = exponential_for<T>(score[i][c] - peak);
            store(weight[i] + c * W, e);
            total += e;
        }
        store(s.total.get() + (query + i) * W, total);
    }
    return any;
}

// Keys and values of the next block, to be fetched to the second cache a few at a time while others are multiplied: no
// processor foresees which page comes next, and all at once they would hold up what is multiplied.
template <class T>
struct Ahead {
    const T* const* rows;
    int64_t num, offset, size;  // of each row so many numbers, so far from where it begins
    // inline, or the compiler takes it for a function without effect and leaves calls of it out
    __attribute__((always_inline)) void fetch(int64_t step, int64_t depth) const {
        const int64_t each = num <= depth ? 1 : tiles(num, depth), end = std::min(num, (step + 1) * each);
        for (int64_t i = step * each; i < end; ++i) {
            for (int64_t j = 0; j < size; j += 64 / sizeof(T)) __builtin_prefetch(rows[i] + offset + j, 0, 2);
        }
    }
};

// Some columns' sums under N rows go on: words of `a`, each times a row of words of `b`.
template <class T, int N, int WIDE>
inline void mix(const Word* a, int64_t a_next, const Word* b, int64_t b_next, int64_t depth, const Ahead<T>& ahead,
                Vec (*sums)[WIDE]) {
    typedef InVectors<Factor<T>> In;
    Vec s[N][WIDE];  // the compiler keeps these in registers
    std::memcpy(s, sums, sizeof s);
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        typename In::Factor x[N];
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) x[i] = In::spread(a[i * a_next + k]);
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; ++c) {
            typename In::Factor column;
            std::memcpy(&column, b + k * b_next + c * W, sizeof column);
#pragma GCC unroll 6
            for (int i = 0; i < N; ++i) s[i][c] = In::add(s[i][c], x[i], column);
        }
    };
    int64_t k = 0;
    for (; k < std::min(depth, ahead.num); ++k) {
        ahead.fetch(k, depth);
        step(k);
    }
    for (; k < depth; ++k) step(k);
    std::memcpy(sums, s, sizeof s);
}

// WIDE vectors of what N queries have seen, from dimension j on: it shrinks, and this block's values are added.
template <class T, int N, int WIDE>
inline void add_values(const Scratch& s, int64_t d, int query, int64_t j, int64_t depth, const Word (*weight)[KEYS],
                       const float* shrink, const Ahead<T>& ahead) {
    float* const o = s.o.get() + query * d + j;
    Vec mixed[N][WIDE];
    for (int i = 0; i < N; ++i) {
        for (int c = 0; c < WIDE; ++c) mixed[i][c] = load(o + i * d + c * W);
    }
    if (shrink) {
        for (int i = 0; i < N; ++i) {
            for (int c = 0; c < WIDE; ++c) mixed[i][c] *= all(shrink[i]);
        }
    }
    mix<T, N, WIDE>(weight[0], KEYS, s.v.get() + j, d, depth, ahead, mixed);
    for (int i = 0; i < N; ++i) {
        for (int c = 0; c < WIDE; ++c) store(o + i * d + c * W, mixed[i][c]);
    }
}

// N queries against one block of keys: the running peak, total and mixture of each go on. As many columns at a time as
// leave all their sums in registers.
template <class T, int N>
void look(const Scratch& s, const Geometry& g, int query, int64_t first, int num, const Ahead<T>* ahead) {
    typedef Factor<T> E;
    constexpr int64_t DEEP = InVectors<E>::DEEP;
    const int64_t d = g.head_size, words = d / DEEP;
    Vec score[N][COLUMNS];
    for (int from = 0; from < COLUMNS; from += STRIP) {
        Vec sums[N][STRIP];
        for (auto& each : sums) std::fill_n(each, STRIP, Vec{});
        mix<T, N, STRIP>(s.q.get() + query * words, words, s.k.get() + from * W, KEYS, words,
                         from == 0 ? ahead[0] : Ahead<T>{}, sums);
        for (int i = 0; i < N; ++i) std::memcpy(&score[i][from], sums[i], sizeof sums[i]);
    }
    alignas(64) Word weight[N][KEYS];
    float each[N];
    typedef E Weights[KEYS * sizeof(Word) / sizeof(E)];
    const bool shrinks = weigh(s, g, query, N, first, score, reinterpret_cast<Weights*>(weight), each);
    const float* shrink = shrinks ? each : nullptr;
    const int64_t depth = tiles(num, DEEP);
    int64_t j = 0;
    for (; j + STRIP * W <= d; j += STRIP * W) {
        add_values<T, N, STRIP>(s, d, query, j, depth, weight, shrink, j == 0 ? ahead[1] : Ahead<T>{});
    }
    for (; j < d; j += W) add_values<T, N, 1>(s, d, query, j, depth, weight, shrink, j == 0 ? ahead[1] : Ahead<T>{});
}

template <class T>
using Look = void (*)(const Scratch&, const Geometry&, int, int64_t, int, const Ahead<T>*);

template <class T, int... I>
Look<T> looking(int num, std::integer_sequence<int, I...>) {
    static constexpr Look<T> each[] = {look<T, I + 1>...};
    return each[num - 1];
}

#if defined(__AMX_BF16__)
// The same in matrix tiles.
void look_in_tiles(const Scratch& s, const Geometry& g, int query, int num_queries, int64_t first) {
    const int64_t d = g.head_size;
    const bf16* q = reinterpret_cast<const bf16*>(s.q.get()) + query * d;
    const Word *k = s.k.get(), *v = s.v.get();
    Vec scores[HIGH][COLUMNS];
    alignas(64) bf16 weight[HIGH][KEYS] = {};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t j = 0; j < d / 2; j += 16) {
        _tile_loadd(4, q + 2 * j, d * 2);
        _tile_loadd(5, k + j * KEYS, KEYS * 4);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, k + j * KEYS + 16, KEYS * 4);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(5, k + j * KEYS + 32, KEYS * 4);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, k + j * KEYS + 48, KEYS * 4);
        _tile_dpbf16ps(3, 4, 6);
    }
    float* const each = reinterpret_cast<float*>(scores);
    _tile_stored(0, each, KEYS * 4);
    _tile_stored(1, each + 16, KEYS * 4);
    _tile_stored(2, each + 32, KEYS * 4);
    _tile_stored(3, each + 48, KEYS * 4);
    float shrink[HIGH];
    if (weigh(s, g, query, num_queries, first, scores, weight, shrink)) {
        for (int i = 0; i < num_queries; ++i) {
            if (shrink[i] == 1.0f) continue;
            float* o = s.o.get() + (query + i) * d;
            for (int64_t j = 0; j < d; j += W) store(o + j, load(o + j) * all(shrink[i]));
        }
    }
    float* o = s.o.get() + query * d;
    for (int64_t j = 0; j < d; j += 32) {
        _tile_loadd(0, o + j, d * 4);
        _tile_loadd(1, o + j + 16, d * 4);
        for (int t = 0; t < KEYS / 2; t += 16) {
            _tile_loadd(4, &weight[0][2 * t], KEYS * 2);
            _tile_loadd(5, v + t * d + j, d * 4);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, v + t * d + j + 16, d * 4);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, o + j, d * 4);
        _tile_stored(1, o + j + 16, d * 4);
    }
}
#endif

// Some rows of a glance under one key-value head.
template <class T>
void item(const T* q, T* y, const T* pool, const int64_t* table, const Geometry& g, const Scratch& s, int64_t row,
          int64_t num_rows, int64_t position, int64_t head) {
    typedef Factor<T> E;
    const int64_t d = g.head_size;
    const int num = static_cast<int>(num_rows * g.groups);
    const int padded = IN_TILES<T> ? (num + HIGH - 1) / HIGH * HIGH : num;
    for (int i = 0; i < padded; ++i) {
        const int64_t r = std::min<int64_t>(i / g.groups, num_rows - 1);  // padding repeats the last row, unread
        const T* from = q + (row + r) * g.q_stride + (head * g.groups + i % g.groups) * d;
        E* to = reinterpret_cast<E*>(s.q.get()) + i * d;
        if constexpr (std::is_same_v<E, T>) {
            std::memcpy(to, from, d * sizeof *to);
        } else {
            for (int64_t j = 0; j < d; j += W) store(to + j, load(from + j));
        }
        for (int64_t j = 0; j < d; j += W) store(s.o.get() + i * d + j, Vec{});
        store(s.total.get() + i * W, Vec{});
        s.peak[i] = -1e30f;
        s.at[i] = position + r;
    }
    const int64_t end = position + num_rows;
    const int64_t oldest = g.window ? std::max<int64_t>(0, position - g.window + 1) : 0;
    const T *here[KEYS], *next[KEYS];
    const auto seek = [&](int64_t first) {  // the keys of the block that begins there
        const int num_keys = static_cast<int>(std::clamp<int64_t>(end - first, 0, KEYS));
        find(pool + head * g.head_stride, table, g, first, num_keys, next);
        return num_keys;
    };
    int num_next = seek(oldest / KEYS * KEYS);
    for (int64_t first = oldest / KEYS * KEYS; first < end; first += KEYS) {
        const int num_keys = num_next;
        std::copy_n(next, num_keys, here);
        num_next = seek(first + KEYS);
        gather(here, g, num_keys, reinterpret_cast<E*>(s.k.get()), reinterpret_cast<E*>(s.v.get()));
#if defined(__AMX_BF16__)
        if constexpr (IN_TILES<T>) {
            for (int i = 0; i < padded; i += HIGH) {
                if (s.at[i + HIGH - 1] >= first) look_in_tiles(s, g, i, std::min(HIGH, num - i), first);
            }
            continue;
        }
#endif
        const int blocks = (num + QUERIES - 1) / QUERIES;  // all about equally high
        for (int block = 0; block < blocks; ++block) {
            const int query = num * block / blocks, after = num * (block + 1) / blocks;
            const int64_t last = s.at[after - 1] - first;
            if (last < 0) continue;
            const int from = num_next * block / blocks, share = num_next * (block + 1) / blocks - from;
            const Ahead<T> ahead[] = {{next + from, share, 0, d}, {next + from, share, g.value_offset, d}};
            looking<T>(after - query, std::make_integer_sequence<int, QUERIES>())(
                s, g, query, first, static_cast<int>(std::min<int64_t>(num_keys, last + 1)), ahead);
        }
    }
    for (int i = 0; i < num; ++i) {
        const Vec share = all(1.0f / sum(load(s.total.get() + i * W)));
        T* to = y + (row + i / g.groups) * g.y_stride + (head * g.groups + i % g.groups) * d;
        for (int64_t j = 0; j < d; j += W) store(to + j, load(s.o.get() + i * d + j) * share);
    }
}

template <class T>
void attend(const T* q, T* y, const T* pool, const int64_t* tables, const Geometry& g, const Glance* glances,
            int64_t num_glances, int num_threads) {
    int64_t rows_at_once = std::max<int64_t>(1, MOST / g.groups), num_items = 0;
    for (;; rows_at_once /= 2) {  // fewer, if else a thread would have nothing to do
        num_items = 0;
        for (int64_t i = 0; i < num_glances; ++i) {
            num_items += (glances[i].num_rows + rows_at_once - 1) / rows_at_once * glances[i].num_heads;
        }
        if (num_items >= 3 * num_threads || rows_at_once <= 8) break;
    }
#pragma omp parallel num_threads(num_threads) if (num_items > 1)
    {
        const Scratch scratch(g.head_size);
#if defined(__AMX_BF16__)
        const Tiles tiles;
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = num_items - 1; n >= 0; --n) {  // the latest rows see the most keys: they go first
            int64_t left = n;
            for (int64_t i = 0; i < num_glances; ++i) {
                const Glance& a = glances[i];
                const int64_t blocks = (a.num_rows + rows_at_once - 1) / rows_at_once;
                if (left >= blocks * a.num_heads) {
                    left -= blocks * a.num_heads;
                    continue;
                }
                const int64_t row = left / a.num_heads * rows_at_once;
                item(q, y, pool, tables + a.table, g, scratch, a.first_row + row,
                     std::min(rows_at_once, a.num_rows - row), a.first_position + row,
                     a.first_head + left % a.num_heads);
                break;
            }
        }
    }
}

}  // namespace
