// Linear operators in matrix tiles: of bfloat16, or of integers of eight bits with a scale for each column of weights and
// each row. Every product is summed over k from first to last, whatever else is in the batch: a row has the same bits in
// any of them.
#pragma once

#include "linear.hpp"
#include "tiles.hpp"

#if defined(__AMX_BF16__)
namespace {

constexpr int DEPTH = 32;   // tiles of k at a time, so that a panel's stay in the first cache
constexpr int ROWS = 256;   // at a time: with so many and DEPTH, rows stay in the second cache
constexpr int WIDEST = 8;   // panels at a time under the same rows

template <class E>
constexpr int DEEP = LINE / sizeof(E);  // k of a tile

// For each tile's k two tiles, neighbours in k beside each other.
template <class E>
struct InTiles {
    static constexpr int DEEP = ::DEEP<E>;
    static constexpr int ZERO = 0;  // of integers
    template <class F>
    static void visit(F each) {
        constexpr int TOGETHER = 4 / sizeof(E);
        for (int half = 0; half < PANEL; half += 16) {
            for (int k = 0; k < DEEP; k += TOGETHER) {
                for (int column = half; column < half + 16; ++column) {
                    for (int next = 0; next < TOGETHER; ++next) each(k + next, column);
                }
            }
        }
    }
};

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
        const float most = peak(from, d_in);
        scales[row] = most / 127.0f;
        const Vec per_unit = all(most > 0.0f ? 127.0f / most : 0.0f);
        for (int64_t j = 0; j < deep * LINE; j += W) {
            const Vec v = (j + W <= d_in ? load(from + j) : rest(from + j, d_in - j)) * per_unit;
            const __m512i q = _mm512_cvtps_epi32((__m512)v);
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

// y = x · some panels. `first` and `d_out` in columns, `first` at the edge of a panel; panels, scales and bias are all. None of
// them ends as a gate.
template <class E>
void linear(const bf16* x, int64_t x_stride, int64_t num_rows, const E* panels, const float* scales, int64_t d_in,
            int64_t first, int64_t d_out, const bf16* bias, bf16* y, int64_t y_stride, Ending ending, int num_threads) {
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
                        const Worth<bf16> worth = {scales ? scales + first + column : nullptr,
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
                                settle(c, worth, row_scales[row], y + row * y_stride + column, here, ending == Ending::add);
                                c += PANEL;
                            }
                        }
                    }
                }
            }
        }
    }
}
}  // namespace
#endif
