// The steps of a network that are no ops by themselves: convolution, gathering its input, attention, and normalisation into its input.
//
// A convolution is a matrix product without the matrix: M positions of the output and V vectors of output channels are summed in registers;
// of every position and tap four bytes of channels at a time (one float32, two bfloat16, four uint8) are broadcast and multiplied with V
// packed vectors of weights. Images that 3x3 convolutions read have a border, so that no tap needs a test. The order of every sum depends
// on the weights' shape alone.
#pragma once

#include "group_norm.h"
#include "head.h"

namespace cf {
namespace {

constexpr int MOST_POSITIONS = W == 16 ? 6 : 4, MOST_VECTORS = W == 16 ? 4 : 3;
constexpr int64_t X_IN_CACHE = 200 << 10;  // bytes of an image, beside a block of weights

// E: the elements that are multiplied. Sum: a vector of their sums; products(a, b, sum): of four bytes broadcast and a vector of weights.
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
inline __m512i broadcast_quad(const char* x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return _mm512_set1_epi32(value);
}
template <>
struct Products<bfloat> {
    typedef vf Sum;
    static constexpr int64_t LANES = 2;
    static vf add(const char* x, const char* w, vf sum) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast_quad(x), (__m512bh)_mm512_loadu_si512(w));
    }
};
template <>
struct Products<uint8_t> {
    typedef vi Sum;
    static constexpr int64_t LANES = 4;
    static vi add(const char* x, const char* w, vi sum) {
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, broadcast_quad(x), _mm512_loadu_si512(w));
    }
};
#endif

// What `cf_cpu_products` says.
#if defined(__AVX512BF16__)
constexpr int PRODUCTS = 3;
#else
constexpr int PRODUCTS = 0;
#endif

inline vf to_floats(vf v) { return v; }
inline vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// sums[m][v] over `count` byte offsets and, from each, `quads` units of four bytes: x[m] are positions, w is the block of weights.
template <class E, int M, int V>
inline void multiply(const char* const* x, const int64_t* offsets, int64_t count, int64_t quads, const char* w,
                     typename Products<E>::Sum (&sums)[MOST_POSITIONS][MOST_VECTORS]) {
    typename Products<E>::Sum s[M][V] = {};
    const char* at[M];
    for (int m = 0; m < M; ++m) at[m] = x[m];
    for (int64_t i = 0; i < count; ++i)
        for (int64_t q = offsets[i], end = q + 4 * quads; q < end; q += 4, w += V * 4 * W)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) s[m][v] = Products<E>::add(at[m] + q, w + v * 4 * W, s[m][v]);
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) sums[m][v] = s[m][v];
}

template <class E, int V>
inline void multiply_some(int64_t positions, const char* const* x, const int64_t* offsets, int64_t count, int64_t quads,
                          const char* w, typename Products<E>::Sum (&sums)[MOST_POSITIONS][MOST_VECTORS]) {
    switch (positions) {
#if CF_WIDTH == 16
        case 6:
            return multiply<E, 6, V>(x, offsets, count, quads, w, sums);
        case 5:
            return multiply<E, 5, V>(x, offsets, count, quads, w, sums);
#endif
        case 4:
            return multiply<E, 4, V>(x, offsets, count, quads, w, sums);
        case 3:
            return multiply<E, 3, V>(x, offsets, count, quads, w, sums);
        case 2:
            return multiply<E, 2, V>(x, offsets, count, quads, w, sums);
        default:
            return multiply<E, 1, V>(x, offsets, count, quads, w, sums);
    }
}

template <class E>
inline void multiply_any(int64_t vectors, int64_t positions, const char* const* x, const int64_t* offsets,
                         int64_t count, int64_t quads, const char* w,
                         typename Products<E>::Sum (&sums)[MOST_POSITIONS][MOST_VECTORS]) {
    if (vectors == 4) return multiply_some<E, 4>(positions, x, offsets, count, quads, w, sums);
    if (vectors == 3) return multiply_some<E, 3>(positions, x, offsets, count, quads, w, sums);
    if (vectors == 2) return multiply_some<E, 2>(positions, x, offsets, count, quads, w, sums);
    return multiply_some<E, 1>(positions, x, offsets, count, quads, w, sums);
}

template <class T>
inline void store_some(T* y, vf value, int64_t count) {
    count == W ? store(y, value) : store_part(y, value, count);
}

template <class T>
inline vf load_some(const T* x, int64_t count) {
    return count == W ? load(x) : load_part(x, count);
}

// How vectors of outputs are divided into blocks.
struct Blocks {
    int64_t count, least, larger;
    explicit Blocks(int64_t vectors)
        : count((vectors + MOST_VECTORS - 1) / MOST_VECTORS), least(vectors / count), larger(vectors % count) {}
    int64_t size(int64_t block) const { return least + (block < larger); }
    int64_t first(int64_t block) const { return block * least + (block < larger ? block : larger); }
    // The first block after `vectors` of them.
    int64_t after(int64_t vectors) const {
        const int64_t in_larger = larger * (least + 1);
        return vectors < in_larger ? vectors / (least + 1) : larger + (vectors - in_larger) / least;
    }
};

struct Position {
    int64_t n, y, x;
    void next(int64_t height, int64_t width) {
        if (++x < width) return;
        x = 0;
        if (++y < height) return;
        y = 0;
        ++n;
    }
};

// The border of sample n: `pixel` bytes a position, from `zero`, or 0 bytes.
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

template <class E, class T>
int convolution_typed(const cf_convolution_args& a, int64_t threads) {
    typedef Products<E> P;
    const int64_t pixel = a.channels * static_cast<int64_t>(sizeof(E)),
                  out = a.outputs * static_cast<int64_t>(sizeof(T));
    const int64_t quads = pixel / 4, vectors = (a.outputs + W - 1) / W, positions = a.n * a.height * a.width;
    const Blocks blocks(vectors);
    // the three taps of a row lie behind one another, in the image and in the weights
    const int64_t rows = a.taps == 9 ? 3 : 1, offsets[3] = {0, a.x.row, 2 * a.x.row};
    // a border that a 1x1 convolution does not look at
    const int64_t origin = a.taps == 1 ? a.x.border * (a.x.row + pixel) : 0;
    const int64_t tiles = (positions + MOST_POSITIONS - 1) / MOST_POSITIONS;

    const auto address = [](const cf_image& image, const Position& p, int64_t size) {
        return static_cast<char*>(image.data) + p.n * image.sample + (p.y + image.border) * image.row +
               (p.x + image.border) * size;
    };
    const auto run_block = [&](int64_t block, int64_t first_tile, int64_t last_tile) {
        const int64_t V = blocks.size(block), first = blocks.first(block);
        const char* w = static_cast<const char*>(a.weight) + first * a.taps * quads * 4 * W;
        const int64_t begin = first_tile * MOST_POSITIONS, stop = last_tile * MOST_POSITIONS,
                      end = stop < positions ? stop : positions;
        Position p{begin / (a.height * a.width), begin / a.width % a.height, begin % a.width};
        for (int64_t i = begin; i < end; i += MOST_POSITIONS) {
            const int64_t count = end - i < MOST_POSITIONS ? end - i : MOST_POSITIONS;
            const char* x[MOST_POSITIONS];
            Position at[MOST_POSITIONS];
            for (int64_t m = 0; m < count; ++m) {
                at[m] = p;
                x[m] = static_cast<const char*>(a.x.data) + origin + p.n * a.x.sample + p.y * a.stride * a.x.row +
                       p.x * a.stride * pixel;
                p.next(a.height, a.width);
            }
            typename P::Sum sums[MOST_POSITIONS][MOST_VECTORS];
            multiply_any<E>(V, count, x, offsets, rows, quads * rows, w, sums);
            for (int64_t v = 0; v < V; ++v) {
                const int64_t c = (first + v) * W, part = a.outputs - c < W ? a.outputs - c : W;
                const vf bias = a.bias ? load_some(a.bias + c, part) : vf{},
                         scale = a.scale ? load_some(a.scale + c, part) : vf{};
                for (int64_t m = 0; m < count; ++m) {
                    vf value = to_floats(sums[m][v]);
                    value = a.scale ? fma(value, scale, bias) : value + bias;
                    if (a.residual.data) {
                        value += load_some(reinterpret_cast<const T*>(address(a.residual, at[m], out)) + c, part);
                    }
                    if (a.relu) value = value > 0.0f ? value : (value == value ? vf{} : value);
                    store_some(reinterpret_cast<T*>(address(a.y, at[m], out)) + c, value, part);
                }
            }
        }
    };
    const int64_t x_bytes = a.n * a.x.sample, w_bytes = vectors * W * a.taps * pixel;
    if (x_bytes > w_bytes) {
        // Threads share the positions, and take as many of them through all weights as a second-level cache holds.
        const int64_t chunk = X_IN_CACHE * tiles / x_bytes + 1;
        parallel_for(tiles, threads, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; tile += chunk)
                for (int64_t block = 0; block < blocks.count; ++block)
                    run_block(block, tile, tile + chunk < end ? tile + chunk : end);
        });
    } else {
        // Threads share the weights, blocks times tiles, a block counting for its vectors.
        const int64_t units = vectors * tiles;
        parallel_for(units, threads, [&](int64_t begin, int64_t end) {
            // the tile of a block that a unit is in; a unit between two tiles belongs to the later thread
            const auto split = [&](int64_t unit, int64_t& block, int64_t& tile) {
                block = unit >= units ? blocks.count : blocks.after(unit / tiles);
                tile = block < blocks.count ? (unit - blocks.first(block) * tiles) / blocks.size(block) : 0;
            };
            int64_t block, tile, last_block, last_tile;
            split(begin, block, tile);
            split(end, last_block, last_tile);
            for (; block < last_block; ++block, tile = 0) run_block(block, tile, tiles);
            if (tile < last_tile) run_block(block, tile, last_tile);
        });
    }
    for (int64_t n = 0; n < a.n && a.y.border; ++n) write_border(a.y, n, a.height, a.width, out, nullptr);
    return CF_OK;
}

inline int convolution(const cf_convolution_args& a, int64_t threads) {
    if (a.x.dtype == CF_FLOAT32) return convolution_typed<float, float>(a, threads);
#if defined(__AVX512BF16__)
    const bool wide = a.y.dtype == CF_FLOAT32;
    if (a.x.dtype == CF_BFLOAT16)
        return wide ? convolution_typed<bfloat, float>(a, threads) : convolution_typed<bfloat, bfloat>(a, threads);
    if (a.x.dtype == CF_UINT8)
        return wide ? convolution_typed<uint8_t, float>(a, threads) : convolution_typed<uint8_t, bfloat>(a, threads);
#endif
    return CF_INVALID_ARGUMENT;
}

// Stores to an image's elements, as T or, quantised, as uint8.
template <class T>
struct ImageRow {
    T* y;
    const float* inverse;
    const uint8_t* zero;
    void whole(int64_t c, vf value) const { store(y + c, value); }
    void part(int64_t c, vf value, int64_t count) const { store_part(y + c, value, count); }
};
template <>
struct ImageRow<uint8_t> {
    uint8_t* y;
    const float* inverse;
    const uint8_t* zero;
    void part(int64_t c, vf value, int64_t count) const {
        value *= count == W ? load(inverse + c) : load_part(inverse + c, count);
        for (int64_t i = 0; i < count; ++i) {
            const float q = nearbyintf(value[i]) + static_cast<float>(zero[c + i]);
            y[c + i] = static_cast<uint8_t>(q > 255 ? 255 : (q > 0 ? q : 0));
        }
    }
    void whole(int64_t c, vf value) const {
#if CF_WIDTH == 16
        // what is large stays so as an integer; NaN, as the second of the two, becomes the least one, and then 0
        const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(255), (__m512)(value * load(inverse + c))));
        const __m512i shifted =
            _mm512_add_epi32(q, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + c))));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + c),
                         _mm512_cvtusepi32_epi8(_mm512_max_epi32(shifted, _mm512_setzero_si512())));
#else
        part(c, value, W);
#endif
    }
};

template <class T>
struct ImageTarget {
    cf_image image;
    int64_t width, channels, spatial;
    cf_quantisation quantisation;

    ImageRow<T> row(int64_t n, int64_t r) const {
        const int64_t y = r / width, x = r - y * width, b = image.border,
                      pixel = channels * static_cast<int64_t>(sizeof(T));
        char* at = static_cast<char*>(image.data) + n * image.sample + (y + b) * image.row + (x + b) * pixel;
        return {reinterpret_cast<T*>(at), quantisation.inverse, quantisation.zero};
    }
    void finish(int64_t n, int64_t begin, int64_t) const {
        if (begin == 0)
            write_border(image, n, spatial / width, width, channels * static_cast<int64_t>(sizeof(T)),
                         quantisation.zero);
    }
};

inline int group_norm_image(const cf_group_norm_image_args& a, int64_t threads) {
    const cf_group_norm_silu_args& norm = a.norm;
    const auto run = [&](auto type, auto out) {
        typedef decltype(type) T;
        const ImageTarget<decltype(out)> target{a.y, a.width, norm.c1 + norm.c2, norm.spatial, a.quantisation};
        return norm.silu ? share_rows<T, true>(norm, threads, IN_A_TEAM, target)
                         : share_rows<T, false>(norm, threads, IN_A_TEAM, target);
    };
    if (norm.dtype == CF_FLOAT32) return a.y.dtype == CF_UINT8 ? run(float{}, uint8_t{}) : run(float{}, float{});
    if (norm.dtype == CF_BFLOAT16) return a.y.dtype == CF_UINT8 ? run(bfloat{}, uint8_t{}) : run(bfloat{}, bfloat{});
    return CF_INVALID_ARGUMENT;
}

template <class T>
int gather_typed(const cf_gather_args& a, int64_t threads) {
    const int64_t pixel = a.y_channels * static_cast<int64_t>(sizeof(T));
    parallel_for(a.n * a.height, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / a.height, y = item % a.height;
            char* to = static_cast<char*>(a.y.data) + n * a.y.sample + (y + a.y.border) * a.y.row + a.y.border * pixel;
            int64_t offset = 0;
            for (int i = 0; i < 2; offset += a.channels[i++]) {
                if (!a.channels[i]) continue;
                with_type(a.parts[i].dtype, [&](auto type) {
                    typedef decltype(type) S;
                    const cf_tensor4& t = a.parts[i];
                    const S* from = static_cast<const S*>(t.data) + n * t.strides[0] + y / a.factor * t.strides[2];
                    for (int64_t x = 0; x < a.width; ++x) {
                        const S* position = from + x / a.factor * t.strides[3];
                        T* y_at = reinterpret_cast<T*>(to + x * pixel) + offset;
                        int64_t c = 0;
                        if (t.strides[1] == 1)
                            for (; c + W <= a.channels[i]; c += W) store(y_at + c, load(position + c));
                        for (; c < a.channels[i]; ++c)
                            store_part(y_at + c, broadcast(to_float(position[c * t.strides[1]])), 1);
                    }
                    return 0;
                });
            }
            const int64_t used = offset * static_cast<int64_t>(sizeof(T));
            for (int64_t x = 0; x < a.width && used < pixel; ++x)
                memset(to + x * pixel + used, 0, static_cast<size_t>(pixel - used));
            if (y == 0) write_border(a.y, n, a.height, a.width, pixel, nullptr);
        }
    });
    return CF_OK;
}

// e^x for x <= 0, to two ulps, and 0 below e^-87; NaN stays NaN.
inline vf exponential(vf x) {
    const vf t = x * 1.44269504f;
    const vi tiny = t < -126.0f;
    return tiny ? vf{} : power_of_two(tiny ? broadcast(-126.0f) : t);
}

// erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
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

// f(c, value, count) for every vector of `channels` numbers; the last may have fewer of them.
template <class T, class F>
inline void each_vector(const T* x, int64_t channels, const F& f) {
    int64_t c = 0;
    for (; c + W <= channels; c += W) f(c, load(x + c), W);
    if (c < channels) f(c, load_part(x + c, channels - c), channels - c);
}

template <class T>
int layer_norm_typed(const cf_layer_norm_args& a, int64_t threads) {
    parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* x = static_cast<const T*>(a.x) + r * a.channels;
            vf total = {}, squares = {};
            each_vector(x, a.channels, [&](int64_t, vf value, int64_t) { total += value; });
            const float mean = sum(total) / static_cast<float>(a.channels);
            each_vector(x, a.channels, [&](int64_t, vf value, int64_t count) {
                vf d = value - mean;
                for (int64_t i = count; i < W; ++i) d[i] = 0;
                squares = fma(d, d, squares);
            });
            const float inverse = 1 / sqrtf(sum(squares) / static_cast<float>(a.channels) + static_cast<float>(a.eps));
            T* y = static_cast<T*>(a.y) + r * a.channels;
            each_vector(x, a.channels, [&](int64_t c, vf value, int64_t count) {
                const vf weight = load_some(a.weight + c, count), bias = load_some(a.bias + c, count);
                store_some(y + c, fma((value - mean) * inverse, weight, bias), count);
            });
        }
    });
    return CF_OK;
}

template <class T>
int gate_typed(const cf_gate_args& a, int64_t threads) {
    parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T *value = static_cast<const T*>(a.value) + r * a.stride,
                    *gate = static_cast<const T*>(a.gate) + r * a.stride;
            T* y = static_cast<T*>(a.y) + r * a.channels;
            each_vector(gate, a.channels, [&](int64_t c, vf g, int64_t count) {
                store_some(y + c, load_some(value + c, count) * gelu(g), count);
            });
        }
    });
    return CF_OK;
}

// tanh x: of |x| < 0.625 by Cephes' polynomial, of others (1 - e) / (1 + e) with e = e^(-2 |x|), and x's sign; NaN stays NaN.
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

template <class T>
int pointwise_typed(const cf_pointwise_args& a, int64_t threads) {
    const vf x_scale = broadcast(static_cast<float>(a.x_scale)), x_shift = broadcast(static_cast<float>(a.x_shift));
    const vf y_scale = broadcast(static_cast<float>(a.y_scale)), y_shift = broadcast(static_cast<float>(a.y_shift));
    parallel_for((a.count + W - 1) / W, threads, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * W, stop = end * W < a.count ? end * W : a.count;
        const T *x = static_cast<const T*>(a.x) + first,
                *residual = a.residual ? static_cast<const T*>(a.residual) + first : nullptr;
        T* y = static_cast<T*>(a.y) + first;
        each_vector(x, stop - first, [&](int64_t c, vf value, int64_t count) {
            value = fma(value, x_scale, x_shift);
            if (a.function == CF_SILU) value = silu(value);
            if (a.function == CF_TANH) value = hyperbolic_tangent(value);
            value = fma(value, y_scale, y_shift);
            if (residual) value += load_some(residual + c, count);
            store_some(y + c, value, count);
        });
    });
    return CF_OK;
}

inline int replace_zero_rows(const cf_replace_zero_rows_args& a, int64_t threads) {
    parallel_for(a.rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const float* x = a.x + r * a.channels;
            bool zero = true;
            for (int64_t c = 0; c < a.channels; ++c) zero = zero && x[c] == 0;
            memcpy(a.y + r * a.channels, zero ? a.row : x, static_cast<size_t>(a.channels) * sizeof(float));
        }
    });
    return CF_OK;
}

// f with a float or bfloat of the dtype.
template <class F>
inline int with_activation(int64_t dtype, const F& f) {
    return dtype == CF_FLOAT32 ? f(float{})
                               : (dtype == CF_BFLOAT16 ? f(bfloat{}) : static_cast<int>(CF_INVALID_ARGUMENT));
}

inline int gather(const cf_gather_args& a, int64_t threads) {
    return with_activation(a.y.dtype, [&](auto type) { return gather_typed<decltype(type)>(a, threads); });
}

inline int layer_norm(const cf_layer_norm_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto type) { return layer_norm_typed<decltype(type)>(a, threads); });
}

inline int pointwise(const cf_pointwise_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto type) { return pointwise_typed<decltype(type)>(a, threads); });
}

inline int gate(const cf_gate_args& a, int64_t threads) {
    return with_activation(a.dtype, [&](auto type) { return gate_typed<decltype(type)>(a, threads); });
}

inline float largest(const float* row, int64_t count) {
    float most = row[0];
    for (int64_t i = 1; i < count; ++i) most = row[i] > most ? row[i] : most;
    return most;
}

// Keys and values of every sample and head are packed like weights; then an item is a few rows of queries of one head.
template <class T>
int attention_typed(const cf_attention_args& a, int64_t threads) {
    typedef Products<T> P;
    constexpr int64_t SIZE = sizeof(T), LANES = P::LANES;
    const int64_t k_vectors = (a.k_length + W - 1) / W, v_vectors = (a.width + W - 1) / W, heads = a.n * a.heads;
    const int64_t k_quads = a.width / LANES, v_quads = (a.k_length + LANES - 1) / LANES, keys = k_vectors * W;
    const Blocks k_blocks(k_vectors), v_blocks(v_vectors);
    const int64_t k_bytes = k_vectors * k_quads * 4 * W, v_bytes = v_vectors * v_quads * 4 * W;
    char* memory = static_cast<char*>(scratch(0, static_cast<size_t>(heads * (k_bytes + v_bytes))));
    if (!memory) return CF_OUT_OF_MEMORY;
    parallel_for(heads * (k_blocks.count + v_blocks.count), threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / (k_blocks.count + v_blocks.count),
                          part = item % (k_blocks.count + v_blocks.count);
            const bool is_key = part < k_blocks.count;
            const int64_t block = is_key ? part : part - k_blocks.count, n = head / a.heads, h = head % a.heads;
            const Blocks& blocks = is_key ? k_blocks : v_blocks;
            const int64_t V = blocks.size(block), first = blocks.first(block), quads = is_key ? k_quads : v_quads;
            const cf_heads& source = is_key ? a.k : a.v;
            const T* from = static_cast<const T*>(source.data) + n * source.sample + h * source.head_stride;
            const int64_t row = source.row;
            T* to = reinterpret_cast<T*>(memory + head * (k_bytes + v_bytes) + (is_key ? 0 : k_bytes) +
                                         first * quads * 4 * W);
            const int64_t columns = is_key ? a.k_length : a.width;
            for (int64_t q = 0; q < quads; ++q)
                for (int64_t v = 0; v < V; ++v, to += W * LANES) {
                    const int64_t column = (first + v) * W, count = columns - column < W ? columns - column : W;
                    if (is_key) {  // four bytes of each of so many keys
                        for (int64_t i = 0; i < count; ++i)
                            memcpy(to + i * LANES, from + (column + i) * row + q * LANES, 4);
                    } else {  // as many columns of LANES values, interleaved
                        for (int64_t lane = 0; lane < LANES; ++lane) {
                            const T* value = from + (q * LANES + lane) * row + column;
                            if (q * LANES + lane < a.k_length)
                                for (int64_t i = 0; i < count; ++i) to[i * LANES + lane] = value[i];
                            else
                                for (int64_t i = 0; i < count; ++i) to[i * LANES + lane] = T{};
                        }
                    }
                    memset(to + count * LANES, 0, static_cast<size_t>((W - count) * LANES) * sizeof(T));
                }
        }
    });
    const int64_t tiles = (a.length + MOST_POSITIONS - 1) / MOST_POSITIONS, weights_row = v_quads * LANES;
    int status = CF_OK;
    parallel_for(heads * tiles, threads, [&](int64_t begin, int64_t end) {
        float* scores = static_cast<float*>(
            scratch(1, static_cast<size_t>(MOST_POSITIONS) * static_cast<size_t>(keys * 4 + (weights_row + W) * SIZE)));
        if (!scores) {
            __atomic_store_n(&status, CF_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        T* weights = reinterpret_cast<T*>(scores + MOST_POSITIONS * keys);  // rows of weights_row
        const int64_t none[1] = {0};
        for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / tiles, n = head / a.heads, h = head % a.heads,
                          i = item % tiles * MOST_POSITIONS;
            const int64_t count = a.length - i < MOST_POSITIONS ? a.length - i : MOST_POSITIONS;
            const char *packed_k = memory + head * (k_bytes + v_bytes), *packed_v = packed_k + k_bytes;
            typename P::Sum sums[MOST_POSITIONS][MOST_VECTORS];
            const char* x[MOST_POSITIONS];
            const T* queries = static_cast<const T*>(a.q.data) + n * a.q.sample + h * a.q.head_stride;
            for (int64_t m = 0; m < count; ++m) x[m] = reinterpret_cast<const char*>(queries + (i + m) * a.q.row);
            for (int64_t block = 0; block < k_blocks.count; ++block) {
                const int64_t V = k_blocks.size(block), first = k_blocks.first(block);
                multiply_any<T>(V, count, x, none, 1, k_quads, packed_k + first * k_quads * 4 * W, sums);
                for (int64_t m = 0; m < count; ++m)
                    for (int64_t v = 0; v < V; ++v)
                        store(scores + m * keys + (first + v) * W, sums[m][v] * static_cast<float>(a.scale));
            }
            float inverse[MOST_POSITIONS];
            for (int64_t m = 0; m < count; ++m) {
                float* row = scores + m * keys;
                for (int64_t k = 0; k < a.k_length && a.mask; ++k)
                    if (!a.mask[n * a.k_length + k]) row[k] = -__builtin_inff();
                const float found = largest(row, a.k_length), most = found == -__builtin_inff() ? 0 : found;
                for (int64_t k = a.k_length; k < keys; ++k) row[k] = -__builtin_inff();
                vf total = {};
                for (int64_t k = 0; k < keys; k += W) {
                    const vf e = exponential(load(row + k) - most);
                    total += e;
                    store(row + k, e);
                }
                const float all = sum(total);
                inverse[m] = all == 0 ? 0 : 1 / all;  // without keys
                T* to = weights + m * weights_row;
                int64_t k = 0;
                for (; k + W <= weights_row; k += W) store(to + k, load(row + k));
                if (k < weights_row) store_part(to + k, load(row + k), weights_row - k);
                x[m] = reinterpret_cast<const char*>(to);
            }
            for (int64_t block = 0; block < v_blocks.count; ++block) {
                const int64_t V = v_blocks.size(block), first = v_blocks.first(block);
                multiply_any<T>(V, count, x, none, 1, v_quads, packed_v + first * v_quads * 4 * W, sums);
                for (int64_t m = 0; m < count; ++m)
                    for (int64_t v = 0; v < V; ++v) {
                        const int64_t d = (first + v) * W, part = a.width - d < W ? a.width - d : W;
                        T* to = static_cast<T*>(a.y) + ((n * a.length + i + m) * a.heads + h) * a.width + d;
                        store_some(to, sums[m][v] * inverse[m], part);
                    }
            }
        }
    });
    return status;
}

inline int attention(const cf_attention_args& a, int64_t threads) {
    if (a.n == 0) return CF_OK;
    if (a.dtype == CF_FLOAT32) return attention_typed<float>(a, threads);
#if defined(__AVX512BF16__)
    if (a.dtype == CF_BFLOAT16) return attention_typed<bfloat>(a, threads);
#endif
    return CF_INVALID_ARGUMENT;
}

inline int run_step(const cf_step& step, int64_t threads) {
    switch (step.kind) {
#define CF_RUN(name, number, type, function) \
    case CF_##name:                          \
        return function(*static_cast<const type*>(step.args), threads);
        CF_STEPS(CF_RUN)
#undef CF_RUN
        default:
            return CF_INVALID_ARGUMENT;
    }
}

}  // namespace
}  // namespace cf
