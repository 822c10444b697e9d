// Vectors of as many floats as this kind of processor has, what is done with them, and memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MULTIPLIES_PAIRS  // of bfloat16, by itself
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

// The last few, and zeros after them.
template <class T>
inline Vec rest(const T* p, int64_t num) {
    T some[W] = {};
    if (num > 0) std::memcpy(some, p, std::min<int64_t>(num, W) * sizeof(T));
    return load(some);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// To the nearest, ties to even; what is no number stays none.
#if defined(__AVX512BF16__)
inline void store(bf16* p, Vec v) {  // what is too small for a normal number becomes zero
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void store(bf16* p, Vec v) {
    const bfloat16x4_t h = vcvt_bf16_f32((float32x4_t)v);
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

// A product as it is, and not as the first half of a fused one: which of them a compiler makes depends on where it is asked,
// and bits must not.
inline Vec unfused(Vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// Half of a vector's lanes with the other half, again and again: sums and peaks in an order of their own.
#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }

inline float highest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }

inline bool exceeds(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }
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

inline bool exceeds(Vec a, Vec b) {
    const Int larger = a > b;
    int any = 0;
    for (int i = 0; i < W; ++i) any |= larger[i];
    return any != 0;
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

// The same, as nearly as what is rounded to such numbers needs it.
template <class T>
inline Vec exponential_for(Vec x) {
    return exponential(x);
}

#if defined(__AVX512BF16__)
template <>
inline Vec exponential_for<bf16>(Vec x) {  // to within 3e-6 of itself
    const __m512 power = (__m512)(x * all(1.44269504089f));
    const Vec r = (Vec)_mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // what is left of a whole
    const Vec p = (((all(0.0134267183f) * r + all(0.0522424206f)) * r + all(0.241280228f)) * r + all(0.693044841f)) * r;
    return (Vec)_mm512_scalef_ps((__m512)(p + all(1.0f)), power);
}
#endif

// What the middle of an MLP takes of its gate and of what that lets through.
template <class T>
inline Vec gated(Vec gate, Vec up) {
    return gate / (all(1.0f) + exponential_for<T>(-gate)) * up;
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class E>
using Array = std::unique_ptr<E[], Free>;

template <class E>
Array<E> array(int64_t n) {
    return Array<E>(static_cast<E*>(std::aligned_alloc(64, (n * sizeof(E) + 63) / 64 * 64)));
}

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

}  // namespace
