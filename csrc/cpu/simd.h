// One vector type, W floats wide, and its loads and stores from float32, float16 and bfloat16.
#pragma once

#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "runtime.h"

#if defined(__AVX512F__)
#define CF_WIDTH 16
#elif defined(__AVX2__)
#define CF_WIDTH 8
#else
#define CF_WIDTH 4
#endif

namespace cf {
namespace {

constexpr int W = CF_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

inline vf broadcast(float value) { return vf{} + value; }

inline vh load_bits(const void* p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const bfloat* p) { return (vf)(__builtin_convertvector(load_bits(p), vu) << 16); }

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// To the nearest, ties to even; a NaN stays one.
inline void store(bfloat* p, vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (bits >> 16) | 0x40;
    const vh out = __builtin_convertvector(v == v ? rounded : nan, vh);
    memcpy(p, &out, sizeof out);
}

#if defined(__F16C__)
inline float to_float(half h) { return _cvtsh_ss(h.bits); }
inline half to_half(float f) { return {static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))}; }
#else
inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}
inline float to_float(half h) {
    const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // 2^112 moves the exponent from half's bias to float's, subnormal numbers included
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline half to_half(float f) {
    const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) {
        out = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
        out = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
        out = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
        out = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | out)};
}
#endif
inline float to_float(float f) { return f; }
inline float to_float(bfloat b) {
    const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#if CF_WIDTH == 16
inline vf load(const half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(half* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif CF_WIDTH == 8
inline vf load(const half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(half* p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vf load(const half* p) {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
    return v;
}
inline void store(half* p, vf v) {
    for (int i = 0; i < W; ++i) p[i] = to_half(v[i]);
}
#endif

// The first `count` < W elements; the rest are 0.
template <class T>
inline vf load_part(const T* p, int64_t count) {
    T padded[W] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_part(T* p, vf v, int64_t count) {
    T padded[W];
    store(padded, v);
    memcpy(p, padded, count * sizeof(T));
}

// Past the caches, where the hardware can and the address allows it (a multiple of the vector's size in memory).
template <class T>
inline void store_streaming(T* p, vf v) {
    store(p, v);
}
#if CF_WIDTH == 16
template <>
inline void store_streaming(float* p, vf v) {
    _mm512_stream_ps(p, (__m512)v);
}
template <>
inline void store_streaming(bfloat* p, vf v) {
    bfloat padded[W];
    store(padded, v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)load_bits(padded));
}
template <>
inline void store_streaming(half* p, vf v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif CF_WIDTH == 8
template <>
inline void store_streaming(float* p, vf v) {
    _mm256_stream_ps(p, (__m256)v);
}
#endif

inline void end_streaming() {
#if CF_WIDTH >= 8
    _mm_sfence();
#endif
}

inline float sum(vf v) {
#if CF_WIDTH == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[W];
    store(lanes, v);
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}

// e^x to about one ulp: 2^n e^r with |r| <= ln(2) / 2 and e^r by its Taylor series. Arguments are clamped to where the result is a normal
// number; NaN stays NaN.
inline vf exponential(vf x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    x = x > 88.0f ? broadcast(88.0f) : x;
    const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part is in the low bits
    const vf n = shifted - 12582912.0f;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vf)(((vi)shifted << 23) + 0x3f800000);
}

inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

inline float element(const cf_vector& v, int64_t i) {
    switch (v.dtype) {
        case CF_FLOAT16:
            return to_float(static_cast<const half*>(v.data)[i]);
        case CF_BFLOAT16:
            return to_float(static_cast<const bfloat*>(v.data)[i]);
        default:
            return static_cast<const float*>(v.data)[i];
    }
}

template <class T>
void widen(const T* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

// `count` elements from `offset` on, as floats.
inline void widen(const cf_vector& v, int64_t offset, float* to, int64_t count) {
    switch (v.dtype) {
        case CF_FLOAT16:
            return widen(static_cast<const half*>(v.data) + offset, to, count);
        case CF_BFLOAT16:
            return widen(static_cast<const bfloat*>(v.data) + offset, to, count);
        default:
            memcpy(to, static_cast<const float*>(v.data) + offset, count * sizeof(float));
    }
}

// f(T{}) for the C++ type T of a dtype.
template <class F>
inline int with_type(int64_t dtype, const F& f) {
    switch (dtype) {
        case CF_FLOAT16:
            return f(half{});
        case CF_BFLOAT16:
            return f(bfloat{});
        default:
            return f(float{});
    }
}

// body(begin, end) over a partition of [0, items).
template <class F>
inline void parallel_for(int64_t items, int64_t threads, const F& body) {
    parallel_ranges(
        items, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&body));
}

}  // namespace
}  // namespace cf
