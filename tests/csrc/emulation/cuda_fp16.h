// Conversions only: arithmetic is in float. Rounds to nearest even; a NaN becomes 0x7fff, as on a device.
#pragma once
#include "emulation.h"

struct __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half half;
typedef __half2 half2;

inline __half __float2half_rn(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000, x = __float_as_uint(value) & 0x7fffffff;
    unsigned h;
    if (x > 0x7f800000)
        return {0x7fff};
    else if (x >= 0x477ff000)  // 65520, half-way from the largest number to 65536
        h = 0x7c00;
    else if (x < 0x38800000)  // subnormal: the unit of a number in [1/2, 1) is 2^-24
        h = __float_as_uint(__uint_as_float(x) + 0.5f) - __float_as_uint(0.5f);
    else
        h = (x - (112u << 23) + 0xfff + (x >> 13 & 1)) >> 13;
    return {static_cast<unsigned short>(sign | h)};
}

inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 0x3ffu;
    if (exponent == 0) return copysignf(static_cast<float>(mantissa) * 0x1p-24f, __uint_as_float(sign));
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
