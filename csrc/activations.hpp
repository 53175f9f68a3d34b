// Activations and their derivatives, on whole vectors. Numbers agree with `ACTIVATIONS` of fastffn.ops.cpu.
#pragma once

#include "simd.hpp"

namespace {

enum class Activation : int { gelu, gelu_tanh, quick_gelu, relu, relu2, silu, tanh, sigmoid, linear };

// e^x, to about one unit in the last place; 0 below -87, where subnormal numbers begin.
FASTFFN_INLINE vf exponential(vf x) {
    vi tiny = x < splat(-87.0f);
    vf bounded = select(x > splat(88.5f), splat(88.5f), select(tiny, splat(-87.0f), x));
    // Adding 1.5 * 2^23 rounds to a whole number, which the low bits then hold.
    vf shifted = bounded * splat(1.44269504f) + splat(12582912.0f);
    vf whole = shifted - splat(12582912.0f);
    vf r = bounded - whole * splat(0.693359375f) - whole * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    vf scaled = (vf)((vu)p + ((vu)shifted << 23));
    vf result = select(tiny, vf{}, scaled);
    result = select(x > splat(88.5f), splat(__builtin_inff()), result);
    return select(x != x, x, result);
}

FASTFFN_INLINE vf logistic(vf x) { return splat(1.0f) / (splat(1.0f) + exponential(-x)); }

FASTFFN_INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// Near zero a polynomial: the difference of two numbers near one has few digits there.
FASTFFN_INLINE vf hyperbolic_tangent(vf x) {
    vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + splat(2.06390887954e-2f);
    p = p * z + splat(-5.37397155531e-2f);
    p = p * z + splat(1.33314422036e-1f);
    p = p * z + splat(-3.33332819422e-1f);
    vf near = p * z * x + x;
    return select(magnitude(x) < splat(0.625f), near, splat(2.0f) * logistic(2.0f * x) - splat(1.0f));
}

// The normal distribution function. erfc(t) = exp(-t^2) Q(u) with u = 1 / (1 + t / 2); Q is fitted to 2e-8 for t from
// 0 to 9.5, where float32 ends.
FASTFFN_INLINE vf normal_cdf(vf x) {
    vf t = magnitude(x) * splat(0.70710678f);
    vf u = splat(1.0f) / (splat(1.0f) + splat(0.5f) * t);
    vf q = splat(0.013848637230694294f);
    q = q * u + splat(-0.13160370290279388f);
    q = q * u + splat(0.4481569528579712f);
    q = q * u + splat(-0.6950446963310242f);
    q = q * u + splat(0.44149214029312134f);
    q = q * u + splat(-0.10880537331104279f);
    q = q * u + splat(0.22902420163154602f);
    q = q * u + splat(0.23793314397335052f);
    q = q * u + splat(0.28293806314468384f);
    q = q * u + splat(0.2820605933666229f);
    vf half_erfc = splat(0.5f) * q * u * exponential(-(splat(0.5f) * x * x));
    return select(x > vf{}, splat(1.0f) - half_erfc, half_erfc);
}

// 2 * sqrt(2 / pi), of the tanh form: 0.5 (1 + tanh(z)) is logistic(2 z).
constexpr float kTanhSlope = 1.5957691216f, kTanhCubic = 0.044715f;

FASTFFN_INLINE vf activate(Activation kind, vf x) {
    switch (kind) {
        case Activation::gelu: return x * normal_cdf(x);
        case Activation::gelu_tanh: return x * logistic(kTanhSlope * (x + kTanhCubic * x * x * x));
        case Activation::quick_gelu: return x * logistic(1.702f * x);
        // Comparisons in this direction let what is not a number pass.
        case Activation::relu: return select(x < vf{}, vf{}, x);
        case Activation::relu2: {
            vf positive = select(x < vf{}, vf{}, x);
            return positive * positive;
        }
        case Activation::silu: return x * logistic(x);
        case Activation::tanh: return hyperbolic_tangent(x);
        case Activation::sigmoid: return logistic(x);
        case Activation::linear: break;
    }
    return x;
}

FASTFFN_INLINE vf slope(Activation kind, vf x) {
    const vf one = splat(1.0f);
    switch (kind) {
        case Activation::gelu:
            return normal_cdf(x) + x * splat(0.39894228f) * exponential(-(splat(0.5f) * x * x));
        case Activation::gelu_tanh: {
            vf s = logistic(kTanhSlope * (x + kTanhCubic * x * x * x));
            return s + x * s * (one - s) * kTanhSlope * (one + 3.0f * kTanhCubic * x * x);
        }
        case Activation::quick_gelu: {
            vf s = logistic(1.702f * x);
            return s * (one + 1.702f * x * (one - s));
        }
        case Activation::relu: return select(x > vf{}, one, vf{});
        case Activation::relu2: return 2.0f * select(x < vf{}, vf{}, x);
        case Activation::silu: {
            vf s = logistic(x);
            return s * (one + x * (one - s));
        }
        case Activation::tanh: {
            // 1 - tanh^2, without a difference of numbers near one.
            vf e = exponential(-2.0f * magnitude(x)), both = one + e;
            return select(x != x, x, 4.0f * e / (both * both));
        }
        case Activation::sigmoid: {
            vf s = logistic(x);
            return s * (one - s);
        }
        case Activation::linear: break;
    }
    return one;
}

// Whole arrays; `to` may be `from`. The switch is outside the loop.
template <vf (*F)(Activation, vf), Activation Kind>
inline void over(const float* from, float* to, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, F(Kind, load(from + i)));
    if (i < n) store_part(to + i, F(Kind, load_part(from + i, n - i)), n - i);
}

template <vf (*F)(Activation, vf)>
inline void over(Activation kind, const float* from, float* to, std::int64_t n) {
    switch (kind) {
        case Activation::gelu: return over<F, Activation::gelu>(from, to, n);
        case Activation::gelu_tanh: return over<F, Activation::gelu_tanh>(from, to, n);
        case Activation::quick_gelu: return over<F, Activation::quick_gelu>(from, to, n);
        case Activation::relu: return over<F, Activation::relu>(from, to, n);
        case Activation::relu2: return over<F, Activation::relu2>(from, to, n);
        case Activation::silu: return over<F, Activation::silu>(from, to, n);
        case Activation::tanh: return over<F, Activation::tanh>(from, to, n);
        case Activation::sigmoid: return over<F, Activation::sigmoid>(from, to, n);
        case Activation::linear: return over<F, Activation::linear>(from, to, n);
    }
}

inline void activate_all(Activation kind, const float* from, float* to, std::int64_t n) {
    over<activate>(kind, from, to, n);
}
inline void slope_all(Activation kind, const float* from, float* to, std::int64_t n) {
    over<slope>(kind, from, to, n);
}

}  // namespace
