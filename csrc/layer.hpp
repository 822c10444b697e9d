// A whole layer in one call, for steps of few rows: to be called for each of its operators takes longer there than some of
// them do. The operators and their order are the same, and so is every bit.
#pragma once

#include "attention.hpp"
#include "matrix_tiles.hpp"
#include "panels.hpp"
#include "rows.hpp"

namespace {

// One matrix of a layer: (d_in, d_out) in panels; scales of columns where these are integers.
struct Weights {
    const void* panels;
    const float* scales;
    const void* bias;
    int64_t d_in, d_out;
};

// What a layer is made of, and where its keys and values stand; no norms of heads: null. `gates`: gate_up's panels are packed
// to end as a gate.
struct Parts {
    const void *input_norm, *q_norm, *k_norm, *post_norm;
    void* pool;
    Weights qkv, o, gate_up, down;
    int64_t gates;
};

// What a step's rows are, the same for all layers that look equally far back.
struct Course {
    const int64_t *positions, *pages, *slots;
    const float* rope;
    const int64_t* tables;
    const Geometry* geometry;
    const Glance* glances;
    int64_t num_glances;
};

template <class E, class T>
void multiply_by(const Weights& w, const T* x, int64_t num_rows, T* y, Ending ending, int num_threads) {
    linear(x, w.d_in, num_rows, static_cast<const E*>(w.panels), w.scales, w.d_in, 0, w.d_out,
           static_cast<const T*>(w.bias), y, ending == Ending::gate ? w.d_out / 2 : w.d_out, ending, num_threads);
}

// Rows x (num_rows, E) through one layer, in place.
template <class E, class T>
void layer(T* x, int64_t num_rows, const Parts& parts, const Course& course, const Heads& heads, float scale, float eps,
           int num_threads) {
    static thread_local Kept normed_by, qkv_by, seen_by, wide_by, middle_by;
    const int64_t size = parts.qkv.d_in, middle_size = parts.down.d_in;
    T* const normed = normed_by.at_least<T>(num_rows * size);
    T* const qkv = qkv_by.at_least<T>(num_rows * parts.qkv.d_out);
    T* const seen = seen_by.at_least<T>(num_rows * parts.o.d_in);
    T* const wide = parts.gates ? nullptr : wide_by.at_least<T>(num_rows * parts.gate_up.d_out);
    T* const middle = middle_by.at_least<T>(num_rows * middle_size);
    T* const pool = static_cast<T*>(parts.pool);
    const auto weight = [](const void* p) { return static_cast<const T*>(p); };

    norm(x, size, weight(parts.input_norm), normed, num_rows, size, eps, num_threads);
    multiply_by<E>(parts.qkv, normed, num_rows, qkv, Ending::put, num_threads);
    place(qkv, num_rows, course.positions, course.rope, course.pages, course.slots, pool, heads,
          {weight(parts.q_norm), weight(parts.k_norm), eps}, scale, num_threads);
    attend(qkv, seen, static_cast<const T*>(pool), course.tables, *course.geometry, course.glances, course.num_glances,
           num_threads);
    multiply_by<E>(parts.o, seen, num_rows, x, Ending::add, num_threads);
    norm(x, size, weight(parts.post_norm), normed, num_rows, size, eps, num_threads);
    if (parts.gates) {
        multiply_by<E>(parts.gate_up, normed, num_rows, middle, Ending::gate, num_threads);
    } else {
        multiply_by<E>(parts.gate_up, normed, num_rows, wide, Ending::put, num_threads);
        activate(wide, middle, num_rows, middle_size, num_threads);
    }
    multiply_by<E>(parts.down, middle, num_rows, x, Ending::add, num_threads);
}

}  // namespace
