// Attention, straight from pages
#pragma once

#include "tiles.hpp"

namespace {

constexpr int KEYS = 64;    // a block: every row's sum over keys is cut at multiples of it
constexpr int MOST = 128;   // queries of an item
constexpr int COLUMNS = KEYS / W;
constexpr int HIGH = 16;    // queries at a time in matrix tiles
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int QUERIES = 4, STRIP = 4;  // at a time, and columns: their sums stay in 32 registers
#else
constexpr int QUERIES = 6, STRIP = 2;  // in 16
#endif

template <class T>
constexpr bool PAIRS = false;  // whether there are matrix tiles for it
#if defined(__AMX_BF16__)
template <>
constexpr bool PAIRS<bf16> = true;
#endif

// A block of one segment's queries over some key-value heads.
struct Glance {
    int64_t first_row, num_rows, first_position, table, first_head, num_heads;
};

struct Geometry {
    int64_t q_stride, y_stride, page_stride, head_stride, value_offset;
    int64_t page_tokens, head_size, groups, window;  // window 0: none
};

// What a thread needs for an item: queries and what they have seen so far, and a block of keys and values.
struct Scratch {
    explicit Scratch(int64_t d)
        : q(array<float>(MOST * d)), o(array<float>(MOST * d)), k(array<float>(KEYS * d)), v(array<float>(KEYS * d)),
          total(array<float>(MOST * W)), peak(array<float>(MOST)), at(array<int64_t>(MOST)) {}
    Array<float> q, o, k, v, total, peak;
    Array<int64_t> at;
};

#if defined(__AVX512F__)
// 16 vectors of 16 floats, rows to columns.
inline void transpose(Vec* r) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = (__m512)r[i];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = (Vec)_mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        r[i + 8] = (Vec)_mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        r[i + 4] = (Vec)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        r[i + 12] = (Vec)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
}
#elif defined(__AVX2__)
// 8 vectors of 8 floats.
inline void transpose(Vec* r) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = (Vec)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = (Vec)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
inline void transpose(Vec* r) {
    for (int i = 0; i < W; ++i) {
        for (int j = i + 1; j < W; ++j) {
            const float held = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = held;
        }
    }
}
#endif

// Keys of a block as columns, (D, KEYS), and values as rows, (KEYS, D), both float32. Columns past `num` are zero.
template <class T>
void gather(const T* pool, const int64_t* table, const Geometry& g, int64_t first, int num, float* k, float* v) {
    const int64_t d = g.head_size;
    for (int base = 0; base < KEYS; base += W) {
        const T* rows[W];
        const int here = std::clamp(num - base, 0, W);
        for (int i = 0; i < here; ++i) {
            const int64_t position = first + base + i;
            rows[i] = pool + table[position / g.page_tokens] * g.page_stride + position % g.page_tokens * d;
        }
        for (int64_t j = 0; j < d; j += W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) block[i] = i < here ? load(rows[i] + j) : Vec{};
            transpose(block);
            for (int i = 0; i < W; ++i) store(k + (j + i) * KEYS + base, block[i]);
        }
        for (int i = 0; i < here; ++i) {
            const T* value = rows[i] + g.value_offset;
            for (int64_t j = 0; j < d; j += W) store(v + (base + i) * d + j, load(value + j));
        }
    }
}

// From a query's scores of a block to the keys' weights, by the highest score so far; returns by how much what was seen
// before has to shrink.
template <class T>
inline float weigh(const Scratch& s, const Geometry& g, int query, int64_t first, Vec* score, T* weight) {
    const int64_t last = s.at[query] - first;  // of the keys that it may see, counted from this block's first
    const int64_t oldest = g.window ? last - g.window + 1 : 0;
    if (last < KEYS - 1 || oldest > 0) {
        const int32_t high = static_cast<int32_t>(std::clamp<int64_t>(last, -1, KEYS));
        const int32_t low = static_cast<int32_t>(std::clamp<int64_t>(oldest, 0, KEYS));
        for (int c = 0; c < COLUMNS; ++c) {
            const Int key = LANES + c * W;
            score[c] = (key <= high) & (key >= low) ? score[c] : all(-INFINITY);
        }
    }
    Vec best = score[0];
    for (int c = 1; c < COLUMNS; ++c) best = larger(best, score[c]);
    const float before = s.peak[query];
    const float peak = std::max(before, highest(best));
    const float shrink = peak == before ? 1.0f : exponential(all(before - peak))[0];
    Vec total = load(s.total.get() + query * W) * all(shrink);
    for (int c = 0; c < COLUMNS; ++c) {
        const Vec e = exponential(score[c] - all(peak));
        store(weight + c * W, e);
        total += e;
    }
    store(s.total.get() + query * W, total);
    s.peak[query] = peak;
    return shrink;
}

// N queries against one block of keys: the running peak, total and mixture of each go on. As many columns at a time as
// leave all their sums in registers.
template <int N>
void look(const Scratch& s, const Geometry& g, int query, int64_t first, int num) {
    const int64_t d = g.head_size;
    const float* q = s.q.get() + query * d;
    Vec score[N][COLUMNS];
    for (int from = 0; from < COLUMNS; from += STRIP) {
        Vec sums[N][STRIP] = {};
        for (int64_t j = 0; j < d; ++j) {
            Vec key[STRIP];
#pragma GCC unroll 4
            for (int c = 0; c < STRIP; ++c) key[c] = load(s.k.get() + j * KEYS + (from + c) * W);
#pragma GCC unroll 6
            for (int i = 0; i < N; ++i) {
                const Vec x = all(q[i * d + j]);
#pragma GCC unroll 4
                for (int c = 0; c < STRIP; ++c) sums[i][c] += x * key[c];
            }
        }
        for (int i = 0; i < N; ++i) {
            for (int c = 0; c < STRIP; ++c) score[i][from + c] = sums[i][c];
        }
    }
    alignas(64) float weight[N][KEYS];
    float shrink[N];
    for (int i = 0; i < N; ++i) shrink[i] = weigh(s, g, query + i, first, score[i], weight[i]);
    for (int64_t j = 0; j < d; j += STRIP * W) {
        const int wide = static_cast<int>(std::min<int64_t>(STRIP, (d - j) / W));
        float* const o = s.o.get() + query * d + j;
        const float* const v = s.v.get() + j;
        if (wide == STRIP) {
            Vec mixed[N][STRIP];
            for (int i = 0; i < N; ++i) {
                for (int c = 0; c < STRIP; ++c) mixed[i][c] = load(o + i * d + c * W) * all(shrink[i]);
            }
            for (int t = 0; t < num; ++t) {
                Vec value[STRIP];
#pragma GCC unroll 4
                for (int c = 0; c < STRIP; ++c) value[c] = load(v + t * d + c * W);
#pragma GCC unroll 6
                for (int i = 0; i < N; ++i) {
                    const Vec x = all(weight[i][t]);
#pragma GCC unroll 4
                    for (int c = 0; c < STRIP; ++c) mixed[i][c] += x * value[c];
                }
            }
            for (int i = 0; i < N; ++i) {
                for (int c = 0; c < STRIP; ++c) store(o + i * d + c * W, mixed[i][c]);
            }
            continue;
        }
        for (int c = 0; c < wide; ++c) {
            Vec mixed[N];
            for (int i = 0; i < N; ++i) mixed[i] = load(o + i * d + c * W) * all(shrink[i]);
            for (int t = 0; t < num; ++t) {
                for (int i = 0; i < N; ++i) mixed[i] += all(weight[i][t]) * load(v + t * d + c * W);
            }
            for (int i = 0; i < N; ++i) store(o + i * d + c * W, mixed[i]);
        }
    }
}

typedef void (*Look)(const Scratch&, const Geometry&, int, int64_t, int);

template <int... I>
Look looking(int num, std::integer_sequence<int, I...>) {
    static constexpr Look each[] = {look<I + 1>...};
    return each[num - 1];
}

#if defined(__AMX_BF16__)
// The same with matrix tiles, for bfloat16. Keys as pairs of dimensions, (D / 2, KEYS, 2), values as pairs of positions,
// (KEYS / 2, D, 2); what is past `num` is zero.
void gather_pairs(const bf16* pool, const int64_t* table, const Geometry& g, int64_t first, int num, uint32_t* k,
                  uint32_t* v) {
    const int64_t d = g.head_size;
    const bf16* rows[KEYS];
    for (int i = 0; i < num; ++i) {
        const int64_t position = first + i;
        rows[i] = pool + table[position / g.page_tokens] * g.page_stride + position % g.page_tokens * d;
    }
    for (int base = 0; base < KEYS; base += W) {
        for (int64_t j = 0; j < d / 2; j += W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) {
                block[i] = base + i < num ? load(reinterpret_cast<const float*>(rows[base + i]) + j) : Vec{};
            }
            transpose(block);
            for (int i = 0; i < W; ++i) store(reinterpret_cast<float*>(k) + (j + i) * KEYS + base, block[i]);
        }
    }
    for (int i = 0; i < KEYS; i += 2) {
        for (int64_t j = 0; j < d; j += W) {
            Half even = {}, odd = {};
            if (i < num) std::memcpy(&even, rows[i] + g.value_offset + j, sizeof even);
            if (i + 1 < num) std::memcpy(&odd, rows[i + 1] + g.value_offset + j, sizeof odd);
            const Bits pair = __builtin_convertvector(even, Bits) | __builtin_convertvector(odd, Bits) << 16;
            std::memcpy(v + i / 2 * d + j, &pair, sizeof pair);
        }
    }
}

void look_pairs(const Scratch& s, const Geometry& g, int query, int num_queries, int64_t first) {
    const int64_t d = g.head_size;
    const bf16* q = reinterpret_cast<const bf16*>(s.q.get()) + query * d;
    const uint32_t *k = reinterpret_cast<uint32_t*>(s.k.get()), *v = reinterpret_cast<uint32_t*>(s.v.get());
    alignas(64) float scores[HIGH][KEYS];
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
    _tile_stored(0, &scores[0][0], KEYS * 4);
    _tile_stored(1, &scores[0][16], KEYS * 4);
    _tile_stored(2, &scores[0][32], KEYS * 4);
    _tile_stored(3, &scores[0][48], KEYS * 4);
    for (int i = 0; i < num_queries; ++i) {
        Vec score[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) score[c] = load(&scores[i][c * W]);
        const float shrink = weigh(s, g, query + i, first, score, &weight[i][0]);
        if (shrink == 1.0f) continue;
        float* o = s.o.get() + (query + i) * d;
        for (int64_t j = 0; j < d; j += W) store(o + j, load(o + j) * all(shrink));
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
    const int64_t d = g.head_size;
    const int num = static_cast<int>(num_rows * g.groups);
    const int padded = PAIRS<T> ? (num + HIGH - 1) / HIGH * HIGH : num;
    for (int i = 0; i < padded; ++i) {
        const int64_t r = std::min<int64_t>(i / g.groups, num_rows - 1);  // padding repeats the last row, unread
        const T* from = q + (row + r) * g.q_stride + (head * g.groups + i % g.groups) * d;
        for (int64_t j = 0; j < d; j += W) store(s.o.get() + i * d + j, Vec{});
        if (PAIRS<T>) {
            std::memcpy(reinterpret_cast<T*>(s.q.get()) + i * d, from, d * sizeof(T));
        } else {
            for (int64_t j = 0; j < d; j += W) store(s.q.get() + i * d + j, load(from + j));
        }
        store(s.total.get() + i * W, Vec{});
        s.peak[i] = -1e30f;
        s.at[i] = position + r;
    }
    const int64_t end = position + num_rows;
    const int64_t oldest = g.window ? std::max<int64_t>(0, position - g.window + 1) : 0;
    for (int64_t first = oldest / KEYS * KEYS; first < end; first += KEYS) {
        const int here = static_cast<int>(std::min<int64_t>(KEYS, end - first));
        const T* pages = pool + head * g.head_stride;
#if defined(__AMX_BF16__)
        if constexpr (PAIRS<T>) {
            gather_pairs(pages, table, g, first, here, reinterpret_cast<uint32_t*>(s.k.get()),
                         reinterpret_cast<uint32_t*>(s.v.get()));
            for (int i = 0; i < padded; i += HIGH) {
                if (s.at[i + HIGH - 1] >= first) look_pairs(s, g, i, std::min(HIGH, num - i), first);
            }
            continue;
        }
#endif
        gather(pages, table, g, first, here, s.k.get(), s.v.get());
        const int blocks = (num + QUERIES - 1) / QUERIES;  // all about equally high
        for (int block = 0; block < blocks; ++block) {
            const int query = num * block / blocks, after = num * (block + 1) / blocks;
            if (s.at[after - 1] < first) continue;
            looking(after - query, std::make_integer_sequence<int, QUERIES>())(s, g, query, first, here);
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
