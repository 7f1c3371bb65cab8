// The forms CF_WINOGRAD_2 and CF_WINOGRAD_4 of the step `convolution`: 3x3 with stride 1, with fewer multiplications.
//
// Winograd's F(m x m, 3 x 3) makes a tile of m x m outputs of a tile of P x P inputs, P = m + 2. Along one axis, both
// are polynomials: the outputs are what is left of the product of the inputs and the kernel at m places. Values of the
// two at P points, multiplied point by point, give values of the product, and from these its coefficients follow. So
//
//     y = A^T [ (G g G^T) * (B^T d B) ] A        d: tile of inputs, g: kernel, y: tile of outputs, *: by element
//
// with P^2 products instead of 9 m^2: 16 instead of 36 (2.25 times fewer), or 36 instead of 144 (4 times fewer). Summed
// over channels they are P^2 matrix products, one for each point: (tiles, channels) by (channels, outputs), which run
// in the inner loop of convolution.h. Kernels are transformed when they are packed. All but the products takes some 30
// % of the time (perf, one thread, bfloat16, 128 channels at 32x32 and 320 at 64x64).
//
// Points. F(2 x 2) has 0, 1, -1 and infinity. F(4 x 4) has 0, +-11/16, +-3/2 and infinity: as cheap as the usual +-1
// and +-2, with half the rounding error (Barabasz et al., "Error analysis and improving the accuracy of Winograd
// convolution", 2020, on the choice of points).
//
// Images of float32 are multiplied in float32. Images of bfloat16 are not multiplied in bfloat16: the transform back
// amplifies the rounding of transformed numbers, and with 8 bits of them the error is six times that of a direct
// convolution (root of the mean squared error of F(4 x 4): 1.1e-2 instead of 1.7e-3 of that of the outputs). VPDPWSSD
// multiplies 16-bit integers at the same speed, and those have 15 bits. So the transformed numbers, float32 until then,
// are rounded to integers:
//
//     v = round(V / s)    s: one for each tile and point      u = round(U / t)    t: one for each output and point
//     sum over channels of V U  ~  s t sum of v u
//
// A channel is multiplied by r before, and its weights by 1/r, r being the norm of its weights, as a power of two: else,
// where small inputs of a channel meet large weights, the inputs would have few of the digits of a scale that they share
// with other channels. After it all channels have weights of one size, and inputs as large as what they add to outputs.
//
// The sums are made in int32, which they must fit. By Cauchy and Schwarz |sum v u| <= |v| |u|, so the scales are chosen
// such that the norms are below 2^15 and 2^16, over up to MOST_IN_CHUNK channels; sums of chunks are added in float32.
// What they add to the error of an output is less than the rounding of it to bfloat16 (test_winograd.py). NaN and
// infinity in a tile make its scale NaN or infinite, and all its outputs non-finite. Digits are still lost where an output
// depends on numbers alone that are small beside others of their scale: on pixels beside an outlier in a tile, and on
// channels that are smaller than others while their weights are no larger.
//
// Edges. Tiles reach beyond the right and lower edge where a side is no multiple of m: they read zeros there, and
// outputs outside are not written. The position that a tile reads may be that of an image half as large (`doubling`): a
// nearest upsampling before the convolution needs no pass of its own.
//
// Outer loops. If every thread has many tiles, and the weights stay in the last-level cache, each thread transforms as
// many tiles as its second-level cache holds beside their products, and takes them through all weights (share_tiles).
// Else all tiles are transformed first, and threads share the products as share.h says, so that every weight is read
// from memory once (share_outputs).
//
// The bits of an output depend on its tile, and on weights: not on other tiles, threads or the batch.
#pragma once

#include <float.h>

#include "convolution.h"

namespace cf {
namespace {

// Transforms of P numbers along one axis: of inputs, kernels (3 numbers) and back.
template <int m>
struct Transform;

template <>
struct Transform<2> {
    static void input(const vf* d, vf* t) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = d[2] - d[1];
        t[3] = d[1] - d[3];
    }
    static void kernel(const vf* g, vf* t) {
        const vf sum = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
        t[0] = g[0];
        t[1] = sum + middle;
        t[2] = sum - middle;
        t[3] = g[2];
    }
    static void output(const vf* d, vf* t) {
        t[0] = d[0] + (d[1] + d[2]);
        t[1] = (d[1] - d[2]) - d[3];
    }
};

template <>
struct Transform<4> {
    static constexpr double a = 0.6875, b = 1.5, a2 = a * a, b2 = b * b;
    static vf constant(double value) { return broadcast(static_cast<float>(value)); }
    static void input(const vf* d, vf* t) {
        const vf p = fma(constant(-b2), d[2], d[4]), q = fma(constant(-b2), d[1], d[3]);
        const vf r = fma(constant(-a2), d[2], d[4]), s = fma(constant(-a2), d[1], d[3]);
        t[0] = fma(constant(a2 * b2), d[0], fma(constant(-a2 - b2), d[2], d[4]));
        t[1] = fma(constant(a), q, p);
        t[2] = fma(constant(-a), q, p);
        t[3] = fma(constant(b), s, r);
        t[4] = fma(constant(-b), s, r);
        t[5] = fma(constant(a2 * b2), d[1], fma(constant(-a2 - b2), d[3], d[5]));
    }
    static void kernel(const vf* g, vf* t) {
        const double fa = 2 * a2 * (a2 - b2), fb = 2 * b2 * (b2 - a2);
        const vf p = fma(constant(a2 / fa), g[2], constant(1 / fa) * g[0]), q = constant(a / fa) * g[1];
        const vf r = fma(constant(b2 / fb), g[2], constant(1 / fb) * g[0]), s = constant(b / fb) * g[1];
        t[0] = constant(1 / (a2 * b2)) * g[0];
        t[1] = p + q;
        t[2] = p - q;
        t[3] = r + s;
        t[4] = r - s;
        t[5] = g[2];
    }
    static void output(const vf* d, vf* t) {
        const vf s = d[1] + d[2], r = d[1] - d[2], c = d[3] + d[4], e = d[3] - d[4];
        t[0] = d[0] + s + c;
        t[1] = fma(constant(b), e, constant(a) * r);
        t[2] = fma(constant(b2), c, constant(a2) * s);
        t[3] = fma(constant(b2 * b), e, fma(constant(a2 * a), r, d[5]));
    }
};

// What tiles and packed kernels are multiplied as, for images of X.
template <class X>
struct Multiplied;
template <>
struct Multiplied<float> {
    typedef float E;
};
#if defined(__AVX512BF16__)
// VPDPWSSD: two products a lane, summed in int32.
template <>
struct Products<int16_t> {
    typedef vi Sum;
    static constexpr int64_t LANES = 2;
    static vi add(const char* x, const char* w, vi sum) {
        return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)broadcast_four_bytes(x), _mm512_loadu_si512(w));
    }
};
template <>
struct Multiplied<bfloat> {
    typedef int16_t E;
};
#endif

// Channels whose products are summed in int32: the most, and how many there are in a chunk of `channels`.
constexpr int64_t MOST_IN_CHUNK = 320;
inline int64_t channels_at_once(int64_t channels) {
    return round_up(ceil_div(channels, ceil_div(channels, MOST_IN_CHUNK)), W);
}
// The norms of a chunk's integers, so that the sum of products is below 2^31, with room for their rounding. Those of an
// image are at most as large as their norm; for kernels, MOST_INTEGER is a limit of its own.
constexpr float IMAGE_NORM = 32700, KERNEL_NORM = 65500, MOST_INTEGER = 32760;
// The largest factor of a channel: transformed, the largest number of bfloat16 is still finite with it.
constexpr float MOST_BALANCE = 0x1p-5f;

// The largest squared norm of a chunk of `count` numbers, a multiple of W, read(c) being a vector of them. NaN or
// infinite if a number is.
template <class F>
inline float largest_squares(const F& read, int64_t count, int64_t chunk) {
    float most = 0;
    for (int64_t first = 0; first < count; first += chunk) {
        vf squares = {};
        for (int64_t c = first, end = min(first + chunk, count); c < end; c += W) {
            const vf value = read(c);
            squares = fma(value, value, squares);
        }
        const float all = sum(squares);
        most = all > most || all != all ? all : most;  // NaN stays NaN
    }
    return most;
}

// The largest number without its sign, of `count`, a multiple of W; NaN does not count.
inline float largest_size(const float* numbers, int64_t count) {
    vf most = {};
    for (int64_t c = 0; c < count; c += W) {
        const vf value = load(numbers + c);
        most = larger(larger(value, -value), most);
    }
    return largest(most);
}

// 2^exponent, for -126 <= exponent <= 127.
inline float exact_power_of_two(int exponent) { return ldexpf(1, exponent); }

// The largest norm of a chunk. NaN or infinite if a number is.
inline float largest_norm(const float* numbers, int64_t count, int64_t chunk) {
    const float squares = largest_squares([=](int64_t c) { return load(numbers + c); }, count, chunk);
    if (squares > 1e-20f && squares <= FLT_MAX) return sqrtf(squares);
    // the squares of large numbers are infinite, and those of small ones 0
    const float most = largest_size(numbers, count);
    if (!(most > 0 && most <= FLT_MAX)) return squares;
    const int exponent = static_cast<int>(min(max(ilogbf(most), -126), 126));
    const float by = exact_power_of_two(-exponent);
    const float scaled = largest_squares([=](int64_t c) { return load(numbers + c) * by; }, count, chunk);
    return sqrtf(scaled) * exact_power_of_two(exponent);
}

// to[i] = round(from[i] * inverse), ties to even, for `count` numbers, a multiple of W.
inline void to_integers(const float* from, float inverse, int16_t* to, int64_t count) {
    typedef int16_t vs __attribute__((vector_size(2 * W)));
    for (int64_t c = 0; c < count; c += W) {
        // the addition rounds and leaves the integer in the low 16 bits: see power_of_two
        const vf rounded = fma(load(from + c), broadcast(inverse), 12582912.0f);
        const vs low = __builtin_convertvector((vi)rounded, vs);
        memcpy(to + c, &low, sizeof low);
    }
}

// A scale whose inverse is finite, of zeros, too. NaN stays NaN.
inline float usable(float scale) { return scale < FLT_MIN ? FLT_MIN : scale; }

// X: the elements of x; T: those of y and residual; m: outputs of a tile along each axis.
template <class X, class T, int m>
struct Winograd {
    typedef typename Multiplied<X>::E E;
    static constexpr bool INTEGERS = sizeof(E) == 2;
    static constexpr int P = m + 2, POINTS = P * P;
    static constexpr int64_t CACHE = 1 << 20;           // bytes, second-level, of tiles and their products
    static constexpr int64_t SHARED_CACHE = 8 << 20;    // likewise, last-level, of tiles that all threads read
    static constexpr int64_t LARGE_WEIGHTS = 16 << 20;  // bytes: not to be read more often than once
    static constexpr int64_t MANY_TILES = 20;           // of a thread, from which on threads share tiles

    const cf_convolution_args& a;
    const int64_t x_pixel = a.channels * static_cast<int64_t>(sizeof(X));
    const int64_t y_pixel = a.outputs * static_cast<int64_t>(sizeof(T));
    const int64_t units = a.channels / Products<E>::LANES;
    const int64_t channels = round_up(a.channels, W);  // of a tile in memory
    const int64_t chunk = INTEGERS ? channels_at_once(a.channels) : channels;
    // Bytes of a point of a tile; the 64 more keep the points from competing for the same places in a cache.
    const int64_t v_row = round_up(channels * static_cast<int64_t>(sizeof(E)), 64) + 64;
    const int64_t scales = INTEGERS ? round_up(POINTS * 4, 64) : 0;  // bytes of a tile's scales, behind its points
    const int64_t v_tile = POINTS * v_row + scales;
    const int64_t tiles_x = ceil_div(a.width, m), tiles_y = ceil_div(a.height, m), tiles = a.n * tiles_y * tiles_x;
    const int64_t vectors = ceil_div(a.outputs, W);
    const int64_t w_bytes = vectors * W * POINTS * units * 4;
    const float* balances =  // of integers
        reinterpret_cast<const float*>(static_cast<const char*>(a.weight) + w_bytes) + vectors * W * POINTS;
    const Blocks blocks{vectors};
    static constexpr int64_t BLOCKS_AT_ONCE = W == 8 ? 4 : 1;           // which read the same rows of tiles
    static constexpr int64_t M_ROW = BLOCKS_AT_ONCE * MAX_VECTORS * W;  // floats of a point of a tile's products
    static constexpr int64_t M_TILE = POINTS * M_ROW * 4;               // bytes
    const int64_t at_once = max(CACHE / (v_tile + M_TILE) / MAX_POSITIONS, 1) * MAX_POSITIONS;  // tiles
    // The scratch of a thread: zeros for positions outside, transformed numbers of a tile, products.
    const int64_t zeros_bytes = round_up(x_pixel, 64), numbers_bytes = INTEGERS ? POINTS * channels * 4 : 0;

    int run(int64_t threads) const {
        const int status =
            tiles >= threads * MANY_TILES && w_bytes <= LARGE_WEIGHTS ? share_tiles(threads) : share_outputs(threads);
        for (int64_t n = 0; n < a.n && a.y.border; ++n) write_border(a.y, n, a.height, a.width, y_pixel, nullptr);
        return status;
    }

    int share_tiles(int64_t threads) const {
        const int64_t most = min(at_once, ceil_div(tiles, threads));
        const int64_t bytes = zeros_bytes + numbers_bytes + most * (v_tile + M_TILE);
        return parallel_for_with_scratch(tiles, threads, static_cast<size_t>(bytes),
                                         [&](void* memory, int64_t begin, int64_t end) {
                                             char* zeros = static_cast<char*>(memory);
                                             float* numbers = reinterpret_cast<float*>(zeros + zeros_bytes);
                                             char* v = zeros + zeros_bytes + numbers_bytes;
                                             float* products = reinterpret_cast<float*>(v + most * v_tile);
                                             memset(zeros, 0, static_cast<size_t>(zeros_bytes));
                                             for (int64_t first = begin; first < end; first += most) {
                                                 const int64_t count = min(most, end - first);
                                                 for (int64_t i = 0; i < count; ++i)
                                                     transform_input(first + i, v + i * v_tile, zeros, numbers);
                                                 run_blocks(0, blocks.count, v, first, count, products);
                                             }
                                         });
    }

    int share_outputs(int64_t threads) const {
        const int64_t most = max(min(tiles, SHARED_CACHE / v_tile), 1);
        char* v = static_cast<char*>(scratch(CALL_SCRATCH, static_cast<size_t>(most * v_tile)));
        if (!v) return CF_OUT_OF_MEMORY;
        int status = CF_OK;
        for (int64_t first = 0; first < tiles && status == CF_OK; first += most) {
            const int64_t count = min(most, tiles - first), groups = ceil_div(count, MAX_POSITIONS);
            status = parallel_for_with_scratch(count, threads, static_cast<size_t>(zeros_bytes + numbers_bytes),
                                               [&](void* memory, int64_t begin, int64_t end) {
                                                   char* zeros = static_cast<char*>(memory);
                                                   memset(zeros, 0, static_cast<size_t>(zeros_bytes));
                                                   for (int64_t i = begin; i < end; ++i)
                                                       transform_input(first + i, v + i * v_tile, zeros,
                                                                       reinterpret_cast<float*>(zeros + zeros_bytes));
                                               });
            if (status != CF_OK) return status;
            const int64_t part = min(at_once, count);
            const Sharing sharing(groups, blocks, count * v_tile, w_bytes, sharing_threads(threads));
            status = parallel_for_with_scratch(
                sharing.threads, sharing.threads, static_cast<size_t>(part * M_TILE),
                [&](void* memory, int64_t begin, int64_t end) {
                    for (int64_t thread = begin; thread < end; ++thread)
                        sharing.each(thread, [&](const Rectangle& r) {
                            const int64_t last = min(r.last_tile * MAX_POSITIONS, count);
                            for (int64_t from = r.first_tile * MAX_POSITIONS; from < last; from += part)
                                run_blocks(r.first_block, r.last_block, v + from * v_tile, first + from,
                                           min(part, last - from), static_cast<float*>(memory));
                        });
                });
        }
        return status;
    }

    // The first output of a tile.
    Position position(int64_t tile) const {
        return {tile / (tiles_y * tiles_x), tile / tiles_x % tiles_y * m, tile % tiles_x * m};
    }

    // B^T d B of a tile, at v: a row of channels for each point; of integers, the scales behind them.
    void transform_input(int64_t tile, char* v, const char* zeros, float* numbers) const {
        const Position p = position(tile);
        const char* at[P][P];
        for (int i = 0; i < P; ++i)
            for (int j = 0; j < P; ++j) {
                int64_t y = p.y + i - 1, x = p.x + j - 1;
                const bool inside = y <= a.height && x <= a.width;
                if (a.doubling) y >>= 1, x >>= 1;
                at[i][j] = inside ? address(a.x, {p.n, y, x}, x_pixel) : zeros;
            }
        float* floats = INTEGERS ? numbers : reinterpret_cast<float*>(v);
        const int64_t row = INTEGERS ? channels : v_row / 4;
        const auto balanced = [&](vf d, vf balance) { return INTEGERS ? d * balance : d; };
        int64_t c = 0;
        for (; c + W <= a.channels; c += W) {
            const vf balance = INTEGERS ? load(balances + c) : vf{};
            transform_vector(
                [&](int i, int j) { return balanced(load(reinterpret_cast<const X*>(at[i][j]) + c), balance); },
                floats + c, row);
        }
        if (c < a.channels) {
            const int64_t part = a.channels - c;
            const vf balance = INTEGERS ? load(balances + c) : vf{};
            transform_vector(
                [&](int i, int j) {
                    return balanced(load_part(reinterpret_cast<const X*>(at[i][j]) + c, part), balance);
                },
                floats + c, row);
        }
        if constexpr (INTEGERS) {
            float* scale = reinterpret_cast<float*>(v + POINTS * v_row);
            float inverse[POINTS];
            for (int i = 0; i < POINTS; ++i) scale[i] = largest_norm(numbers + i * channels, channels, chunk);
            for (int i = 0; i < POINTS; ++i) {
                scale[i] = usable(scale[i] / IMAGE_NORM);
                inverse[i] = 1 / scale[i];
            }
            for (int i = 0; i < POINTS; ++i)
                to_integers(numbers + i * channels, inverse[i], reinterpret_cast<int16_t*>(v + i * v_row), channels);
        }
    }

    // B^T d B of one vector of channels, d being read(i, j); its points are `row` floats apart.
    template <class F>
    static void transform_vector(const F& read, float* to, int64_t row) {
        vf t[P][P];
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) {
            vf d[P], r[P];
#pragma GCC unroll 6
            for (int i = 0; i < P; ++i) d[i] = read(i, j);
            Transform<m>::input(d, r);
#pragma GCC unroll 6
            for (int i = 0; i < P; ++i) t[i][j] = r[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < P; ++i) {
            vf r[P];
            Transform<m>::input(t[i], r);
#pragma GCC unroll 6
            for (int j = 0; j < P; ++j) store(to + (i * P + j) * row, r[j]);
        }
    }

    // The outputs of blocks for `count` tiles from `first` on, which are transformed at v.
    void run_blocks(int64_t block, int64_t last_block, const char* v, int64_t first, int64_t count,
                    float* products) const {
        for (; block < last_block; block += BLOCKS_AT_ONCE) {
            const int64_t last = min(block + BLOCKS_AT_ONCE, last_block);
            const int64_t vector = blocks.first(block), V = blocks.first(last) - vector;
            const int64_t groups = ceil_div(count, MAX_POSITIONS);
            for (int point = 0; point < POINTS; ++point)
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t begin = count * g / groups, end = count * (g + 1) / groups;
                    float* to = products + (begin * POINTS + point) * M_ROW;
                    for (int64_t b = block; b < last; ++b)
                        multiply_group(b, v + begin * v_tile, end - begin, point, to + (blocks.first(b) - vector) * W);
                }
            for (int64_t i = 0; i < count; ++i) {
                const Position p = position(first + i);
                const bool whole = p.y + m <= a.height && p.x + m <= a.width && (vector + V) * W <= a.outputs;
                const float* from = products + i * POINTS * M_ROW;
                for (int64_t j = 0; j < V; ++j)
                    whole ? transform_output<true>(p, from + j * W, (vector + j) * W)
                          : transform_output<false>(p, from + j * W, (vector + j) * W);
            }
        }
    }

    // A block at one point of up to MAX_POSITIONS tiles.
    void multiply_group(int64_t block, const char* v, int64_t count, int point, float* products) const {
        const int64_t V = blocks.size(block), before = blocks.first(block) * POINTS + point * V;  // vectors of weights
        const char* w = static_cast<const char*>(a.weight) + before * units * 4 * W;
        const float* w_scale =
            reinterpret_cast<const float*>(static_cast<const char*>(a.weight) + w_bytes) + before * W;
        const int64_t none[1] = {0};
        const char* x[MAX_POSITIONS];
        float scale[MAX_POSITIONS];
        for (int64_t i = 0; i < count; ++i) {
            x[i] = v + i * v_tile + point * v_row;
            if (INTEGERS) scale[i] = reinterpret_cast<const float*>(v + i * v_tile + POINTS * v_row)[point];
        }
        Tile<E> sums;
        for (int64_t c = 0; c < a.channels; c += chunk) {
            const int64_t part = min(chunk, a.channels - c) / Products<E>::LANES;
            multiply<E>(V, count, x, none, 1, part, w, sums);
            w += V * part * 4 * W;
            for (int64_t i = 0; i < count; ++i) {
                x[i] += part * 4;
                for (int64_t j = 0; j < V; ++j) {
                    float* to = products + i * POINTS * M_ROW + j * W;
                    vf value = to_floats(sums[i][j]);
                    if (INTEGERS) value = value * load(w_scale + j * W) * scale[i];  // their product may be too small
                    store(to, c ? value + load(to) : value);
                }
            }
        }
    }

    // A^T M A of a tile and a vector of outputs from c on, with all that follows the product. WHOLE: no output is
    // outside.
    template <bool WHOLE>
    void transform_output(const Position& p, const float* products, int64_t c) const {
        const int64_t part = WHOLE ? W : min(a.outputs - c, W);
        const int64_t rows = WHOLE ? m : min(a.height - p.y, m), columns = WHOLE ? m : min(a.width - p.x, m);
        vf t[m][P];
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) {
            vf d[P], r[m];
#pragma GCC unroll 6
            for (int i = 0; i < P; ++i) d[i] = load(products + (i * P + j) * M_ROW);
            Transform<m>::output(d, r);
#pragma GCC unroll 4
            for (int i = 0; i < m; ++i) t[i][j] = r[i];
        }
        const auto some = [=](const float* from) { return from ? load_some(from, part) : vf{}; };
        const vf added = some(a.bias ? a.bias + c : nullptr) + some(a.row ? a.row + p.n * a.outputs + c : nullptr);
        char* y = address(a.y, p, y_pixel);
        const char* residual = a.residual.data ? address(a.residual, p, y_pixel) : nullptr;
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) {
            if (!WHOLE && i >= rows) break;
            vf r[m];
            Transform<m>::output(t[i], r);
#pragma GCC unroll 4
            for (int j = 0; j < m; ++j) {
                if (!WHOLE && j >= columns) break;
                vf value = r[j] + added;
                if (residual)
                    value +=
                        load_some(reinterpret_cast<const T*>(residual + i * a.residual.row + j * y_pixel) + c, part);
                if (a.relu) value = apply(CF_RELU, value);
                store_some(reinterpret_cast<T*>(y + i * a.y.row + j * y_pixel) + c, value, part);
            }
        }
    }
};

template <int m>
inline int winograd_of(const cf_convolution_args& a, int64_t threads) {
    if (a.x.dtype == CF_FLOAT32) return Winograd<float, float, m>{a}.run(threads);
#if defined(__AVX512BF16__)
    if (a.x.dtype == CF_BFLOAT16)
        return a.y.dtype == CF_FLOAT32 ? Winograd<bfloat, float, m>{a}.run(threads)
                                       : Winograd<bfloat, bfloat, m>{a}.run(threads);
#endif
    return CF_INVALID_ARGUMENT;
}

// The step, in the form that its arguments say.
inline int convolution_step(const cf_convolution_args& a, int64_t threads) {
    if (a.n == 0) return CF_OK;
    if (a.form == CF_WINOGRAD_2) return winograd_of<2>(a, threads);
    if (a.form == CF_WINOGRAD_4) return winograd_of<4>(a, threads);
    return convolution(a, threads);
}

// Packs kernels for images of X: in the order of direct ones, with points in the place of taps, then of integers the
// scales, (blocks, points, vectors, width) of float32, and the balances of the channels, those of up to a whole vector.
// S: the elements of the kernels.
template <class S, class X, int m>
struct WinogradPacking {
    typedef typename Multiplied<X>::E E;
    static constexpr bool INTEGERS = sizeof(E) == 2;
    static constexpr int P = m + 2, POINTS = P * P;
    const cf_pack_args& a;
    const int64_t units = ceil_div(a.channels, Products<E>::LANES), channels = round_up(a.channels, W);
    const int64_t padded = units * Products<E>::LANES;
    const int64_t chunk = INTEGERS ? channels_at_once(padded) : channels;
    const int64_t vectors = ceil_div(a.outputs, W);
    const Blocks blocks{vectors};

    int run(int64_t threads) const {
        const int64_t taps = 9 * channels, numbers = POINTS * channels;
        const int64_t row = POINTS * channels * static_cast<int64_t>(sizeof(E)) + 64;  // of an output
        prepare_output(a.packed, vectors * W * POINTS * units * 4);
        if (INTEGERS) write_balances(threads);
        return parallel_for_with_scratch(vectors, threads, static_cast<size_t>((taps + numbers) * 4 + W * row),
                                         [&](void* memory, int64_t begin, int64_t end) {
                                             float* kernel = static_cast<float*>(memory);
                                             char* rows = reinterpret_cast<char*>(kernel + taps + numbers);
                                             for (int64_t vector = begin; vector < end; ++vector) {
                                                 float* scale = scales_of(vector);
                                                 for (int64_t lane = 0; lane < W; ++lane)
                                                     transform(vector * W + lane, kernel, kernel + taps,
                                                               rows + lane * row, scale + lane);
                                                 write(vector, rows, row);
                                             }
                                         });
    }

    float* scales() const {
        return reinterpret_cast<float*>(static_cast<char*>(a.packed) + vectors * POINTS * units * 4 * W);
    }
    float* balances() const { return scales() + vectors * W * POINTS; }

    // For each channel, the norm of its weights, relative to their geometric mean, as the closest power of two, so that
    // norms that hardly differ leave all numbers as they are; the largest is scaled to MOST_BALANCE.
    void write_balances(int64_t threads) const {
        float* balance = balances();
        parallel_for(channels / W, threads, [&](int64_t begin, int64_t end) {
            for (int64_t vector = begin; vector < end; ++vector) {
                double squares[W] = {};
                const int64_t first = vector * W, count = min(a.channels - first, W);
                for (int64_t output = 0; output < a.outputs; ++output)
                    for (int i = 0; i < 9; ++i) {
                        const S* from = static_cast<const S*>(a.weight.data) + output * a.weight.strides[0] +
                                        first * a.weight.strides[1] + i / 3 * a.weight.strides[2] +
                                        i % 3 * a.weight.strides[3];
                        for (int64_t c = 0; c < count; ++c) {
                            const double weight = static_cast<double>(to_float(from[c * a.weight.strides[1]]));
                            squares[c] += weight * weight;
                        }
                    }
                for (int64_t c = 0; c < W; ++c) balance[first + c] = static_cast<float>(log2(squares[c]) / 2);
            }
        });
        double total = 0;
        int64_t known = 0;  // neither zeros alone nor with NaN or infinity
        for (int64_t c = 0; c < a.channels; ++c)
            if (fabsf(balance[c]) <= FLT_MAX) total += static_cast<double>(balance[c]), ++known;
        const float mean = known ? static_cast<float>(total / static_cast<double>(known)) : 0;
        float top = -FLT_MAX;
        for (int64_t c = 0; c < channels; ++c) {
            balance[c] = rintf(balance[c] - mean);
            if (balance[c] <= FLT_MAX && balance[c] > top) top = balance[c];
        }
        for (int64_t c = 0; c < channels; ++c) {
            const float below = balance[c] - top;  // NaN stays NaN: any factor will do
            balance[c] =
                exact_power_of_two(below < 0 ? static_cast<int>(below > -120 ? below : -120) : 0) * MOST_BALANCE;
        }
    }

    int64_t of_block(int64_t block) const { return blocks.first(block) * POINTS; }

    // Of the vector's first point; those of the next are `blocks.size` vectors further on.
    float* scales_of(int64_t vector) const {
        const int64_t block = blocks.of(vector);
        return scales() + (of_block(block) + vector - blocks.first(block)) * W;
    }

    // G g G^T of an output's kernels, at `to`: a row of channels for each point.
    void transform(int64_t output, float* kernel, float* numbers, char* to, float* scale) const {
        const int64_t next = blocks.size(blocks.of(output / W)) * W;
        if (output >= a.outputs) {
            memset(to, 0, static_cast<size_t>(POINTS * channels) * sizeof(E));
            for (int i = 0; i < POINTS && INTEGERS; ++i) scale[i * next] = 0;
            return;
        }
        const S* from = static_cast<const S*>(a.weight.data) + output * a.weight.strides[0];
        for (int i = 0; i < 9; ++i) {
            const S* tap = from + i / 3 * a.weight.strides[2] + i % 3 * a.weight.strides[3];
            float* row = kernel + i * channels;
            if (a.weight.strides[1] == 1)
                widen(tap, row, a.channels);
            else
                for (int64_t c = 0; c < a.channels; ++c) row[c] = to_float(tap[c * a.weight.strides[1]]);
            for (int64_t c = a.channels; c < channels; ++c) row[c] = 0;
        }
        float* floats = INTEGERS ? numbers : reinterpret_cast<float*>(to);
        for (int64_t c = 0; c < channels; c += W) {
            vf t[P][3];
            const vf inverse = INTEGERS ? 1 / load(balances() + c) : broadcast(1);
            for (int j = 0; j < 3; ++j) {
                vf g[3], r[P];
                for (int i = 0; i < 3; ++i) g[i] = load(kernel + (i * 3 + j) * channels + c) * inverse;
                Transform<m>::kernel(g, r);
                for (int i = 0; i < P; ++i) t[i][j] = r[i];
            }
            for (int i = 0; i < P; ++i) {
                vf r[P];
                Transform<m>::kernel(t[i], r);
                for (int j = 0; j < P; ++j) store(floats + (i * P + j) * channels + c, r[j]);
            }
        }
        for (int i = 0; i < POINTS && INTEGERS; ++i) {
            const float* row = numbers + i * channels;
            const float by_norm = largest_norm(row, channels, chunk) / KERNEL_NORM;
            const float by_size = largest_size(row, channels) / MOST_INTEGER;
            scale[i * next] = usable(by_size > by_norm ? by_size : by_norm);  // NaN stays NaN
            to_integers(numbers + i * channels, 1 / scale[i * next], reinterpret_cast<int16_t*>(to) + i * channels,
                        channels);
        }
    }

    // The outputs of a vector, four bytes of each side by side.
    void write(int64_t vector, const char* rows, int64_t row) const {
        const int64_t block = blocks.of(vector), V = blocks.size(block);
        for (int point = 0; point < POINTS; ++point)
            for (int64_t u = 0; u < units; ++u) {
                uint32_t words[W];
                const char* from = rows + point * channels * static_cast<int64_t>(sizeof(E)) + u * 4;
                for (int64_t lane = 0; lane < W; ++lane) memcpy(words + lane, from + lane * row, 4);
                memcpy(static_cast<char*>(a.packed) +
                           ((of_block(block) + point * V) * units + u * V + vector - blocks.first(block)) * 4 * W,
                       words, sizeof words);
            }
    }
};

template <class S, int m>
inline int winograd_pack_of(const cf_pack_args& a, int64_t threads) {
    if (a.dtype == CF_FLOAT32) return WinogradPacking<S, float, m>{a}.run(threads);
#if defined(__AVX512BF16__)
    if (a.dtype == CF_BFLOAT16) return WinogradPacking<S, bfloat, m>{a}.run(threads);
#endif
    return CF_INVALID_ARGUMENT;
}

inline int winograd_pack(const cf_pack_args& a, int64_t threads) {
    return with_type(a.weight.dtype, [&](auto type) {
        typedef decltype(type) S;
        return a.form == CF_WINOGRAD_2 ? winograd_pack_of<S, 2>(a, threads) : winograd_pack_of<S, 4>(a, threads);
    });
}

}  // namespace
}  // namespace cf
