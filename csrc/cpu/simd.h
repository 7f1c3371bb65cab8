// Vectors of W floats, for the instruction set that the including file is compiled for: loads and stores of float32,
// float16 and bfloat16, and the functions that kernels apply to them. All arithmetic is in float32.
//
// The vectors are GCC's vector extension, which clang has too, so +, * and comparisons need no intrinsics and the
// portable build needs no second version of a kernel. Intrinsics are used where the extension has no word for an
// instruction.
#pragma once

#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../abi.h"

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

// C++17 has no 16-bit floats. Types of their own, rather than uint16_t, choose the right load and store.
struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

// Not those of <algorithm>: see isa.h on library headers.
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Minus zero, for a subtraction of it changes nothing, so that a compiler leaves it out and broadcasts from memory. An
// addition of zero makes +0 of -0, and is computed.
inline vf broadcast(float value) { return value - vf{}; }

// a * b + c, rounded once where the processor can. The compiler is told not to fuse by itself (-ffp-contract=off): it
// would fuse in one loop and not in the next, and results would depend on how many channels a thread has.
inline vf fma(vf a, vf b, vf c) {
#if CF_WIDTH == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif CF_WIDTH == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline vf fma(vf a, vf b, float c) { return fma(a, b, broadcast(c)); }

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

// A bfloat16 is the upper half of a float.
#if CF_WIDTH == 16
inline vf load(const bfloat* p) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)load_bits(p)), 16); }
#else
inline vf load(const bfloat* p) { return (vf)(__builtin_convertvector(load_bits(p), vu) << 16); }
#endif

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// To bfloat16: to the nearest, ties to even; NaN stays NaN.
inline vh round_to_bfloat(vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (bits >> 16) | 0x40;  // the bits that say NaN may all be in the half that is cut off
    const vu chosen = v == v ? rounded : nan;
#if CF_WIDTH == 16
    return (vh)_mm512_cvtepi32_epi16((__m512i)chosen);
#else
    return __builtin_convertvector(chosen, vh);
#endif
}

// The same by the processor's instruction, where there is one; it takes subnormal numbers for 0.
inline vh narrow(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    return round_to_bfloat(v);
#endif
}

inline void store(bfloat* p, vf v) {
    const vh out = narrow(v);
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
    // times 2^112, which moves the exponent from half's bias (15) to float's (127), also that of subnormal numbers
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
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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

// The same for `count` <= W.
template <class T>
inline vf load_some(const T* p, int64_t count) {
    return count == W ? load(p) : load_part(p, count);
}
template <class T>
inline void store_some(T* p, vf v, int64_t count) {
    count == W ? store(p, v) : store_part(p, v, count);
}

// Stores that go past the caches, where the processor has them; p must be a multiple of the vector's size in memory. An
// ordinary store reads the line from memory before it writes to it, which is wasted on a result that is larger than the
// caches.
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
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v));
}
template <>
inline void store_streaming(half* p, vf v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif CF_WIDTH == 8
template <>
inline void store_streaming(float* p, vf v) {
    _mm256_stream_ps(p, (__m256)v);
}
#endif

// Streaming stores are not ordered with others: to be called before another thread is told that the results are there.
inline void end_streaming() {
#if CF_WIDTH >= 8
    _mm_sfence();
#endif
}

// The sum of the lanes, by halves: the order is the same in every call.
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

// The first halves of two vectors side by side, and the second ones.
inline vf first_halves(vf a, vf b) {
#if CF_WIDTH == 16
    return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
#elif CF_WIDTH == 8
    return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
#else
    return vf{a[0], a[1], b[0], b[1]};
#endif
}
inline vf second_halves(vf a, vf b) {
#if CF_WIDTH == 16
    return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
#elif CF_WIDTH == 8
    return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
#else
    return vf{a[2], a[3], b[2], b[3]};
#endif
}

// a > b ? a : b in every lane: b where one of them is NaN.
inline vf larger(vf a, vf b) {
#if CF_WIDTH == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif CF_WIDTH == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The largest lane of a vector without NaN.
inline float largest(vf v) {
#if CF_WIDTH == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < W; ++i) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// 2^t for -126 <= t <= 126, as 2^n 2^r with n an integer and |r| <= 1/2; 2^r by the polynomial of the least relative
// error, 2e-9.
inline vf power_of_two(vf t) {
    // a float as large as 1.5 * 2^23 has no bits behind the point: the addition rounds, and leaves the integer in the
    // low bits
    const vf shifted = t + 12582912.0f;
    const vf r = t - (shifted - 12582912.0f);
    vf p = broadcast(1.5345811e-4f);
    p = fma(p, r, 1.3399931e-3f);
    p = fma(p, r, 9.6184891e-3f);
    p = fma(p, r, 5.5503286e-2f);
    p = fma(p, r, 2.4022646e-1f);
    p = fma(p, r, 6.9314718e-1f);
    p = fma(p, r, 1.0f);
    return p * (vf)(((vi)shifted << 23) + 0x3f800000);  // 2^n, written as an exponent
}

// e^x for x <= 0, to two ulps, and 0 below e^-87; NaN stays NaN.
inline vf exponential(vf x) {
    const vf t = x * 1.44269504f;
    const vi tiny = t < -126.0f;
    return tiny ? vf{} : power_of_two(tiny ? broadcast(-126.0f) : t);
}

// x * sigmoid(x) = x / (1 + 2^t) with t = -x log2(e), to one or two ulps of the result (of 0.1, where it is smaller).
// NaN stays NaN.
inline vf silu(vf x) {
#if CF_WIDTH == 16
    // 2^t = 2^floor(n) 2^(n - floor(n)) 2^r with n a multiple of 1/16: a shift of the exponent, a table of 16 entries,
    // which is one register, and a polynomial that is short because |r| <= 1/32
    static const float table[16] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                    1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
    // the smaller of |x| and 100, with x's sign: beyond, 2^t is 0 or inf
    const vf near = (vf)_mm512_range_ps((__m512)x, _mm512_set1_ps(100), 2);
    const vf scale = broadcast(-1.44269504f);
    const vf shifted = fma(near, scale, 786432.0f);  // 1.5 * 2^19: the last bit is worth 1/16
    const vf n = shifted - 786432.0f, r = fma(near, scale, -n);
    const vf step = (vf)_mm512_permutexvar_ps((__m512i)shifted, _mm512_loadu_ps(table));
    const vf p = fma(fma(broadcast(5.5504109e-2f), r, 2.4022651e-1f), r, 6.9314718e-1f) * r;
    return x / (1.0f + (vf)_mm512_scalef_ps((__m512)fma(step, p, step), (__m512)n));
#else
    vf t = x * -1.44269504f;
    t = t < -126.0f ? broadcast(-126.0f) : t;
    t = t > 126.0f ? broadcast(126.0f) : t;
    return x / (1.0f + power_of_two(t));
#endif
}

// Element i of a vector of any dtype.
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

// to[i] = from[i] for `count` elements.
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

// f(T{}) for the C++ type T of a dtype, which may be any.
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

// The same for what steps hand to each other: float32 or bfloat16.
template <class F>
inline int with_activation(int64_t dtype, const F& f) {
    if (dtype == CF_FLOAT32) return f(float{});
    if (dtype == CF_BFLOAT16) return f(bfloat{});
    return CF_INVALID_ARGUMENT;
}

}  // namespace
}  // namespace cf
