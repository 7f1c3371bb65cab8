// The step `convolution`: 1x1 or 3x3, with bias, residual and ReLU, in float32, bfloat16 or 8 bits. A linear layer is
// one, too.
//
// It is a matrix product, (positions, taps * channels) by (taps * channels, outputs), whose left matrix is never made:
// its row of a position lies in the image already, in as many pieces as the kernel has rows (the three taps of a
// kernel's row are neighbours in memory).
//
// Inner loop (multiply_tile). A tile is M positions by V vectors of outputs, and all its sums stay in registers from
// the first channel to the last. Each turn takes four bytes of channels, which are one float32, two bfloat16 or four
// uint8: it broadcasts those of M positions, loads V vectors of weights, and adds M * V products. What has to be loaded
// for a product falls with the size of the tile:
//
//     AVX-512   6 x 4: 10 loads for 24 products; 24 sums + 4 weights + 1 broadcast = 29 of 32 registers
//     AVX2      6 x 2:  8 loads for 12 products; 12 sums + 2 weights + 1 broadcast = 15 of 16 registers
//
// 8-bit integers reach 1.7 to 2.1 times the products of float32 by VPMADDUBSW, in vectors of both widths, and 3.4 to
// 3.9 times by VPDPBUSD in AVX2's (layers of 80 channels and more, one thread of an AMD EPYC "Turin", Zen 5).
//
// Weights are packed once, in the order in which the loop reads them (cf_convolution_args in abi.h). The vectors of
// outputs form blocks of up to MAX_VECTORS, as equal as can be: 5 vectors are 3 + 2, not 4 + 1, whose last tile would
// load 7 times for 6 products.
//
// Outer loops. Threads share tiles and blocks as share.h says. Weights and image both want to stay in a cache, and only
// one of the two can be walked once. If the image is larger, a thread takes X_IN_CACHE bytes of its positions through
// all of its blocks of weights before it goes on. Else it takes each block through all of its positions, and reads
// every weight once.
//
// What was tried, as time against the code below (3x3 convolutions of m, 128 channels at 32x32 and 256 at 16x16 and
// 8x8, batches 1 to 64, and of 80 channels at 32x32; caches warm, one thread of an AMD EPYC with AVX-512, where the
// code below computes 490 to 560 GFLOP/s in bfloat16 and 250 to 280 in float32; medians of the ratios of runs in turn):
//
//     tiles of 8 x 3, 11 loads for 24 products     0.96 to 1.01 in bfloat16, 1.00 to 1.06 in float32
//     tiles of 8 x 4, whose sums do not fit        1.01 to 1.12 in bfloat16, 1.02 to 1.14 in float32
//     tiles of 4 x 4, 8 loads for 16 products      1.00 to 1.03, but 1.11 to 1.19 for 80 channels
//     blocks of 4 + 1 vectors for 80 channels      1.11 to 1.13
//     each of 9 taps as a piece of its own, 400 KiB instead of 200, or always sharing the weights: no difference
//
// With AVX2, on Zen 5, where the code below reaches the peak (float32; ratios of the shortest times):
//
//     tiles of 4 x 3, which take all registers     0.98 to 1.03, but 1.34 for 4 outputs, where one vector is all
//     broadcasts by an addition (see `broadcast`)  1.07 to 1.17 with tiles of 4 x 3; 1.3 in attention
//
// The order in which a sum is added depends on the shape of the weights alone. So the bits of a picture depend neither
// on its batch nor on the number of threads.
//
// 3x3 convolutions with stride 1 have other forms with fewer multiplications: winograd.h.
#pragma once

#include "check.h"
#include "image.h"
#include "rows.h"
#include "share.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_convolution_args& a) {
    const bool integers = a.x.dtype == CF_UINT8, quantised = a.y.dtype == CF_UINT8;
    const int64_t size = integers ? 1 : (a.x.dtype == CF_BFLOAT16 ? 2 : 4);
    return (integers || valid_activation(a.x.dtype)) &&
           (a.x.dtype == CF_FLOAT32 ? quantised || a.y.dtype == CF_FLOAT32
                                    : quantised || valid_activation(a.y.dtype)) &&
           valid(a.quantisation, quantised) && valid(a.x, a.n) && valid(a.y, a.n) && a.n >= 0 && a.height >= 1 &&
           a.width >= 1 && a.channels >= 1 && a.channels * size % 4 == 0 && a.outputs >= 1 &&
           (a.taps == 1 || (a.taps == 9 && a.x.border == 1)) &&
           (a.form == CF_DIRECT ? !a.doubling
                                : (a.form == CF_WINOGRAD_2 || a.form == CF_WINOGRAD_4) && !integers && !quantised &&
                                      a.taps == 9 && a.stride == 1 && a.padding == 1) &&
           a.stride >= 1 && (a.padding == 0 || (a.padding == 1 && a.taps == 9)) && a.weight && integers == !!a.scale &&
           (!a.residual.data || (valid(a.residual, a.n) &&
                                 (quantised ? valid_activation(a.residual.dtype) : a.residual.dtype == a.y.dtype))) &&
           (!a.gated || (a.taps == 1 && !a.relu && !a.row && !a.residual.data && valid_function(a.function))) &&
           (!integers || a.channels * a.taps <= INT32_MAX / (255 * 128));  // a sum of more might not fit
}

// The largest tile. MAX_VECTORS is part of the packed weights: see cf_convolution_args.
constexpr int MAX_POSITIONS = W == 4 ? 4 : 6, MAX_VECTORS = W == 16 ? 4 : (W == 8 ? 2 : 3);
// Bytes of an image that stay in a second-level cache beside a block of weights.
constexpr int64_t X_IN_CACHE = 200 << 10;

// How elements of type E are multiplied. LANES: elements in four bytes. Sum: a vector of sums. add(x, w, sum): `sum`
// plus the products of four bytes at x, broadcast, with the vector of weights at w.
template <class E>
struct Products {
    typedef vf Sum;
    static constexpr int64_t LANES = 1;
    static vf add(const char* x, const char* w, vf sum) {
        float value;
        memcpy(&value, x, sizeof value);
        return fma(broadcast(value), load(reinterpret_cast<const float*>(w)), sum);
    }
};

inline vi broadcast_four_bytes(const char* x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return vi{} + value;
}

#if defined(__AVX512BF16__)
// VDPBF16PS: two products a lane, summed in float32.
template <>
struct Products<bfloat> {
    typedef vf Sum;
    static constexpr int64_t LANES = 2;
    static vf add(const char* x, const char* w, vf sum) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast_four_bytes(x), (__m512bh)_mm512_loadu_si512(w));
    }
};
#endif

#if CF_WIDTH >= 8
// Four products a lane, unsigned by signed, summed in int32 without rounding. VPDPBUSD does it. Without it, VPMADDUBSW
// leaves sums of two products in 16 bits, which hold them if no weight is beyond 64, and VPMADDWD adds two of these.
template <>
struct Products<uint8_t> {
    typedef vi Sum;
    static constexpr int64_t LANES = 4;
    static vi add(const char* x, const char* w, vi sum) {
        const vi bytes = broadcast_four_bytes(x);
        vi weights;
        memcpy(&weights, w, sizeof weights);
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)weights);
#elif defined(__AVXVNNI__)
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)weights);
#elif CF_WIDTH == 16
        const __m512i pairs = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)weights);
        return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)weights);
        return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
    }
};
#endif

// What cf_cpu_products and cf_cpu_largest_weight return.
#if defined(__AVX512BF16__)
constexpr int PRODUCTS = 3;
#else
constexpr int PRODUCTS = W >= 8 ? 2 : 0;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int LARGEST_WEIGHT = 127;
#else
constexpr int LARGEST_WEIGHT = 64;
#endif

template <class E>
using Tile = typename Products<E>::Sum[MAX_POSITIONS][MAX_VECTORS];

// sums[m][v] = the products of position m with vector v of a block of weights, M and V being the size of the tile: over
// `count` pieces of the image, `units` times four bytes each, which begin offsets[0], offsets[1], ... bytes behind
// x[m].
template <class E, int M, int V>
inline void multiply_tile(const char* const* x, const int64_t* offsets, int64_t count, int64_t units, const char* w,
                          Tile<E>& sums) {
    // copies whose addresses nobody has, so that the compiler keeps them in registers
    typename Products<E>::Sum s[M][V] = {};
    const char* at[M];
    for (int m = 0; m < M; ++m) at[m] = x[m];
    for (int64_t i = 0; i < count; ++i)
        for (int64_t q = offsets[i], end = q + 4 * units; q < end; q += 4, w += V * 4 * W)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) s[m][v] = Products<E>::add(at[m] + q, w + v * 4 * W, s[m][v]);
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) sums[m][v] = s[m][v];
}

// multiply_tile for sizes that are known at run time only: the last tile of an image has fewer positions.
template <class E, int V>
inline void multiply_positions(int64_t positions, const char* const* x, const int64_t* offsets, int64_t count,
                               int64_t units, const char* w, Tile<E>& sums) {
    switch (positions) {
#if CF_WIDTH >= 8
        case 6:
            return multiply_tile<E, 6, V>(x, offsets, count, units, w, sums);
        case 5:
            return multiply_tile<E, 5, V>(x, offsets, count, units, w, sums);
#endif
        case 4:
            return multiply_tile<E, 4, V>(x, offsets, count, units, w, sums);
        case 3:
            return multiply_tile<E, 3, V>(x, offsets, count, units, w, sums);
        case 2:
            return multiply_tile<E, 2, V>(x, offsets, count, units, w, sums);
        default:
            return multiply_tile<E, 1, V>(x, offsets, count, units, w, sums);
    }
}

template <class E>
inline void multiply(int64_t vectors, int64_t positions, const char* const* x, const int64_t* offsets, int64_t count,
                     int64_t units, const char* w, Tile<E>& sums) {
    if constexpr (MAX_VECTORS >= 4)
        if (vectors == 4) return multiply_positions<E, 4>(positions, x, offsets, count, units, w, sums);
    if constexpr (MAX_VECTORS >= 3)
        if (vectors == 3) return multiply_positions<E, 3>(positions, x, offsets, count, units, w, sums);
    if (vectors == 2) return multiply_positions<E, 2>(positions, x, offsets, count, units, w, sums);
    return multiply_positions<E, 1>(positions, x, offsets, count, units, w, sums);
}

inline vf to_floats(vf v) { return v; }
inline vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// How vectors of outputs are divided into blocks: 5 vectors are 3 + 2.
struct Blocks : EqualBlocks {
    explicit Blocks(int64_t vectors) : EqualBlocks(vectors, MAX_VECTORS) {}
};

// E: the elements that are multiplied; T: those of the residual; Y: those of y, the same or, quantised, uint8.
template <class E, class T, class Y = T>
struct Convolution {
    const cf_convolution_args& a;
    const int64_t x_pixel = a.channels * static_cast<int64_t>(sizeof(E));  // bytes of a position
    const int64_t y_pixel = a.outputs * static_cast<int64_t>(sizeof(Y));
    const int64_t residual_pixel = a.outputs * static_cast<int64_t>(sizeof(T));
    // A kernel's row is one piece of the image: its three taps lie behind one another, in the weights as well.
    const int64_t pieces = a.taps == 9 ? 3 : 1, units = a.taps / pieces * x_pixel / 4;
    const int64_t offsets[3] = {0, a.x.row, 2 * a.x.row};
    // A convolution without padding begins behind the border, if there is one, else at the border.
    const int64_t origin = (a.x.border - a.padding) * (a.x.row + x_pixel);
    const int64_t positions = a.n * a.height * a.width, tiles = ceil_div(positions, MAX_POSITIONS);
    const int64_t per_vector = a.gated ? W / 2 : W, vectors = ceil_div(a.outputs, per_vector);  // channels of y
    const Blocks blocks{vectors};

    int run(int64_t threads) const {
        const int64_t x_bytes = a.n * a.x.sample, w_bytes = vectors * W * a.taps * x_pixel;
        const Sharing sharing(tiles, blocks, x_bytes, w_bytes, sharing_threads(threads));
        const int64_t chunk = x_bytes > w_bytes ? X_IN_CACHE * tiles / x_bytes + 1 : tiles;
        parallel_for(sharing.threads, sharing.threads, [&](int64_t begin, int64_t end) {
            for (int64_t thread = begin; thread < end; ++thread)
                sharing.each(thread, [&](const Rectangle& r) { run_rectangle(r, chunk); });
        });
        for (int64_t n = 0; n < a.n && a.y.border; ++n)
            write_border(a.y, n, a.height, a.width, y_pixel, a.quantisation.zero);
        return CF_OK;
    }

    // `chunk` tiles at a time through all blocks.
    void run_rectangle(const Rectangle& r, int64_t chunk) const {
        for (int64_t tile = r.first_tile; tile < r.last_tile; tile += chunk)
            for (int64_t block = r.first_block; block < r.last_block; ++block)
                run_block(block, tile, min(tile + chunk, r.last_tile));
    }

    // What belongs to a position: its channels in x, y, residual and row.
    struct Place {
        const char* x[MAX_POSITIONS];
        Y* y[MAX_POSITIONS];
        const T* residual[MAX_POSITIONS];
        const float* row[MAX_POSITIONS];
    };

    // The outputs of a block, at the positions of the tiles [first_tile, last_tile).
    void run_block(int64_t block, int64_t first_tile, int64_t last_tile) const {
        const int64_t V = blocks.size(block), first = blocks.first(block);
        const char* w = static_cast<const char*>(a.weight) + first * pieces * units * 4 * W;
        const int64_t begin = first_tile * MAX_POSITIONS, end = min(last_tile * MAX_POSITIONS, positions);
        Position p{begin / (a.height * a.width), begin / a.width % a.height, begin % a.width};
        for (int64_t i = begin; i < end; i += MAX_POSITIONS) {
            const int64_t count = min(end - i, MAX_POSITIONS);
            Place at;
            for (int64_t m = 0; m < count; ++m) {
                at.x[m] = static_cast<const char*>(a.x.data) + origin + p.n * a.x.sample + p.y * a.stride * a.x.row +
                          p.x * a.stride * x_pixel;
                at.y[m] = reinterpret_cast<Y*>(address(a.y, p, y_pixel));
                if (a.row) at.row[m] = a.row + p.n * a.outputs;
                if (a.residual.data) {  // on its way from memory while the products are made
                    at.residual[m] = reinterpret_cast<const T*>(address(a.residual, p, residual_pixel));
                    const char* line = reinterpret_cast<const char*>(at.residual[m] + first * W);
                    for (int64_t b = 0; b < V * W * static_cast<int64_t>(sizeof(T)); b += 64)
                        __builtin_prefetch(line + b);
                }
                p.next(a.height, a.width);  // counting is cheaper than three divisions a position
            }
            Tile<E> sums;
            multiply<E>(V, count, at.x, offsets, pieces, units, w, sums);
            for (int64_t v = 0; v < V; v += a.gated ? 2 : 1) {
                const int64_t c = (first + v) * per_vector;
                if (a.gated)
                    finish_gated(sums, v, min(V - v, 2), c, at, count);
                else if (c + W <= a.outputs)
                    finish<true>(sums, v, c, at, count);
                else
                    finish<false>(sums, v, c, at, count);
            }
        }
    }

    // What follows a product, while the sums are at hand: scale, bias, row, residual, ReLU, and the rounding to Y. c:
    // the first of the outputs; WHOLE: all of the vector are outputs.
    template <bool WHOLE>
    void finish(const Tile<E>& sums, int64_t v, int64_t c, const Place& at, int64_t count) const {
        const int64_t part = WHOLE ? W : a.outputs - c;
        const vf bias = a.bias ? load_some(a.bias + c, part) : vf{},
                 scale = a.scale ? load_some(a.scale + c, part) : vf{};
        for (int64_t m = 0; m < count; ++m) {
            vf value = to_floats(sums[m][v]);
            value = a.scale ? fma(value, scale, bias) : value + bias;
            if (a.row) value += load_some(at.row[m] + c, part);
            if (a.residual.data) value += load_some(at.residual[m] + c, part);
            if (a.relu) value = apply(CF_RELU, value);
            Row<Y>{at.y[m], a.quantisation}.some(c, value, part);
        }
    }

    // The same with gates: one or two vectors, of which the first half are values and the second their gates, make one
    // vector of y, which is stored in the place of what would be twice as wide.
    void finish_gated(const Tile<E>& sums, int64_t v, int64_t some, int64_t c, const Place& at, int64_t count) const {
        vf bias[2] = {}, scale[2] = {};
        for (int64_t i = 0; i < some; ++i) {
            if (a.bias) bias[i] = load(a.bias + 2 * c + i * W);
            if (a.scale) scale[i] = load(a.scale + 2 * c + i * W);
        }
        const int64_t part = min(a.outputs - c, some * (W / 2));
        for (int64_t m = 0; m < count; ++m) {
            vf both[2] = {};
            for (int64_t i = 0; i < some; ++i) {
                const vf value = to_floats(sums[m][v + i]);
                both[i] = a.scale ? fma(value, scale[i], bias[i]) : value + bias[i];
            }
            const vf value = first_halves(both[0], both[1]) * apply(a.function, second_halves(both[0], both[1]));
            Row<Y>{at.y[m], a.quantisation}.some(c, value, part);
        }
    }
};

inline int convolution(const cf_convolution_args& a, int64_t threads) {
    if (a.x.dtype == CF_FLOAT32)
        return a.y.dtype == CF_UINT8 ? Convolution<float, float, uint8_t>{a}.run(threads)
                                     : Convolution<float, float>{a}.run(threads);
    [[maybe_unused]] const auto run = [&](auto type) {
        typedef decltype(type) E;
        if (a.y.dtype == CF_UINT8)
            return a.residual.dtype == CF_BFLOAT16 ? Convolution<E, bfloat, uint8_t>{a}.run(threads)
                                                   : Convolution<E, float, uint8_t>{a}.run(threads);
        if (a.y.dtype == CF_FLOAT32) return Convolution<E, float>{a}.run(threads);
        return Convolution<E, bfloat>{a}.run(threads);
    };
#if defined(__AVX512BF16__)
    if (a.x.dtype == CF_BFLOAT16) return run(bfloat{});
#endif
#if CF_WIDTH >= 8
    if (a.x.dtype == CF_UINT8) return run(uint8_t{});
#endif
    return CF_INVALID_ARGUMENT;  // the instruction set does not multiply them: see cf_cpu_products
}

}  // namespace
}  // namespace cf
