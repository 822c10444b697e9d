// What is done to each row by itself: rotation and the way of keys and values to their pages, norms, activations.
#pragma once

#include "vectors.hpp"

namespace {

// By its root mean square. `from` and `to` may be the same.
template <class T>
inline void norm_row(const T* from, const T* weight, T* to, int64_t size, float eps) {
    Vec squares[4] = {};
    for (int64_t j = 0; j < size; j += W) {
        const Vec each = load(from + j);
        squares[j / W % 4] += each * each;
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(size);
    const Vec factor = all(1.0f / std::sqrt(mean + eps));
    for (int64_t j = 0; j < size; j += W) store(to + j, load(from + j) * factor * load(weight + j));
}

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

// Norms of each head of queries and keys, where a model has them; else null.
template <class T>
struct HeadNorms {
    const T *q, *k;
    float eps;
};

template <class T>
void place(T* qkv, int64_t num_rows, const int64_t* positions, const float* rope, const int64_t* pages,
           const int64_t* slots, T* pool, const Heads& h, const HeadNorms<T>& norms, float scale, int num_threads) {
    const int64_t d = h.head_size, half = d / 2;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * h.row_stride > ALONE)
    for (int64_t n = 0; n < num_rows; ++n) {
        T* q = qkv + n * h.row_stride;
        T* k = q + h.num_heads * d;
        T* v = k + h.num_kv_heads * d;
        const float* cosine = rope + positions[n] * d;
        for (int64_t i = 0; i < h.num_heads; ++i) {
            if (norms.q) norm_row(q + i * d, norms.q, q + i * d, d, norms.eps);
            rotate(q + i * d, q + i * d, cosine, cosine + half, half, scale);
        }
        T* slot = pool + pages[n] * h.page_stride + slots[n] * d;
        for (int64_t i = 0; i < h.num_kv_heads; ++i) {
            if (norms.k) norm_row(k + i * d, norms.k, k + i * d, d, norms.eps);
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
    for (int64_t n = 0; n < num_rows; ++n) norm_row(x + n * x_stride, weight, y + n * size, size, eps);
}

template <class T>
void activate(const T* wide, T* y, int64_t num_rows, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * size > ALONE)
    for (int64_t n = 0; n < num_rows; ++n) {
        const T *gate = wide + n * 2 * size, *up = gate + size;
        for (int64_t j = 0; j < size; j += W) store(y + n * size + j, gated<T>(load(gate + j), load(up + j)));
    }
}

}  // namespace
