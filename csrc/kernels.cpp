// The small operators of a decoder on a CPU, over raw pointers and with a plain C interface: nothing here knows torch.
//
// One source for every machine. It is written in vectors of W floats that the compiler maps to what there is, and is
// built once for each kind of processor; stages/native.py takes the best that this one can run.
//
// What each row gets depends on that row alone: every sum runs in an order that is fixed by the row's own position. So
// a row has the same bits in whatever batch, block or chunk it is computed, and on however many threads.
//
// Letters: N rows, H query heads, K key-value heads, G = H / K, D head size, S slots of a page, T positions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

constexpr int64_t ALONE = 1 << 15;  // elements: fewer take one thread no longer than to wait for another

#if defined(__AVX512F__)
constexpr Int LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr Int LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Int LANES = {0, 1, 2, 3};
#endif

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const bf16* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// To the nearest, ties to even; what is no number stays none.
#if defined(__AVX512BF16__)
inline void store(bf16* p, Vec v) {  // what is too small for a normal number becomes zero
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
}
#else
inline void store(bf16* p, Vec v) {
    const Bits u = (Bits)v;
    const Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const Bits chosen = v == v ? rounded : Bits{} + 0x7fc0;
    const Half h = __builtin_convertvector(chosen, Half);
    std::memcpy(p, &h, sizeof h);
}
#endif

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Half of a vector's lanes with the other half, again and again: sums and peaks in an order of their own.
#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }

inline float highest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(Vec v) {
    for (int width = W / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    }
    return v[0];
}

inline float highest(Vec v) {
    float best = v[0];
    for (int i = 1; i < W; ++i) best = std::max(best, v[i]);
    return best;
}
#endif

// e to the x, to within two units in the last place; 0 below -87, where float32 ends. What is no number stays none: a
// comparison with it is false, and its place is second.
inline Vec exponential(Vec x) {
    const Vec capped = smaller(all(88.0f), larger(all(-87.0f), x));
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vec shifted = capped * all(1.44269504089f) + magic;
    const Vec n = shifted - magic;
    Vec r = capped - n * all(0.693359375f);
    r = r - n * all(-2.12194440e-4f);
    Vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    const Int power = ((Int)shifted - (Int)magic + 127) << 23;
    return x < all(-87.0f) ? Vec{} : p * (Vec)power;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention, straight from pages

constexpr int KEYS = 64;    // a block: every row's sum over keys is cut at multiples of it
constexpr int QUERIES = 4;  // at a time in registers
constexpr int MOST = 128;   // queries of an item
constexpr int COLUMNS = KEYS / W;
constexpr int HIGH = 16;    // queries at a time in matrix tiles

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

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class E>
using Array = std::unique_ptr<E[], Free>;

template <class E>
Array<E> array(int64_t n) {
    return Array<E>(static_cast<E*>(std::aligned_alloc(64, (n * sizeof(E) + 63) / 64 * 64)));
}

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

// A few queries against one block of keys: the running peak, total and mixture of each go on.
void look(const Scratch& s, const Geometry& g, int query, int64_t first, int num) {
    const int64_t d = g.head_size;
    const float* q = s.q.get() + query * d;
    Vec score[QUERIES][COLUMNS] = {};
    for (int64_t j = 0; j < d; ++j) {
        Vec key[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) key[c] = load(s.k.get() + j * KEYS + c * W);
        for (int i = 0; i < QUERIES; ++i) {
            const Vec x = all(q[i * d + j]);
            for (int c = 0; c < COLUMNS; ++c) score[i][c] += x * key[c];
        }
    }
    alignas(64) float weight[QUERIES][KEYS];
    float shrink[QUERIES];
    for (int i = 0; i < QUERIES; ++i) shrink[i] = weigh(s, g, query + i, first, score[i], weight[i]);
    constexpr int WIDE = 4;  // vectors of a row of values at a time
    for (int64_t j = 0; j < d; j += WIDE * W) {
        const int wide = static_cast<int>(std::min<int64_t>(WIDE, (d - j) / W));
        Vec mixed[QUERIES][WIDE] = {};
        for (int i = 0; i < QUERIES; ++i) {
            for (int c = 0; c < wide; ++c) mixed[i][c] = load(s.o.get() + (query + i) * d + j + c * W) * all(shrink[i]);
        }
        if (wide == WIDE) {
            for (int t = 0; t < num; ++t) {
                Vec value[WIDE];
                for (int c = 0; c < WIDE; ++c) value[c] = load(s.v.get() + t * d + j + c * W);
                for (int i = 0; i < QUERIES; ++i) {
                    const Vec x = all(weight[i][t]);
                    for (int c = 0; c < WIDE; ++c) mixed[i][c] += x * value[c];
                }
            }
        } else {
            for (int t = 0; t < num; ++t) {
                for (int c = 0; c < wide; ++c) {
                    const Vec value = load(s.v.get() + t * d + j + c * W);
                    for (int i = 0; i < QUERIES; ++i) mixed[i][c] += all(weight[i][t]) * value;
                }
            }
        }
        for (int i = 0; i < QUERIES; ++i) {
            for (int c = 0; c < wide; ++c) store(s.o.get() + (query + i) * d + j + c * W, mixed[i][c]);
        }
    }
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

// Eight tiles of sixteen rows of 64 bytes, for the thread that has it.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};
#endif

// Some rows of a glance under one key-value head.
template <class T>
void item(const T* q, T* y, const T* pool, const int64_t* table, const Geometry& g, const Scratch& s, int64_t row,
          int64_t num_rows, int64_t position, int64_t head) {
    const int64_t d = g.head_size;
    const int num = static_cast<int>(num_rows * g.groups);
    const int at_once = PAIRS<T> ? HIGH : QUERIES;
    const int padded = (num + at_once - 1) / at_once * at_once;
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
        for (int i = 0; i < padded; i += QUERIES) {
            if (s.at[i + QUERIES - 1] >= first) look(s, g, i, first, here);
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

// ---------------------------------------------------------------------------------------------------------------------
// Rotary embedding, and the way of keys and values to their pages

struct Heads {
    int64_t row_stride, num_heads, num_kv_heads, head_size;
    int64_t page_stride, head_stride, value_offset;
};

// Rotated and scaled, as separate products and sums: the same bits as operator by operator.
template <class T>
__attribute__((optimize("fp-contract=off"))) void rotate(const T* from, T* to, const float* cosine, const float* sine,
                                                         int64_t half, float scale) {
    for (int64_t j = 0; j < half; j += W) {
        const Vec a = load(from + j), b = load(from + half + j), c = load(cosine + j), s = load(sine + j);
        const Vec ac = a * c, bs = b * s, bc = b * c, as = a * s;
        store(to + j, (ac - bs) * all(scale));
        store(to + half + j, (bc + as) * all(scale));
    }
}

template <class T>
void place(T* qkv, int64_t num_rows, const int64_t* positions, const float* rope, const int64_t* pages,
           const int64_t* slots, T* pool, const Heads& h, float scale, int num_threads) {
    const int64_t d = h.head_size, half = d / 2;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * h.row_stride > ALONE)
    for (int64_t n = 0; n < num_rows; ++n) {
        T* q = qkv + n * h.row_stride;
        T* k = q + h.num_heads * d;
        T* v = k + h.num_kv_heads * d;
        const float* cosine = rope + positions[n] * d;
        for (int64_t i = 0; i < h.num_heads; ++i) rotate(q + i * d, q + i * d, cosine, cosine + half, half, scale);
        T* slot = pool + pages[n] * h.page_stride + slots[n] * d;
        for (int64_t i = 0; i < h.num_kv_heads; ++i) {
            rotate(k + i * d, slot + i * h.head_stride, cosine, cosine + half, half, 1.0f);
            std::memcpy(slot + h.value_offset + i * h.head_stride, v + i * d, d * sizeof(T));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Norm and activation

template <class T>
void norm(const T* x, int64_t x_stride, const T* weight, T* y, int64_t num_rows, int64_t size, float eps,
          int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * size > ALONE)
    for (int64_t n = 0; n < num_rows; ++n) {
        const T* from = x + n * x_stride;
        T* to = y + n * size;
        Vec squares[4] = {};
        for (int64_t j = 0; j < size; j += W) {
            const Vec each = load(from + j);
            squares[j / W % 4] += each * each;
        }
        const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(size);
        const Vec factor = all(1.0f / std::sqrt(mean + eps));
        for (int64_t j = 0; j < size; j += W) store(to + j, load(from + j) * factor * load(weight + j));
    }
}

template <class T>
void activate(const T* wide, T* y, int64_t num_rows, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * size > ALONE)
    for (int64_t n = 0; n < num_rows; ++n) {
        const T *gate = wide + n * 2 * size, *up = gate + size;
        for (int64_t j = 0; j < size; j += W) {
            const Vec x = load(gate + j);
            store(y + n * size + j, x / (all(1.0f) + exponential(-x)) * load(up + j));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Linear operators in matrix tiles: of bfloat16, or of integers of eight bits with a scale for each column of weights and
// each row. Every product is summed over k from first to last, whatever else is in the batch: a row has the same bits in
// any of them.

constexpr int LINE = 64;    // bytes of a row of a tile
constexpr int TILE = 16 * LINE;
constexpr int PANEL = 32;   // columns that are multiplied together: two tiles
constexpr int DEPTH = 32;   // tiles of k at a time, so that a panel's stay in the first cache
constexpr int ROWS = 256;   // at a time: with so many and DEPTH, rows stay in the second cache
constexpr int WIDEST = 8;   // panels at a time under the same rows

template <class E>
constexpr int DEEP = LINE / sizeof(E);  // k of a tile

inline int64_t tiles(int64_t length, int64_t each) { return (length + each - 1) / each; }

// Memory that its thread keeps for the next call.
struct Kept {
    template <class E>
    E* at_least(int64_t n) {
        if (size < n * static_cast<int64_t>(sizeof(E))) {
            size = n * sizeof(E);
            held = array<char>(size);
        }
        return reinterpret_cast<E*>(held.get());
    }
    Array<char> held;
    int64_t size = 0;
};

inline float widened(bf16 x) {
    const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
    float v;
    std::memcpy(&v, &u, sizeof v);
    return v;
}

inline int8_t nearest(bf16 x, float per_unit) {
    return static_cast<int8_t>(std::lrint(std::clamp(widened(x) * per_unit, -127.0f, 127.0f)));
}

// Weights of (d_out, d_in) as panels: for every 32 columns and each tile's k two tiles, neighbours in k beside each other.
// Zeros where there are none. Integers are the nearest to weight / scale, with a scale for each column.
template <class E>
void pack(const bf16* weight, int64_t d_out, int64_t d_in, E* panels, float* scales) {
    constexpr int TOGETHER = 4 / sizeof(E);
    const int64_t deep = tiles(d_in, DEEP<E>);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < tiles(d_out, PANEL); ++panel) {
        float per_unit[PANEL] = {};
        if (scales) {
            for (int column = 0; column < PANEL; ++column) {
                const int64_t row = panel * PANEL + column;
                float largest = 0.0f;
                for (int64_t k = 0; row < d_out && k < d_in; ++k) {
                    largest = std::max(largest, std::fabs(widened(weight[row * d_in + k])));
                }
                per_unit[column] = largest > 0.0f ? 127.0f / largest : 0.0f;
                if (row < d_out) scales[row] = largest / 127.0f;
            }
        }
        E* to = panels + panel * deep * DEEP<E> * PANEL;
        for (int64_t k = 0; k < deep * DEEP<E>; k += DEEP<E>) {
            for (int half = 0; half < 2; ++half) {
                for (int group = 0; group < 16; ++group) {
                    for (int column = 0; column < 16; ++column) {
                        const int64_t row = panel * PANEL + half * 16 + column;
                        for (int each = 0; each < TOGETHER; ++each) {
                            const int64_t at = k + TOGETHER * group + each;
                            const bool there = row < d_out && at < d_in;
                            const bf16 x = there ? weight[row * d_in + at] : bf16{0};
                            if constexpr (sizeof(E) == 1) {
                                *to++ = nearest(x, per_unit[half * 16 + column]);
                            } else {
                                *to++ = x;
                            }
                        }
                    }
                }
            }
        }
    }
}

#if defined(__AMX_BF16__)
// Sixteen rows as tiles, one after another; zeros past the last row and the last k.
void lay(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t d_in, bf16* to, float*) {
    for (int64_t k = 0; k < d_in; k += DEEP<bf16>) {
        const int64_t wide = std::min<int64_t>(DEEP<bf16>, d_in - k);
        for (int row = 0; row < 16; ++row, to += DEEP<bf16>) {
            if (row < num_rows && wide == DEEP<bf16>) {
                std::memcpy(to, x + row * x_stride + k, LINE);
                continue;
            }
            std::memset(to, 0, LINE);
            if (row < num_rows) std::memcpy(to, x + row * x_stride + k, wide * sizeof(bf16));
        }
    }
}

// The same as integers: the nearest to what is there / scale, with a scale for each row. A row that has what is no number
// gets no number for a scale, and so gives none.
void lay(const bf16* x, int64_t x_stride, int64_t num_rows, int64_t d_in, int8_t* to, float* scales) {
    const int64_t deep = tiles(d_in, DEEP<int8_t>);
    for (int row = 0; row < 16; ++row) {
        int8_t* line = to + row * LINE;
        if (row >= num_rows) {
            for (int64_t k = 0; k < deep; ++k) std::memset(line + k * TILE, 0, LINE);
            continue;
        }
        const bf16* from = x + row * x_stride;
        const auto part = [&](int64_t j) {  // 16 numbers; zeros past the last
            if (j + W <= d_in) return load(from + j);
            bf16 rest[W] = {};
            if (j < d_in) std::memcpy(rest, from + j, (d_in - j) * sizeof(bf16));
            return load(rest);
        };
        Vec largest = {};
        Int is_number = Int{} - 1;
        for (int64_t j = 0; j < d_in; j += W) {
            const Vec v = part(j);
            largest = larger(largest, larger(v, -v));
            is_number &= v == v;
        }
        const float most = highest(largest);
        bool good = most <= 3.0e38f;
        for (int i = 0; i < W; ++i) good &= is_number[i] != 0;
        scales[row] = good ? most / 127.0f : NAN;
        const Vec per_unit = all(good && most > 0.0f ? 127.0f / most : 0.0f);
        for (int64_t j = 0; j < deep * LINE; j += W) {
            const __m512i q = _mm512_cvtps_epi32((__m512)(part(j) * per_unit));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(line + j / LINE * TILE + j % LINE), _mm512_cvtsepi32_epi8(q));
        }
    }
}

// Some k of a panel under sixteen rows, or, if there are two, thirty-two; `sums` go on, (16 or 32, PANEL), float32 or
// whole numbers. Meanwhile `lines` lines a step are fetched from `ahead` on.
template <class E, bool TWO>
inline void multiply(const char* a, int64_t a_next, const char* b, int64_t depth, float* sums, bool begins,
                     const char* ahead, int lines) {
    constexpr int64_t ROW = PANEL * sizeof(float);
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, ROW);
        _tile_loadd(1, sums + 16, ROW);
        if (TWO) _tile_loadd(2, sums + 16 * PANEL, ROW);
        if (TWO) _tile_loadd(3, sums + 16 * PANEL + 16, ROW);
    }
    for (int64_t k = 0; k < depth; ++k, a += TILE, b += 2 * TILE) {
        for (int i = 0; i < lines; ++i, ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T1);
        _tile_loadd(4, a, LINE);
        _tile_loadd(6, b, LINE);
        _tile_loadd(7, b + TILE, LINE);
        if (TWO) _tile_loadd(5, a + a_next, LINE);
        if constexpr (sizeof(E) == 1) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (TWO) _tile_dpbssd(2, 5, 6);
            if (TWO) _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TWO) _tile_dpbf16ps(2, 5, 6);
            if (TWO) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, ROW);
    _tile_stored(1, sums + 16, ROW);
    if (TWO) _tile_stored(2, sums + 16 * PANEL, ROW);
    if (TWO) _tile_stored(3, sums + 16 * PANEL + 16, ROW);
}

// What a panel's sums are worth, and what is added to them: columns of all of it.
struct Worth {
    const float* scales;  // of columns; none: the sums are what they are
    const bf16* bias;
};

// A row of a panel's sums to where it belongs: with a bias, and added to what is there, if so asked; rounded once.
inline void settle(const float* sums, const Worth& worth, float row_scale, bf16* y, int64_t wide, bool adds) {
    if (wide == PANEL) {
        for (int j = 0; j < PANEL; j += W) {
            Vec v = load(sums + j);
            if (worth.scales) {
                const __m512 whole = _mm512_cvtepi32_ps((__m512i)v);
                v = (Vec)whole * (load(worth.scales + j) * all(row_scale));
            }
            if (worth.bias) v += load(worth.bias + j);
            if (adds) v += load(y + j);
            store(y + j, v);
        }
        return;
    }
    alignas(64) bf16 row[PANEL] = {}, more[PANEL] = {};
    alignas(64) float scales[PANEL] = {};
    std::memcpy(row, y, wide * sizeof(bf16));
    if (worth.bias) std::memcpy(more, worth.bias, wide * sizeof(bf16));
    if (worth.scales) std::memcpy(scales, worth.scales, wide * sizeof(float));
    const Worth whole = {worth.scales ? scales : nullptr, worth.bias ? more : nullptr};
    settle(sums, whole, row_scale, row, PANEL, adds);
    std::memcpy(y, row, wide * sizeof(bf16));
}

// y = x · some panels. `first` and `d_out` in columns, `first` at the edge of a panel; panels, scales and bias are all.
template <class E>
void linear(const bf16* x, int64_t x_stride, int64_t num_rows, const E* panels, const float* scales, int64_t d_in,
            int64_t first, int64_t d_out, const bf16* bias, bf16* y, int64_t y_stride, bool adds, int num_threads) {
    const int64_t deep = tiles(d_in, DEEP<E>), blocks = tiles(num_rows, 16), num_panels = tiles(d_out, PANEL);
    const int64_t stages = tiles(deep, DEPTH), next = deep * TILE;
    // as many panels for a thread at a time as leave each four turns, and all equally many
    const int64_t wide = std::clamp<int64_t>(num_panels / (num_threads * 4), 1, WIDEST);
    const int64_t groups = std::min(num_panels, num_threads * tiles(num_panels, num_threads * wide));
    const int64_t high = std::min<int64_t>(blocks, ROWS / 16);
    static thread_local Kept laid_by, summed_by, scaled_by;
    char* const laid = laid_by.at_least<char>(blocks * next);
    float* const summed = summed_by.at_least<float>(num_threads * wide * high * 16 * PANEL);
    float* const row_scales = scaled_by.at_least<float>(blocks * 16);
    const char* const from_panel = reinterpret_cast<const char*>(panels) + first / PANEL * deep * 2 * TILE;
#pragma omp parallel num_threads(num_threads) if (groups > 1)
    {
        const Tiles held;
        float* const sums = summed + omp_get_thread_num() * wide * high * 16 * PANEL;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            lay(x + block * 16 * x_stride, x_stride, num_rows - block * 16, d_in,
                reinterpret_cast<E*>(laid + block * next), row_scales + block * 16);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t from = num_panels * group / groups, to = num_panels * (group + 1) / groups;
            for (int64_t top = 0; top < blocks; top += high) {
                const int64_t bottom = std::min(blocks, top + high);
                const int64_t pairs = tiles(bottom - top, 2);
                const int lines = pairs == 1 ? 0 : static_cast<int>(tiles(2 * 16, pairs));
                for (int64_t stage = 0; stage < stages; ++stage) {
                    const int64_t k = deep * stage / stages, depth = deep * (stage + 1) / stages - k;
                    for (int64_t panel = from; panel < to; ++panel) {
                        const char* b = from_panel + (panel * deep + k) * 2 * TILE;
                        const char* ahead = b + deep * 2 * TILE;  // the next panel's
                        const int fetched = panel + 1 < to ? lines : 0;
                        const int64_t column = panel * PANEL, here = std::min<int64_t>(PANEL, d_out - column);
                        const Worth worth = {scales ? scales + first + column : nullptr,
                                             bias ? bias + first + column : nullptr};
                        for (int64_t block = top; block < bottom; block += 2) {
                            const char* a = laid + block * next + k * TILE;
                            float* c = sums + ((panel - from) * high + block - top) * 16 * PANEL;
                            if (block + 1 < bottom) {
                                multiply<E, true>(a, next, b, depth, c, stage == 0, ahead, fetched);
                            } else {
                                multiply<E, false>(a, next, b, depth, c, stage == 0, ahead, fetched);
                            }
                            ahead += depth * lines * LINE;
                            if (stage + 1 < stages) continue;
                            for (int64_t row = block * 16; row < std::min(num_rows, (block + 2) * 16); ++row) {
                                settle(c, worth, row_scales[row], y + row * y_stride + column, here, adds);
                                c += PANEL;
                            }
                        }
                    }
                }
            }
        }
    }
}
#endif

}  // namespace

// dtype: 0 float32, 1 bfloat16. All strides and offsets are counted in elements.
extern "C" {

int headway_interface() { return 3; }  // grows with every change of the functions below

// Whether the system lets this process run it: tile registers are asked for once.
int headway_ready() {
#if defined(__AMX_BF16__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 1;
#endif
}

int headway_lanes() { return W; }

void headway_attend(int dtype, const void* q, void* y, const void* pool, const int64_t* tables, const int64_t* geometry,
                    const int64_t* glances, int64_t num_glances, int num_threads) {
    const Geometry& g = *reinterpret_cast<const Geometry*>(geometry);
    const Glance* each = reinterpret_cast<const Glance*>(glances);
    if (dtype == 0) {
        attend(static_cast<const float*>(q), static_cast<float*>(y), static_cast<const float*>(pool), tables, g, each,
               num_glances, num_threads);
    } else {
        attend(static_cast<const bf16*>(q), static_cast<bf16*>(y), static_cast<const bf16*>(pool), tables, g, each,
               num_glances, num_threads);
    }
}

void headway_place(int dtype, void* qkv, int64_t num_rows, const int64_t* positions, const float* rope,
                   const int64_t* pages, const int64_t* slots, void* pool, const int64_t* heads, float scale,
                   int num_threads) {
    const Heads& h = *reinterpret_cast<const Heads*>(heads);
    if (dtype == 0) {
        place(static_cast<float*>(qkv), num_rows, positions, rope, pages, slots, static_cast<float*>(pool), h, scale,
              num_threads);
    } else {
        place(static_cast<bf16*>(qkv), num_rows, positions, rope, pages, slots, static_cast<bf16*>(pool), h, scale,
              num_threads);
    }
}

void headway_norm(int dtype, const void* x, int64_t x_stride, const void* weight, void* y, int64_t num_rows,
                  int64_t size, float eps, int num_threads) {
    if (dtype == 0) {
        norm(static_cast<const float*>(x), x_stride, static_cast<const float*>(weight), static_cast<float*>(y),
             num_rows, size, eps, num_threads);
    } else {
        norm(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(weight), static_cast<bf16*>(y), num_rows,
             size, eps, num_threads);
    }
}

void headway_activate(int dtype, const void* wide, void* y, int64_t num_rows, int64_t size, int num_threads) {
    if (dtype == 0) {
        activate(static_cast<const float*>(wide), static_cast<float*>(y), num_rows, size, num_threads);
    } else {
        activate(static_cast<const bf16*>(wide), static_cast<bf16*>(y), num_rows, size, num_threads);
    }
}

// Columns of a panel of weights, 0 if there are no matrix tiles and so no `linear`.
int headway_panel() { return PAIRS<bf16> ? PANEL : 0; }

// How many bytes the panels of such a matrix take, of bfloat16 or of integers.
int64_t headway_panels_bytes(int64_t d_out, int64_t d_in, int integers) {
    const int64_t deep = integers ? tiles(d_in, DEEP<int8_t>) : tiles(d_in, DEEP<bf16>);
    return tiles(d_out, PANEL) * deep * 2 * TILE;
}

// With `scales`, one for each column, they are integers.
void headway_pack(const void* weight, int64_t d_out, int64_t d_in, void* panels, float* scales) {
    if (scales) {
        pack(static_cast<const bf16*>(weight), d_out, d_in, static_cast<int8_t*>(panels), scales);
    } else {
        pack(static_cast<const bf16*>(weight), d_out, d_in, static_cast<bf16*>(panels), scales);
    }
}

void headway_linear(const void* x, int64_t x_stride, int64_t num_rows, const void* panels, const float* scales,
                    int64_t d_in, int64_t first, int64_t d_out, const void* bias, void* y, int64_t y_stride, int adds,
                    int num_threads) {
#if defined(__AMX_BF16__)
    if (scales) {
        linear(static_cast<const bf16*>(x), x_stride, num_rows, static_cast<const int8_t*>(panels), scales, d_in, first,
               d_out, static_cast<const bf16*>(bias), static_cast<bf16*>(y), y_stride, adds != 0, num_threads);
    } else {
        linear(static_cast<const bf16*>(x), x_stride, num_rows, static_cast<const bf16*>(panels), scales, d_in, first,
               d_out, static_cast<const bf16*>(bias), static_cast<bf16*>(y), y_stride, adds != 0, num_threads);
    }
#endif
}
}
