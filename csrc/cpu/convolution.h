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
//     AVX2      4 x 3:  7 loads for 12 products; 12 sums + 3 weights + 1 broadcast = all 16 registers
//
// Weights are packed once, in the order in which the loop reads them (cf_convolution_args in abi.h). The vectors of
// outputs form blocks of up to MAX_VECTORS, as equal as can be: 5 vectors are 3 + 2, not 4 + 1, whose last tile would
// load 7 times for 6 products.
//
// Outer loops. Weights and image both want to stay in a cache, and only one of the two can be walked once. If the image
// is larger, threads share its positions, and each takes X_IN_CACHE bytes of them through all blocks of weights before
// it goes on. Else threads share the weights, and each takes its blocks through all positions: then every weight is
// read from memory once, by one thread.
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
// The order in which a sum is added depends on the shape of the weights alone. So the bits of a picture depend neither
// on its batch nor on the number of threads.
//
// What it reaches in a network (benchmarks/results/cpu/sampler.csv; bfloat16, 2 threads): two evaluations of m take
// 29.6 ms at batch 1 and 486 ms at batch 16. OpenVINO takes 34.7 and 533 ms. The convolutions alone, run by oneDNN,
// take 28.6 and 393 ms: at batch 16 there is something left to gain.
#pragma once

#include "check.h"
#include "image.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_convolution_args& a) {
    const bool integers = a.x.dtype == CF_UINT8, quantised = a.y.dtype == CF_UINT8;
    const int64_t size = integers ? 1 : (a.x.dtype == CF_BFLOAT16 ? 2 : 4);
    return (integers || valid_activation(a.x.dtype)) &&
           (a.x.dtype == CF_FLOAT32 ? a.y.dtype == CF_FLOAT32 : (quantised || valid_activation(a.y.dtype))) &&
           valid(a.quantisation, quantised) && valid(a.x, a.n) && valid(a.y, a.n) && a.n >= 0 && a.height >= 1 &&
           a.width >= 1 && a.channels >= 1 && a.channels * size % 4 == 0 && a.outputs >= 1 &&
           (a.taps == 1 || (a.taps == 9 && a.x.border == 1)) && a.stride >= 1 &&
           (a.padding == 0 || (a.padding == 1 && a.taps == 9)) && a.weight && integers == !!a.scale &&
           (!a.residual.data ||
            (valid(a.residual, a.n) && a.residual.dtype == (quantised ? CF_BFLOAT16 : a.y.dtype))) &&
           (!integers || a.channels * a.taps <= INT32_MAX / (255 * 128));  // a sum of more might not fit
}

// The largest tile. MAX_VECTORS is part of the packed weights: see cf_convolution_args.
constexpr int MAX_POSITIONS = W == 16 ? 6 : 4, MAX_VECTORS = W == 16 ? 4 : 3;
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
#if defined(__AVX512BF16__)
inline __m512i broadcast_four_bytes(const char* x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return _mm512_set1_epi32(value);
}
// VDPBF16PS: two products a lane, summed in float32.
template <>
struct Products<bfloat> {
    typedef vf Sum;
    static constexpr int64_t LANES = 2;
    static vf add(const char* x, const char* w, vf sum) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast_four_bytes(x), (__m512bh)_mm512_loadu_si512(w));
    }
};
// VPDPBUSD: four products a lane, unsigned by signed, summed in int32 without rounding.
template <>
struct Products<uint8_t> {
    typedef vi Sum;
    static constexpr int64_t LANES = 4;
    static vi add(const char* x, const char* w, vi sum) {
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, broadcast_four_bytes(x), _mm512_loadu_si512(w));
    }
};
#endif

// What cf_cpu_products returns.
#if defined(__AVX512BF16__)
constexpr int PRODUCTS = 3;
#else
constexpr int PRODUCTS = 0;
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
#if CF_WIDTH == 16
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
    if (vectors == 4) return multiply_positions<E, 4>(positions, x, offsets, count, units, w, sums);
    if (vectors == 3) return multiply_positions<E, 3>(positions, x, offsets, count, units, w, sums);
    if (vectors == 2) return multiply_positions<E, 2>(positions, x, offsets, count, units, w, sums);
    return multiply_positions<E, 1>(positions, x, offsets, count, units, w, sums);
}

inline vf to_floats(vf v) { return v; }
inline vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// How vectors of outputs are divided into blocks: the first `larger` blocks have a vector more than the others, which
// have `least`.
struct Blocks {
    int64_t count, least, larger;
    explicit Blocks(int64_t vectors)
        : count(ceil_div(vectors, MAX_VECTORS)), least(vectors / count), larger(vectors % count) {}
    int64_t size(int64_t block) const { return least + (block < larger); }
    int64_t first(int64_t block) const { return block * least + min(block, larger); }  // vector
    // The block that the vector is in.
    int64_t of(int64_t vector) const {
        const int64_t in_larger = larger * (least + 1);
        return vector < in_larger ? vector / (least + 1) : larger + (vector - in_larger) / least;
    }
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
    const int64_t vectors = ceil_div(a.outputs, W);
    const Blocks blocks{vectors};

    int run(int64_t threads) const {
        const int64_t x_bytes = a.n * a.x.sample, w_bytes = vectors * W * a.taps * x_pixel;
        if (x_bytes > w_bytes)
            share_positions(threads, x_bytes);
        else
            share_weights(threads);
        for (int64_t n = 0; n < a.n && a.y.border; ++n)
            write_border(a.y, n, a.height, a.width, y_pixel, a.quantisation.zero);
        return CF_OK;
    }

    // Each thread takes its positions through all weights, as many at a time as a second-level cache holds.
    void share_positions(int64_t threads, int64_t x_bytes) const {
        const int64_t chunk = X_IN_CACHE * tiles / x_bytes + 1;
        parallel_for(tiles, threads, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; tile += chunk)
                for (int64_t block = 0; block < blocks.count; ++block) run_block(block, tile, min(tile + chunk, end));
        });
    }

    // Each thread takes its weights through all positions. A unit of work is a vector of outputs at one tile, so that
    // threads have equally much to do also where there are fewer blocks than threads, or blocks of different sizes.
    void share_weights(int64_t threads) const {
        const int64_t work = vectors * tiles;
        parallel_for(work, threads, [&](int64_t begin, int64_t end) {
            // The block and the tile that a unit of work is in. A tile whose units two threads have goes to the later
            // thread.
            const auto split = [&](int64_t unit, int64_t& block, int64_t& tile) {
                block = unit >= work ? blocks.count : blocks.of(unit / tiles);
                tile = block < blocks.count ? (unit - blocks.first(block) * tiles) / blocks.size(block) : 0;
            };
            int64_t block, tile, last_block, last_tile;
            split(begin, block, tile);
            split(end, last_block, last_tile);
            for (; block < last_block; ++block, tile = 0) run_block(block, tile, tiles);
            if (tile < last_tile) run_block(block, tile, last_tile);
        });
    }

    // The outputs of a block, at the positions of the tiles [first_tile, last_tile).
    void run_block(int64_t block, int64_t first_tile, int64_t last_tile) const {
        const int64_t V = blocks.size(block), first = blocks.first(block);
        const char* w = static_cast<const char*>(a.weight) + first * pieces * units * 4 * W;
        const int64_t begin = first_tile * MAX_POSITIONS, end = min(last_tile * MAX_POSITIONS, positions);
        Position p{begin / (a.height * a.width), begin / a.width % a.height, begin % a.width};
        for (int64_t i = begin; i < end; i += MAX_POSITIONS) {
            const int64_t count = min(end - i, MAX_POSITIONS);
            const char* x[MAX_POSITIONS];
            Position at[MAX_POSITIONS];
            for (int64_t m = 0; m < count; ++m) {
                at[m] = p;
                x[m] = static_cast<const char*>(a.x.data) + origin + p.n * a.x.sample + p.y * a.stride * a.x.row +
                       p.x * a.stride * x_pixel;
                p.next(a.height, a.width);  // counting is cheaper than three divisions a position
            }
            Tile<E> sums;
            multiply<E>(V, count, x, offsets, pieces, units, w, sums);
            for (int64_t v = 0; v < V; ++v) finish(sums, v, (first + v) * W, at, count);
        }
    }

    // What follows a product, while the sums are at hand: scale, bias, row, residual, ReLU, and the rounding to T. c: the
    // first of the outputs.
    void finish(const Tile<E>& sums, int64_t v, int64_t c, const Position* at, int64_t count) const {
        const int64_t part = min(a.outputs - c, W);
        const vf bias = a.bias ? load_some(a.bias + c, part) : vf{},
                 scale = a.scale ? load_some(a.scale + c, part) : vf{};
        for (int64_t m = 0; m < count; ++m) {
            vf value = to_floats(sums[m][v]);
            value = a.scale ? fma(value, scale, bias) : value + bias;
            if (a.row) value += load_some(a.row + at[m].n * a.outputs + c, part);
            if (a.residual.data)
                value += load_some(reinterpret_cast<const T*>(address(a.residual, at[m], residual_pixel)) + c, part);
            if (a.relu) value = value > 0.0f ? value : (value == value ? vf{} : value);  // NaN stays NaN
            Row<Y>{reinterpret_cast<Y*>(address(a.y, at[m], y_pixel)), a.quantisation}.some(c, value, part);
        }
    }
};

inline int convolution(const cf_convolution_args& a, int64_t threads) {
    if (a.x.dtype == CF_FLOAT32) return Convolution<float, float>{a}.run(threads);
#if defined(__AVX512BF16__)
    const auto run = [&](auto type) {
        typedef decltype(type) E;
        if (a.y.dtype == CF_UINT8) return Convolution<E, bfloat, uint8_t>{a}.run(threads);
        if (a.y.dtype == CF_FLOAT32) return Convolution<E, float>{a}.run(threads);
        return Convolution<E, bfloat>{a}.run(threads);
    };
    if (a.x.dtype == CF_BFLOAT16) return run(bfloat{});
    if (a.x.dtype == CF_UINT8) return run(uint8_t{});
#endif
    return CF_INVALID_ARGUMENT;  // the instruction set does not multiply them: see cf_cpu_products
}

}  // namespace
}  // namespace cf
