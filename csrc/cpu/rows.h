// Steps that go through rows one at a time: `layer_norm`, `gate` (of GEGLU), `pointwise`, `modulate` and
// `replace_zero_rows`. A new
// step of this kind is a line of CF_STEPS and its struct in abi.h, and a function here.
//
// All of them are bound by memory: a few operations an element, each element read once and written once (layer_norm
// reads a row three times, of which the second and third find it in the first-level cache). So there is nothing to
// block. A row, or for `pointwise` a vector, is an item of work, and what counts is to have few such steps: the
// recorder folds scales, shifts and residuals into the step before them where it can. What products will read in 8
// bits, layer_norm and gate write as such.
#pragma once

#include <math.h>

#include "check.h"
#include "image.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

// f(c, value, count) for every vector of `channels` numbers; the last may have fewer than W.
template <class T, class F>
inline void each_vector(const T* x, int64_t channels, const F& f) {
    int64_t c = 0;
    for (; c + W <= channels; c += W) f(c, load(x + c), W);
    if (c < channels) f(c, load_part(x + c, channels - c), channels - c);
}

// body(row) for all rows, shared by threads.
template <class F>
inline int each_row(int64_t rows, int64_t threads, const F& body) {
    parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row);
    });
    return CF_OK;
}

// ---- layer_norm

inline bool valid(const cf_layer_norm_args& a) {
    return valid_activation(a.dtype) && a.rows >= 0 && a.channels >= 1 && a.weight && a.bias && a.eps >= 0 &&
           valid(a.quantisation) && ((a.x && a.y) || a.rows == 0);
}

template <class T, class Y>
int layer_norm_typed(const cf_layer_norm_args& a, int64_t threads) {
    return each_row(a.rows, threads, [&](int64_t r) {
        const T* x = static_cast<const T*>(a.x) + r * a.channels;
        vf total = {}, squares = {};
        each_vector(x, a.channels, [&](int64_t, vf value, int64_t) { total += value; });
        const float mean = sum(total) / static_cast<float>(a.channels);
        // squares of deviations, not E[x^2] - E[x]^2, which cancels where the mean is large
        each_vector(x, a.channels, [&](int64_t, vf value, int64_t count) {
            vf d = value - mean;
            for (int64_t i = count; i < W; ++i) d[i] = 0;
            squares = fma(d, d, squares);
        });
        const float inverse = 1 / sqrtf(sum(squares) / static_cast<float>(a.channels) + static_cast<float>(a.eps));
        const Row<Y> y{static_cast<Y*>(a.y) + r * a.channels, a.quantisation};
        each_vector(x, a.channels, [&](int64_t c, vf value, int64_t count) {
            const vf weight = load_some(a.weight + c, count), bias = load_some(a.bias + c, count);
            y.some(c, fma((value - mean) * inverse, weight, bias), count);
        });
    });
}

inline int layer_norm(const cf_layer_norm_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto x) {
        return with_stored<decltype(x)>(a.quantisation,
                                        [&](auto y) { return layer_norm_typed<decltype(x), decltype(y)>(a, threads); });
    });
}

// ---- functions of single numbers, and gate

inline bool valid_function(int64_t function) { return function >= CF_IDENTITY && function <= CF_SIGMOID; }

inline bool valid(const cf_gate_args& a) {
    return valid_activation(a.dtype) && valid_function(a.function) && a.rows >= 0 && a.channels >= 1 &&
           valid(a.quantisation) && ((a.value && a.gate && a.y) || a.rows == 0);
}

// x (1 + erf(x / sqrt(2))) / 2, with erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
inline vf gelu(vf x) {
    const vf z = x * 0.70710678f, size = z < 0.0f ? -z : z, t = 1.0f / fma(size, broadcast(0.3275911f), 1.0f);
    vf p = broadcast(1.061405429f);
    p = fma(p, t, -1.453152027f);
    p = fma(p, t, 1.421413741f);
    p = fma(p, t, -0.284496736f);
    p = fma(p, t, 0.254829592f);
    const vf rest = p * t * exponential(-size * size), erf = z < 0.0f ? rest - 1.0f : 1.0f - rest;
    return 0.5f * x * (1.0f + erf);
}

// For |x| < 0.625 by Cephes' polynomial, else (1 - e) / (1 + e) with e = e^(-2 |x|), which would cancel near 0. NaN
// stays NaN.
inline vf hyperbolic_tangent(vf x) {
    const vf size = x < 0.0f ? -x : x, z = x * x, e = exponential(-2.0f * size);
    vf p = broadcast(-5.70498872745e-3f);
    p = fma(p, z, 2.06390887954e-2f);
    p = fma(p, z, -5.37397155531e-2f);
    p = fma(p, z, 1.33314422036e-1f);
    p = fma(p, z, -3.33332819422e-1f);
    const vf large = (1.0f - e) / (1.0f + e);
    return size < 0.625f ? fma(p * z, x, x) : (x < 0.0f ? -large : large);
}

// One of cf_function.
inline vf apply(int64_t function, vf x) {
    switch (function) {
        case CF_SILU:
            return silu(x);
        case CF_TANH:
            return hyperbolic_tangent(x);
        case CF_RELU:
            return x > 0.0f ? x : (x == x ? vf{} : x);  // NaN stays NaN
        case CF_GELU:
            return gelu(x);
        case CF_GELU_TANH:
            return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * fma(0.044715f * x * x, x, x)));
        case CF_SIGMOID: {
            const vf e = exponential(x < 0.0f ? x : -x), p = 1.0f / (1.0f + e);
            return x < 0.0f ? e * p : p;
        }
        default:
            return x;
    }
}

template <class T, class Y>
int gate_typed(const cf_gate_args& a, int64_t threads) {
    return each_row(a.rows, threads, [&](int64_t r) {
        const T* value = static_cast<const T*>(a.value) + r * a.value_stride;
        const Row<Y> y{static_cast<Y*>(a.y) + r * a.channels, a.quantisation};
        each_vector(static_cast<const T*>(a.gate) + r * a.gate_stride, a.channels, [&](int64_t c, vf g, int64_t count) {
            y.some(c, load_some(value + c, count) * apply(a.function, g), count);
        });
    });
}

inline int gate(const cf_gate_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto x) {
        return with_stored<decltype(x)>(a.quantisation,
                                        [&](auto y) { return gate_typed<decltype(x), decltype(y)>(a, threads); });
    });
}

// ---- pointwise

inline bool valid(const cf_pointwise_args& a) {
    return valid_activation(a.dtype) && a.count >= 0 && valid_function(a.function) && ((a.x && a.y) || a.count == 0);
}

template <class T>
int pointwise_typed(const cf_pointwise_args& a, int64_t threads) {
    const vf x_scale = broadcast(static_cast<float>(a.x_scale)), x_shift = broadcast(static_cast<float>(a.x_shift));
    const vf y_scale = broadcast(static_cast<float>(a.y_scale)), y_shift = broadcast(static_cast<float>(a.y_shift));
    // vectors, so that a thread's range begins at a multiple of W and an element is computed alike whatever the ranges
    parallel_for(ceil_div(a.count, W), threads, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * W, stop = min(end * W, a.count);
        const T *x = static_cast<const T*>(a.x) + first,
                *residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
        T* y = static_cast<T*>(a.y) + first;
        each_vector(x, stop - first, [&](int64_t c, vf value, int64_t count) {
            value = fma(apply(a.function, fma(value, x_scale, x_shift)), y_scale, y_shift);
            if (residual) value += load_some(residual + c, count);
            store_some(y + c, value, count);
        });
    });
    return CF_OK;
}

inline int pointwise(const cf_pointwise_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto type) { return pointwise_typed<decltype(type)>(a, threads); });
}

// ---- modulate

inline bool valid(const cf_modulate_args& a) {
    return valid_activation(a.dtype) && a.n >= 0 && a.spatial >= 1 && a.channels >= 1 && valid(a.scale) &&
           valid(a.shift) && ((a.x && a.y) || a.n == 0);
}

// `count` numbers of a vector of any dtype, which may be missing.
inline vf numbers(const cf_vector& v, int64_t first, int64_t count, float missing) {
    if (!v.data) return broadcast(missing);
    if (v.dtype == CF_FLOAT32) return load_some(static_cast<const float*>(v.data) + first, count);
    if (v.dtype == CF_BFLOAT16) return load_some(static_cast<const bfloat*>(v.data) + first, count);
    return load_some(static_cast<const half*>(v.data) + first, count);
}

template <class T>
int modulate_typed(const cf_modulate_args& a, int64_t threads) {
    const float plus = a.scale.data ? static_cast<float>(a.plus) : 0.0f;
    return each_row(a.n * a.spatial, threads, [&](int64_t r) {
        const int64_t n = r / a.spatial;
        T* y = static_cast<T*>(a.y) + r * a.channels;
        each_vector(static_cast<const T*>(a.x) + r * a.channels, a.channels, [&](int64_t c, vf value, int64_t count) {
            const vf scale = numbers(a.scale, n * a.scale_stride + c, count, 1.0f) + plus;
            store_some(y + c, fma(value, scale, numbers(a.shift, n * a.shift_stride + c, count, 0.0f)), count);
        });
    });
}

inline int modulate(const cf_modulate_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto type) { return modulate_typed<decltype(type)>(a, threads); });
}

// ---- replace_zero_rows

inline bool valid(const cf_replace_zero_rows_args& a) {
    return a.rows >= 0 && a.channels >= 1 && a.row && ((a.x && a.y) || a.rows == 0);
}

inline int replace_zero_rows(const cf_replace_zero_rows_args& a, int64_t threads) {
    return each_row(a.rows, threads, [&](int64_t r) {
        const float* x = a.x + r * a.channels;
        bool zero = true;
        for (int64_t c = 0; c < a.channels; ++c) zero = zero && x[c] == 0;
        memcpy(a.y + r * a.channels, zero ? a.row : x, static_cast<size_t>(a.channels) * sizeof(float));
    });
}

}  // namespace
}  // namespace cf
