// Vectors of floats as wide as the instruction set that this translation unit is compiled for, and the dtypes of storage.
//
// Compiled once for each instruction set, so nothing here may have external linkage: the linker would keep one of
// several versions, and run AVX-512 code on a machine that has none. Hence the unnamed namespace, and no standard
// containers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTFFN_INLINE [[gnu::always_inline]] inline

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

template <class S, int N>
struct VectorOf {
    typedef S type __attribute__((vector_size(sizeof(S) * N)));
};
using vf = VectorOf<float, W>::type;
using vi = VectorOf<std::int32_t, W>::type;
using vu = VectorOf<std::uint32_t, W>::type;
using vh = VectorOf<std::uint16_t, W>::type;
using vb = VectorOf<std::int8_t, W>::type;

// Storage dtypes, beside float and int8. Sums are always kept in float.
struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

FASTFFN_INLINE vf splat(float x) { return x - vf{}; }

template <class V>
FASTFFN_INLINE V load_raw(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

FASTFFN_INLINE vf widen_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// The bits of bfloat16 numbers, in lanes of 32.
FASTFFN_INLINE vu narrow_bits(vf v) {
    vu bits = (vu)v;
    // To nearest, ties to even; what is not a number stays so.
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vi nan = v != v;
    vu quiet = (bits >> 16) | 0x40u;
    return (vu)(((vi)rounded & ~nan) | ((vi)quiet & nan));
}
FASTFFN_INLINE vh narrow_bf16(vf v) { return __builtin_convertvector(narrow_bits(v), vh); }

#if defined(__AVX512F__)
FASTFFN_INLINE vf widen_f16(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
FASTFFN_INLINE vh narrow_f16(vf v) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__AVX2__)
FASTFFN_INLINE vf widen_f16(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
FASTFFN_INLINE vh narrow_f16(vf v) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
FASTFFN_INLINE float widen_f16(std::uint16_t h) {
    std::uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu, bits;
    if (magnitude >= 0x7c00u) {
        bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else {
        // Shifted into place the exponent is 112 too small; a product with 2^112 mends it, subnormals included.
        float value;
        std::uint32_t shifted = magnitude << 13;
        std::memcpy(&value, &shifted, 4);
        value *= 0x1p112f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

FASTFFN_INLINE std::uint16_t narrow_f16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u) {
        // Subnormal in half precision: adding 0.5 rounds at the right bit.
        float value;
        std::memcpy(&value, &magnitude, 4);
        value += 0.5f;
        std::uint32_t sum;
        std::memcpy(&sum, &value, 4);
        return static_cast<std::uint16_t>(sign | (sum - 0x3f000000u));
    }
    std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

FASTFFN_INLINE vf widen_f16(vh h) {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = widen_f16(static_cast<std::uint16_t>(h[i]));
    return v;
}
FASTFFN_INLINE vh narrow_f16(vf v) {
    vh h;
    for (int i = 0; i < W; ++i) h[i] = narrow_f16(static_cast<float>(v[i]));
    return h;
}
#endif

// (The compiler's own conversion goes by way of 16 bits and halves: four times as slow.)
#if defined(__AVX512F__)
FASTFFN_INLINE vf widen_i8(vb b) { return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b)); }
#elif defined(__AVX2__)
FASTFFN_INLINE vf widen_i8(vb b) {
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)b)));
}
#else
FASTFFN_INLINE vf widen_i8(vb b) { return __builtin_convertvector(__builtin_convertvector(b, vi), vf); }
#endif

FASTFFN_INLINE vf load(const float* p) { return load_raw<vf>(p); }
FASTFFN_INLINE vf load(const bfloat16* p) { return widen_bf16(load_raw<vh>(p)); }
FASTFFN_INLINE vf load(const float16* p) { return widen_f16(load_raw<vh>(p)); }
FASTFFN_INLINE vf load(const std::int8_t* p) { return widen_i8(load_raw<vb>(p)); }

FASTFFN_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
FASTFFN_INLINE void store(bfloat16* p, vf v) {
    vh h = narrow_bf16(v);
    std::memcpy(p, &h, sizeof h);
}
FASTFFN_INLINE void store(float16* p, vf v) {
    vh h = narrow_f16(v);
    std::memcpy(p, &h, sizeof h);
}

// Two vectors at a time, in the order that costs least: bfloat16 numbers come as the even ones and the odd ones, since
// either half of a 32-bit lane becomes a float by one instruction. What is summed in that order is stored by store_pair
// of the same dtype `R`; floats between the two (sums that are not finished) stay in it.
template <class R>
FASTFFN_INLINE void load_pair(const R* p, vf& a, vf& b) {
    a = load(p);
    b = load(p + W);
}
FASTFFN_INLINE void load_pair(const bfloat16* p, vf& a, vf& b) {
    const vu both = load_raw<vu>(p);
    a = (vf)(both << 16);
    b = (vf)(both & 0xffff0000u);
}
template <class R, class Y>
FASTFFN_INLINE void store_pair(Y* p, vf a, vf b) {
    store(p, a);
    store(p + W, b);
}
template <>
FASTFFN_INLINE void store_pair<bfloat16>(bfloat16* p, vf a, vf b) {
    const vu both = narrow_bits(a) | (narrow_bits(b) << 16);
    std::memcpy(p, &both, sizeof both);
}

// The first n < W elements, the others zero.
#if defined(__AVX512F__)
FASTFFN_INLINE vf load_part(const float* p, std::int64_t n) {
    return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
FASTFFN_INLINE void store_part(float* p, vf v, std::int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
}
#endif
template <class T>
FASTFFN_INLINE vf load_part(const T* p, std::int64_t n) {
    T padded[W] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(padded);
}
template <class T>
FASTFFN_INLINE void store_part(T* p, vf v, std::int64_t n) {
    T padded[W];
    store(padded, v);
    std::memcpy(p, padded, static_cast<std::size_t>(n) * sizeof(T));
}

// As load_part and store_part, without a call; n may be W.
#if defined(__AVX512F__)
FASTFFN_INLINE vf load_some(const float* p, std::int64_t n) {
    return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
FASTFFN_INLINE vh load_some_halves(const void* p, std::int64_t n) {
    return (vh)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
}
FASTFFN_INLINE vf load_some(const std::int8_t* p, std::int64_t n) {
    return widen_i8((vb)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p));
}
FASTFFN_INLINE vf load_some(const bfloat16* p, std::int64_t n) { return widen_bf16(load_some_halves(p, n)); }
FASTFFN_INLINE vf load_some(const float16* p, std::int64_t n) { return widen_f16(load_some_halves(p, n)); }
FASTFFN_INLINE void store_some(float* p, vf v, std::int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
}
FASTFFN_INLINE void store_some(bfloat16* p, vf v, std::int64_t n) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), (__m256i)narrow_bf16(v));
}
FASTFFN_INLINE void store_some(float16* p, vf v, std::int64_t n) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), (__m256i)narrow_f16(v));
}
#else
template <class T>
FASTFFN_INLINE vf load_some(const T* p, std::int64_t n) {
    return n >= W ? load(p) : load_part(p, n);
}
template <class T>
FASTFFN_INLINE void store_some(T* p, vf v, std::int64_t n) {
    n >= W ? store(p, v) : store_part(p, v, n);
}
#endif

template <class T>
FASTFFN_INLINE float load_one(const T* p) {
    return load_part(p, 1)[0];
}
template <>
FASTFFN_INLINE float load_one(const float* p) {
    return *p;
}

// Sum of the elements, halves first.
FASTFFN_INLINE float sum(vf v) {
#if defined(__AVX512F__)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    vf quarter = v;
#endif
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

FASTFFN_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

}  // namespace
