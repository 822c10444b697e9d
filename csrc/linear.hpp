// What linear operators have in common, in matrix tiles (`matrix_tiles.hpp`) and in vectors (`panels.hpp`): weights stand
// in panels of some columns, bfloat16, float32, or integers of eight bits with a scale for each column and each row. What
// a row gets is summed over k in an order that does not depend on what else is in the batch: it has the same bits in any.
#pragma once

#include <type_traits>

#include "vectors.hpp"

namespace {

constexpr int PANEL = 2 * W;  // columns that are multiplied together

inline int64_t tiles(int64_t length, int64_t each) { return (length + each - 1) / each; }

inline float widened(bf16 x) {
    const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
    float v;
    std::memcpy(&v, &u, sizeof v);
    return v;
}

inline float widened(float x) { return x; }

// What becomes of a row's sums: they are put where they belong, or added to what is there; or every other panel is the gate
// of the next, and what passes is put there.
enum class Ending { put, add, gate };

// Weights of (d_out, d_in) as panels, zeros where there are none. A layout says in which order a panel's columns stand for
// `DEEP` inputs, and so on for the next. Integers are the nearest to weight / scale, with a scale for each column, and with
// `ZERO` for nothing. Where they end as a gate, panels of the first half of the columns stand beside those of the second.
template <class Layout, class T, class E>
void pack(const T* weight, int64_t d_out, int64_t d_in, bool gates, E* panels, float* scales) {
    const int64_t deep = tiles(d_in, Layout::DEEP);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < tiles(d_out, PANEL); ++panel) {
        const T* rows = weight + (gates ? panel % 2 * (d_out / 2) + panel / 2 * PANEL : panel * PANEL) * d_in;
        const int64_t here = std::min<int64_t>(PANEL, d_out - panel * PANEL);
        float per_unit[PANEL] = {};
        for (int64_t column = 0; scales && column < here; ++column) {
            float largest = 0.0f;
            for (int64_t k = 0; k < d_in; ++k) {
                const float size = std::fabs(widened(rows[column * d_in + k]));
                if (size > largest || size != size) largest = size;  // what is no number stays: so will all that it gives
            }
            per_unit[column] = largest > 0.0f ? 127.0f / largest : 0.0f;
            scales[panel * PANEL + column] = largest / 127.0f;
        }
        E* to = panels + panel * deep * Layout::DEEP * PANEL;
        for (int64_t first = 0; first < deep * Layout::DEEP; first += Layout::DEEP) {
            Layout::visit([&](int64_t k, int64_t column) {
                const bool is_there = column < here && first + k < d_in;
                const T x = is_there ? rows[column * d_in + first + k] : T{};
                if constexpr (std::is_same_v<E, T>) {
                    *to++ = x;
                } else {
                    const float units = widened(x) * per_unit[column];
                    const float within = units == units ? std::clamp(units, -127.0f, 127.0f) : 0.0f;
                    *to++ = static_cast<E>(std::lrint(within) + Layout::ZERO);
                }
            });
        }
    }
}

// What a panel's sums are worth, and what is added to them: columns of all of it.
template <class T>
struct Worth {
    const float* scales;  // of columns; none: the sums are what they are, else they are whole numbers
    const T* bias;
};

// A row of a panel's sums to where it belongs: with a bias, and added to what is there, if so asked; rounded once.
template <class T>
inline void settle(const float* sums, const Worth<T>& worth, float row_scale, T* y, int64_t wide, bool adds) {
    if (wide == PANEL) {
        for (int j = 0; j < PANEL; j += W) {
            Vec v = load(sums + j);
            if (worth.scales) {
                v = unfused(__builtin_convertvector((Int)v, Vec) * (load(worth.scales + j) * all(row_scale)));
            }
            if (worth.bias) v += load(worth.bias + j);
            if (adds) v += load(y + j);
            store(y + j, v);
        }
        return;
    }
    alignas(64) T row[PANEL] = {}, more[PANEL] = {};
    alignas(64) float scales[PANEL] = {};
    std::memcpy(row, y, wide * sizeof(T));
    if (worth.bias) std::memcpy(more, worth.bias, wide * sizeof(T));
    if (worth.scales) std::memcpy(scales, worth.scales, wide * sizeof(float));
    const Worth<T> whole = {worth.scales ? scales : nullptr, worth.bias ? more : nullptr};
    settle(sums, whole, row_scale, row, PANEL, adds);
    std::memcpy(y, row, wide * sizeof(T));
}

// A row of the sums of two panels, of which the first is the gate of the second; both are rounded before, as if they had
// been put somewhere.
template <class T>
inline void settle_gated(const float* gate, const float* up, const Worth<T>& of_gate, const Worth<T>& of_up,
                         float row_scale, T* y) {
    alignas(64) T both[2][PANEL];
    settle(gate, of_gate, row_scale, both[0], PANEL, false);
    settle(up, of_up, row_scale, both[1], PANEL, false);
    for (int j = 0; j < PANEL; j += W) store(y + j, gated<T>(load(both[0] + j), load(both[1] + j)));
}

// The largest number of a row without its sign, for the scale of its integers; no number if one of them is none.
template <class T>
inline float peak(const T* row, int64_t size) {
    Vec largest = {};
    Int is_number = Int{} - 1;
    const auto see = [&](Vec v) {
        largest = larger(largest, larger(v, -v));
        is_number &= v == v;
    };
    int64_t j = 0;
    for (; j + W <= size; j += W) see(load(row + j));
    if (j < size) see(rest(row + j, size - j));
    const float most = highest(largest);
    bool is_good = most <= 3.0e38f;
    for (int i = 0; i < W; ++i) is_good &= is_number[i] != 0;
    return is_good ? most : NAN;
}

}  // namespace
