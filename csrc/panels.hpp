// Linear operators in vectors, for processors without matrix tiles, and for float32 on any. Where the processor multiplies
// pairs of bfloat16 or fours of integers itself, weights and rows are what they are; elsewhere they are widened to float32
// and to pairs of sixteen bits. The sums of a column are kept in a vector's lane while k passes.
#pragma once

#include "linear.hpp"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TALL = 12;  // rows under a panel at a time: with 32 registers
#else
constexpr int TALL = 6;  // with 16
#endif
constexpr int64_t FEW_BLOCKS = 5;  // of so many rows: weights are what takes time to read
constexpr int64_t DEEP_FEW = 8 * W;  // words of k at a time: as long a piece of one panel is fetched meanwhile
constexpr int64_t DEEP_MANY = 32 * W;  // under many, a block of rows stays in the first cache, pieces in the second
constexpr int64_t ROWS_AT_ONCE = 120;  // so many rows of it as well
constexpr int64_t PANELS_AT_ONCE = 4;  // under the same rows
constexpr int64_t FETCHING_ROWS = 3;  // fewer are multiplied so fast that the processor had better fetch by itself

constexpr int64_t SAME_LINES = 4096;  // bytes: rows so far apart lie on the same few lines of the first cache

// What stands in a word of four bytes of a row as it is laid out: float32, or as many k as are multiplied at once.
typedef uint32_t __attribute__((may_alias)) Word;

template <class E>
struct InVectors {  // float32, each k's columns one after another
    static constexpr int DEEP = 1;
    typedef Vec Sum;
    typedef Vec Factor;
    template <class F>
    static void visit(F each) {
        for (int column = 0; column < PANEL; ++column) each(0, column);
    }
    static void columns(const E* p, Vec* two) {
        two[0] = load(p);
        two[1] = load(p + W);
    }
    static Vec spread(Word a) {
        float x;
        std::memcpy(&x, &a, sizeof x);
        return all(x);
    }
    static Vec add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

// For each column so many k beside each other, as they stand in a word.
template <int TOGETHER>
struct Together {
    static constexpr int DEEP = TOGETHER;
    typedef Int Factor;
    template <class F>
    static void visit(F each) {
        for (int column = 0; column < PANEL; ++column) {
            for (int k = 0; k < TOGETHER; ++k) each(k, column);
        }
    }
    static void columns(const void* p, Int* two) {
        std::memcpy(two, p, sizeof *two);
        std::memcpy(two + 1, static_cast<const char*>(p) + sizeof *two, sizeof *two);
    }
    static Int spread(Word a) { return Int{} + static_cast<int32_t>(a); }
};

#if defined(MULTIPLIES_PAIRS)
template <>
struct InVectors<bf16> : Together<2> {
    typedef Vec Sum;
    static Vec add(Vec sum, Int a, Int b) {
#if defined(__AVX512BF16__)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
    }
};
#else
template <>
struct InVectors<bf16> : InVectors<float> {  // a column and the one a vector further share a word
    template <class F>
    static void visit(F each) {
        for (int column = 0; column < W; ++column) {
            each(0, column);
            each(0, column + W);
        }
    }
    static void columns(const bf16* p, Vec* two) {
        Bits both;
        std::memcpy(&both, p, sizeof both);
        two[0] = (Vec)(both << 16);
        two[1] = (Vec)(both & 0xffff0000u);
    }
};

#endif

#if defined(__AVX512VNNI__)
template <>
struct InVectors<int8_t> : Together<4> {  // one factor is unsigned: weights are, with 128 for zero
    static constexpr int ZERO = 128;
    typedef Int Sum;
    typedef int8_t Whole;
    static Int add(Int sum, Int a, Int b) { return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a); }
};
#elif defined(__ARM_FEATURE_DOTPROD)
template <>
struct InVectors<int8_t> : Together<4> {
    static constexpr int ZERO = 0;
    typedef Int Sum;
    typedef int8_t Whole;
    static Int add(Int sum, Int a, Int b) { return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b); }
};
#else
template <>
struct InVectors<int8_t> : Together<2> {
    static constexpr int ZERO = 0;
    typedef Int Sum;
    typedef int16_t Whole;
    typedef int8_t Bytes __attribute__((vector_size(2 * W)));
    typedef int16_t Pairs __attribute__((vector_size(4 * W)));
    static void columns(const int8_t* p, Int* two) {
        Bytes bytes[2];
        std::memcpy(bytes, p, sizeof bytes);
        two[0] = (Int)__builtin_convertvector(bytes[0], Pairs);
        two[1] = (Int)__builtin_convertvector(bytes[1], Pairs);
    }
    static Int add(Int sum, Int a, Int b) {
#if defined(__AVX512BW__)
        return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
        return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
        return sum + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
        return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
    }
};
#endif

// Whether a row's numbers are multiplied as they are.
template <class E, class T>
constexpr bool IN_WORDS = std::is_same_v<E, T> && InVectors<E>::DEEP * sizeof(T) == sizeof(Word);

// Whether such rows had better be multiplied where they are, too, and not be laid out anew.
template <class E, class T>
inline bool in_place(int64_t d_in, int64_t x_stride, bool is_few) {
    if (!IN_WORDS<E, T> || d_in % InVectors<E>::DEEP != 0 || x_stride % InVectors<E>::DEEP != 0) return false;
    return is_few || x_stride * sizeof(T) % SAME_LINES != 0;
}

// A row in words, zeros past the last k: as it is where that is how it is multiplied, else in float32.
template <class E, class T>
inline void lay(const T* x, int64_t d_in, int64_t words, Word* to) {
    if constexpr (IN_WORDS<E, T>) {
        std::memcpy(to, x, d_in * sizeof *x);
        std::memset(reinterpret_cast<T*>(to) + d_in, 0, words * sizeof *to - d_in * sizeof *x);
    } else {
        for (int64_t j = 0; j < words; j += W) {
            const Vec v = j + W <= d_in ? load(x + j) : rest(x + j, d_in - j);
            std::memcpy(to + j, &v, sizeof v);
        }
    }
}

// A row as whole numbers: the nearest to what is there / scale. One that has what is no number gets no number for a scale,
// and so gives none. `start` is where its sums begin, so that weights with another zero come to the same.
template <class T>
inline void lay_rounded(const T* x, int64_t d_in, int64_t words, Word* to, float* scale, int32_t* start) {
    typedef InVectors<int8_t> In;
    typedef typename In::Whole Some __attribute__((vector_size(sizeof(typename In::Whole) * W)));
    const float most = peak(x, d_in);
    *scale = most / 127.0f;
    const Vec per_unit = all(most > 0.0f ? 127.0f / most : 0.0f);
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    Bits total = {};  // of a row without numbers: whatever, if it does not overflow
    for (int64_t j = 0; j < words * In::DEEP; j += W) {
        const Vec v = (j + W <= d_in ? load(x + j) : rest(x + j, d_in - j)) * per_unit;
        const Int whole = (Int)(v + magic) - (Int)magic;
        total += (Bits)whole;
        const Some some = __builtin_convertvector(whole, Some);
        std::memcpy(reinterpret_cast<typename In::Whole*>(to) + j, &some, sizeof some);
    }
    uint32_t below = 0;
    for (int i = 0; i < W; ++i) below -= In::ZERO * total[i];
    *start = static_cast<int32_t>(below);
}

// What comes next, to be fetched to the second cache meanwhile: as many bytes as so many steps take, from there on.
struct Following {
    const char* from;
    int64_t steps;
};

// Some k of `WIDE` panels under `HIGH` rows. `sums`, (WIDE, rows, PANEL), go on, or, where `starts` are given for these rows,
// begin there.
template <class E, int HIGH, int WIDE>
void multiply(const Word* a, int64_t a_next, const E* b, int64_t b_next, int64_t depth, Following following, float* sums,
              int64_t sums_next, const int32_t* starts) {
    typedef InVectors<E> In;
    typedef typename In::Sum Sum;
    constexpr int64_t STEP = In::DEEP * PANEL;
    Sum s[WIDE][HIGH][2];
#pragma GCC unroll 2
    for (int p = 0; p < WIDE; ++p) {
#pragma GCC unroll 12
        for (int i = 0; i < HIGH; ++i) {
            for (int half = 0; half < 2; ++half) {
                if (starts) {
                    s[p][i][half] = (Sum)(Int{} + starts[i]);
                } else {
                    std::memcpy(&s[p][i][half], sums + p * sums_next + i * PANEL + half * W, sizeof(Sum));
                }
            }
        }
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int p = 0; p < WIDE; ++p) {
            typename In::Factor two[2];
            In::columns(b + p * b_next + k * STEP, two);
#pragma GCC unroll 12
            for (int i = 0; i < HIGH; ++i) {
                const typename In::Factor x = In::spread(a[i * a_next + k]);
                s[p][i][0] = In::add(s[p][i][0], x, two[0]);
                s[p][i][1] = In::add(s[p][i][1], x, two[1]);
            }
        }
    };
    int64_t k = 0;
    for (; k < following.steps; ++k) {
        for (size_t at = 0; at < STEP * sizeof(E); at += 64) {
            __builtin_prefetch(following.from + k * STEP * sizeof(E) + at, 0, 2);
        }
        step(k);
    }
    for (; k < depth; ++k) step(k);
#pragma GCC unroll 2
    for (int p = 0; p < WIDE; ++p) {
#pragma GCC unroll 12
        for (int i = 0; i < HIGH; ++i) {
            for (int half = 0; half < 2; ++half) {
                std::memcpy(sums + p * sums_next + i * PANEL + half * W, &s[p][i][half], sizeof(Sum));
            }
        }
    }
}

template <class E>
using Multiply = void (*)(const Word*, int64_t, const E*, int64_t, int64_t, Following, float*, int64_t, const int32_t*);

// So few rows leave registers, and must wait for each other's sums: they take several panels at a time.
constexpr int panels_under(int64_t high) { return high <= 2 ? 2 : 1; }

template <class E, int... I>
Multiply<E> chosen(int64_t high, bool together, std::integer_sequence<int, I...>) {
    static constexpr Multiply<E> plain[] = {multiply<E, I + 1, 1>...};
    static constexpr Multiply<E> wide[] = {multiply<E, I + 1, panels_under(I + 1)>...};
    return (together ? wide : plain)[high - 1];
}

// As many panels under the same rows, a multiple of `least`, as leave each thread four turns, and nearly all of them the
// same work.
inline int64_t panels_together(int64_t num_panels, int64_t least, int num_threads) {
    const int64_t most = std::min(num_panels / (num_threads * 4), PANELS_AT_ONCE);
    const auto longest = [&](int64_t wide) { return tiles(tiles(num_panels, wide), num_threads) * wide; };
    int64_t best = least;
    for (int64_t wide = 2 * least; wide <= most; wide += least) best = longest(wide) <= longest(best) ? wide : best;
    return best;
}

// y = x · some panels. `first` and `d_out` in columns, `first` at the edge of a panel, or of two that end as a gate, of which
// y has half of the columns; panels, scales and bias are all.
template <class T, class E>
void linear(const T* x, int64_t x_stride, int64_t num_rows, const E* panels, const float* scales, int64_t d_in,
            int64_t first, int64_t d_out, const T* bias, T* y, int64_t y_stride, Ending ending, int num_threads) {
    constexpr auto HEIGHTS = std::make_integer_sequence<int, TALL>();
    constexpr int64_t STEP = InVectors<E>::DEEP * PANEL;  // of a panel, for a word of each row
    if (num_rows == 0) return;
    const int64_t blocks = tiles(num_rows, TALL);  // all about equally high
    const bool is_few = blocks <= FEW_BLOCKS;
    const int64_t deep = tiles(d_in, InVectors<E>::DEEP), stages = tiles(deep, is_few ? DEEP_FEW : DEEP_MANY);
    const int64_t num_panels = tiles(d_out, PANEL), panel_size = deep * STEP;
    const int64_t least = ending == Ending::gate ? 2 : 1;
    const int64_t wide = panels_together(num_panels, least, num_threads), groups = tiles(num_panels, wide);
    const int64_t parts = tiles(blocks, ROWS_AT_ONCE / TALL), high = tiles(blocks, parts);
    const int64_t strip = is_few ? std::min<int64_t>(wide, panels_under(num_rows)) : wide;
    const int64_t sums_next = high * TALL * PANEL;
    static thread_local Kept laid_by, summed_by, scaled_by, started_by;
    const Word* rows = reinterpret_cast<const Word*>(x);
    int64_t next = x_stride / InVectors<E>::DEEP;
    float* const summed = summed_by.at_least<float>(num_threads * wide * sums_next);
    float* const row_scales = scaled_by.at_least<float>(num_rows);
    int32_t* const starts = started_by.at_least<int32_t>(num_rows);
    const E* const from_panel = panels + first / PANEL * panel_size;
    const auto row_of = [&](int64_t block) { return num_rows * block / blocks; };
    std::fill_n(starts, num_rows, 0);
    if (!in_place<E, T>(d_in, x_stride, is_few)) {
        const int64_t words = tiles(deep, W) * W;
        next = words + W;  // rows a power of two apart would share few cache lines
        Word* const laid = laid_by.at_least<Word>(num_rows * next);
        rows = laid;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows * d_in > ALONE)
        for (int64_t row = 0; row < num_rows; ++row) {
            if constexpr (std::is_same_v<E, int8_t>) {
                lay_rounded(x + row * x_stride, d_in, words, laid + row * next, row_scales + row, starts + row);
            } else {
                lay<E>(x + row * x_stride, d_in, words, laid + row * next);
            }
        }
    }
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (groups * parts > 1)
    for (int64_t item = 0; item < groups * parts; ++item) {
        float* const sums = summed + omp_get_thread_num() * wide * sums_next;
        const int64_t from = item / parts * wide, to = std::min(num_panels, from + wide);
        const int64_t following = (item + num_threads) / parts * wide;  // this thread's next item, if all are as fast
        const int64_t top = blocks * (item % parts) / parts, bottom = blocks * (item % parts + 1) / parts;
        for (int64_t left = from; left < to; left += strip) {
            const int64_t right = std::min(to, left + strip), then = right < to ? right : following;
            const bool together = is_few && right - left == panels_under(num_rows);
            const int64_t held = ending == Ending::gate ? from : left;  // the first panel whose sums are kept
            for (int64_t stage = 0; stage < stages; ++stage) {
                const int64_t k = deep * stage / stages, depth = deep * (stage + 1) / stages - k;
                const int64_t ahead = stage + 1 < stages ? depth * STEP : (then - left) * panel_size - k * STEP;
                for (int64_t block = top; block < bottom; ++block) {
                    const int64_t row = row_of(block), num = row_of(block + 1) - row;
                    const bool fetches = (stage + 1 < stages || then < num_panels) && num >= FETCHING_ROWS;
                    const int64_t begun = depth * (block - top) / (bottom - top);  // each block fetches a part
                    const int64_t steps = fetches ? depth * (block + 1 - top) / (bottom - top) - begun : 0;
                    const auto run = chosen<E>(num, together, HEIGHTS);
                    float* const c = sums + (row - row_of(top)) * PANEL;
                    for (int64_t panel = left; panel < right; panel += together ? strip : 1) {
                        const E* const piece = from_panel + panel * panel_size + k * STEP;
                        const Following coming = {reinterpret_cast<const char*>(piece + ahead + begun * STEP), steps};
                        run(rows + row * next + k, next, piece, panel_size, depth, coming,
                            c + (panel - held) * sums_next, sums_next, stage == 0 ? starts + row : nullptr);
                    }
                    if (stage + 1 < stages || (right - from) % least != 0) continue;
                    for (int64_t panel = std::min(left, right - least); panel < right; panel += least) {
                        const int64_t column = panel * PANEL, here = std::min<int64_t>(PANEL, d_out - column);
                        const auto worth = [&](int64_t at) {
                            return Worth<T>{scales ? scales + first + at : nullptr, bias ? bias + first + at : nullptr};
                        };
                        for (int64_t i = 0; i < num; ++i) {
                            const float* const of = c + (panel - held) * sums_next + i * PANEL;
                            T* const to = y + (row + i) * y_stride + column / least;
                            if (ending == Ending::gate) {
                                settle_gated(of, of + sums_next, worth(column), worth(column + PANEL),
                                             row_scales[row + i], to);
                            } else {
                                settle(of, worth(column), row_scales[row + i], to, here, ending == Ending::add);
                            }
                        }
                    }
                }
            }
        }
    }
}

}  // namespace
