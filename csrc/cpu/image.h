// Images in memory (cf_image), with or without a border, and the step `gather`, which makes one.
//
// A 3x3 convolution reads a position's neighbours, and at an edge there are none. Instead of testing for edges in its
// inner loop, whoever writes an image that such a convolution will read writes a border of zeros around it: one
// position on every side. In 8 bits the border holds the code of zero.
//
// A step whose result products will read in 8 bits writes the codes itself (`Row`): numbers are quantised once, while
// they are in a register, and a quarter or half of the bytes is written.
#pragma once

#include <math.h>

#include "check.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_gather_args& a) {
    for (int i = 0; i < 2; ++i)
        if (!valid(a.parts[i]) || a.channels[i] < 0 || (a.channels[i] > 0 && !a.parts[i].data && a.n != 0))
            return false;
    const bool quantised = a.y.dtype == CF_UINT8;
    return (quantised || valid_activation(a.y.dtype)) && valid(a.quantisation, quantised) && valid(a.y, a.n) &&
           a.n >= 0 && a.height >= 1 && a.width >= 1 && a.from_height >= 1 && a.from_width >= 1 && a.y_scale >= 0 &&
           a.x_scale >= 0 && a.y_channels >= 1 && a.channels[0] + a.channels[1] <= a.y_channels;
}

struct Position {
    int64_t n, y, x;

    // In the order of memory.
    void next(int64_t height, int64_t width) {
        if (++x < width) return;
        x = 0;
        if (++y < height) return;
        y = 0;
        ++n;
    }
};

// The address of a position's channels, which take `pixel` bytes.
inline char* address(const cf_image& image, const Position& p, int64_t pixel) {
    return static_cast<char*>(image.data) + p.n * image.sample + (p.y + image.border) * image.row +
           (p.x + image.border) * pixel;
}

// Writes the border of sample n, if the image has one: `pixel` bytes a position, copies of `zero`, or 0 bytes if that
// is null.
inline void write_border(const cf_image& image, int64_t n, int64_t height, int64_t width, int64_t pixel,
                         const void* zero) {
    if (!image.border) return;
    char* origin = static_cast<char*>(image.data) + n * image.sample;
    const auto fill = [=](char* to, int64_t positions) {
        if (!zero) {
            memset(to, 0, static_cast<size_t>(positions * pixel));
            return;
        }
        for (int64_t i = 0; i < positions; ++i) memcpy(to + i * pixel, zero, static_cast<size_t>(pixel));
    };
    fill(origin, width + 2);
    fill(origin + (height + 1) * image.row, width + 2);
    for (int64_t y = 1; y <= height; ++y) {
        fill(origin + y * image.row, 1);
        fill(origin + y * image.row + (width + 1) * pixel, 1);
    }
}

// Stores the channels of one position as T or, quantised, as uint8: those from channel c on.
template <class T>
struct Row {
    T* y;
    cf_quantisation quantisation;  // not used
    void whole(int64_t c, vf value) const { store(y + c, value); }
    void part(int64_t c, vf value, int64_t count) const { store_part(y + c, value, count); }
    void some(int64_t c, vf value, int64_t count) const { store_some(y + c, value, count); }
};
template <>
struct Row<uint8_t> {
    uint8_t* y;
    cf_quantisation quantisation;
    void whole(int64_t c, vf value) const {
        write(value * load(quantisation.inverse + c), quantisation.zero + c, y + c);
    }
    void part(int64_t c, vf value, int64_t count) const {
        uint8_t zero[W] = {}, codes[W];
        memcpy(zero, quantisation.zero + c, static_cast<size_t>(count));
        write(value * load_some(quantisation.inverse + c, count), zero, codes);
        memcpy(y + c, codes, static_cast<size_t>(count));
    }
    void some(int64_t c, vf value, int64_t count) const { count == W ? whole(c, value) : part(c, value, count); }

    // W codes of numbers that were divided by the step sizes.
    static void write(vf value, const uint8_t* zero, uint8_t* to) {
#if CF_WIDTH == 16
        // The conversion makes INT32_MIN of what an int32 cannot hold. That is right for small values and NaN, which
        // become 0 in the end; large ones are cut before it. (Of a number and NaN, min gives the second.)
        const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(255), (__m512)value));
        const __m512i shifted =
            _mm512_add_epi32(q, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero))));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm512_cvtusepi32_epi8(_mm512_max_epi32(shifted, _mm512_setzero_si512())));
#elif CF_WIDTH == 8
        // likewise; the sum, below 511, is cut to 0 ... 255 as it becomes 16 bits, and then 8
        const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(255), (__m256)value));
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero));
        const __m256i shifted = _mm256_add_epi32(q, _mm256_cvtepu8_epi32(codes));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
        for (int64_t i = 0; i < W; ++i) {
            const float q = nearbyintf(value[i]) + static_cast<float>(zero[i]);
            to[i] = static_cast<uint8_t>(q > 255 ? 255 : (q > 0 ? q : 0));  // NaN is not > 0
        }
#endif
    }
};

// f(T{}) for the type that a result is stored as: uint8 if it is quantised, else `Own`.
template <class Own, class F>
inline int with_stored(const cf_quantisation& quantisation, const F& f) {
    return quantisation.inverse ? f(uint8_t{}) : f(Own{});
}

// The position of an image of `size` that is nearest to position i of the resized one.
inline int64_t nearest(int64_t i, double scale, int64_t size) {
    return min(static_cast<int64_t>(static_cast<float>(i) * static_cast<float>(scale)), size - 1);
}

// Writes one row of y's positions, at `to`, from channel `offset` on: the channels of the row of sample n of a part
// that is nearest to row y.
template <class S, class T>
inline void gather_row(const cf_gather_args& a, int part, int64_t n, int64_t y, T* to, int64_t offset) {
    const cf_tensor4& t = a.parts[part];
    const S* from =
        static_cast<const S*>(t.data) + n * t.strides[0] + nearest(y, a.y_scale, a.from_height) * t.strides[2];
    for (int64_t x = 0; x < a.width; ++x) {
        const S* position = from + nearest(x, a.x_scale, a.from_width) * t.strides[3];
        const Row<T> row{to + x * a.y_channels, a.quantisation};
        int64_t c = 0;
        if (t.strides[1] == 1)
            for (; c + W <= a.channels[part]; c += W) row.whole(offset + c, load(position + c));
        // also every channel of a contiguous tensor, whose channels are far apart: the inputs of a network, which have
        // few
        for (; c < a.channels[part]; ++c) row.part(offset + c, broadcast(to_float(position[c * t.strides[1]])), 1);
    }
}

template <class T>
int gather_typed(const cf_gather_args& a, int64_t threads) {
    const int64_t pixel = a.y_channels * static_cast<int64_t>(sizeof(T)), used = a.channels[0] + a.channels[1];
    parallel_for(a.n * a.height, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / a.height, y = item % a.height;
            T* to = reinterpret_cast<T*>(address(a.y, {n, y, 0}, pixel));
            for (int part = 0; part < 2; ++part) {
                if (!a.channels[part]) continue;
                with_type(a.parts[part].dtype, [&](auto type) {
                    gather_row<decltype(type)>(a, part, n, y, to, part ? a.channels[0] : 0);
                    return 0;
                });
            }
            // channels that a convolution reads only because it reads four bytes at a time
            const size_t rest = static_cast<size_t>(a.y_channels - used) * sizeof(T);
            for (int64_t x = 0; x < a.width && rest; ++x) {
                T* unused = to + x * a.y_channels + used;
                if (a.quantisation.zero)
                    memcpy(unused, a.quantisation.zero + used, rest);
                else
                    memset(unused, 0, rest);
            }
            if (y == 0) write_border(a.y, n, a.height, a.width, pixel, a.quantisation.zero);
        }
    });
    return CF_OK;
}

inline int gather(const cf_gather_args& a, int64_t threads) {
    if (a.y.dtype == CF_UINT8) return gather_typed<uint8_t>(a, threads);
    return with_activation(a.y.dtype, [&](auto type) { return gather_typed<decltype(type)>(a, threads); });
}

}  // namespace
}  // namespace cf
