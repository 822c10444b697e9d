// How a block of keys and values gets from its pages to where it is multiplied
#pragma once

#include "panels.hpp"

namespace {

constexpr int KEYS = 64;  // a block: every row's sum over keys is cut at multiples of it

// What numbers are multiplied as: themselves where the processor does that, else float32.
#if defined(MULTIPLIES_PAIRS)
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

struct Geometry {
    int64_t q_stride, y_stride, page_stride, head_stride, value_offset;
    int64_t page_tokens, head_size, groups, window;  // window 0: none
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

// Where the keys of a block stand.
template <class T>
inline void find(const T* pool, const int64_t* table, const Geometry& g, int64_t first, int num, const T** rows) {
    const int64_t* page = table + first / g.page_tokens;
    int64_t slot = first % g.page_tokens;
    for (int i = 0; i < num; ++i, ++slot) {
        if (slot == g.page_tokens) {
            slot = 0;
            ++page;
        }
        rows[i] = pool + *page * g.page_stride + slot * g.head_size;
    }
}

// Keys as columns, (D, KEYS), and values as rows, (KEYS, D), both float32. Columns past `num` are zero.
template <class T>
void gather(const T* const* rows, const Geometry& g, int num, float* k, float* v) {
    const int64_t d = g.head_size;
    for (int base = 0; base < KEYS; base += W) {
        for (int64_t j = 0; j < d; j += W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) block[i] = base + i < num ? load(rows[base + i] + j) : Vec{};
            transpose(block);
            for (int i = 0; i < W; ++i) store(k + (j + i) * KEYS + base, block[i]);
        }
    }
    for (int i = 0; i < num; ++i) {
        for (int64_t j = 0; j < d; j += W) store(v + i * d + j, load(rows[i] + g.value_offset + j));
    }
}

#if defined(MULTIPLIES_PAIRS)
// Keys as pairs of dimensions, (D / 2, KEYS, 2), values as pairs of positions, (KEYS / 2, D, 2); what is past `num` is
// zero.
void gather(const bf16* const* rows, const Geometry& g, int num, bf16* k, bf16* v) {
    const int64_t d = g.head_size;
    for (int base = 0; base < KEYS; base += W) {
        for (int64_t j = 0; j < d; j += 2 * W) {
            Vec block[W];
            for (int i = 0; i < W; ++i) {
                block[i] = Vec{};
                if (base + i < num) std::memcpy(&block[i], rows[base + i] + j, sizeof block[i]);
            }
            transpose(block);
            for (int i = 0; i < W; ++i) std::memcpy(k + (j + 2 * i) * KEYS + 2 * base, &block[i], sizeof block[i]);
        }
    }
    for (int i = 0; i < KEYS; i += 2) {
        for (int64_t j = 0; j < d; j += W) {
            Half even = {}, odd = {};
            if (i < num) std::memcpy(&even, rows[i] + g.value_offset + j, sizeof even);
            if (i + 1 < num) std::memcpy(&odd, rows[i + 1] + g.value_offset + j, sizeof odd);
            const Bits pair = __builtin_convertvector(even, Bits) | __builtin_convertvector(odd, Bits) << 16;
            std::memcpy(v + i * d + 2 * j, &pair, sizeof pair);
        }
    }
}
#endif

}  // namespace
