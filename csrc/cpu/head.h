// The op and step `dual_head`: from the features h, the direction by a 3x3 convolution to the few channels of a latent
// (16 in emoji-64, 4 in m and l), and the distance, softplus(linear(mean over positions of h)); with sample R and
// anchor p, direction += (p - R) / |p - R| and distance *= |p - R|.
//
// Memory traffic. h is all there is to read, and both heads want it: PyTorch reads it once for each. Here an item of
// work is a few rows of a sample. Each row of h is read once from memory, into a ring of three rows with a border of
// zeros, and multiplied with the distance's weights on the way; the convolution then reads the ring, which stays in a
// cache. (Rows beside an item's are read by two items.)
//
// Inner loop (convolve). With 4 outputs, the inner loop of convolution.h would leave three quarters of each vector of
// 16 empty. So here the vectors run along the input's channels: PIXELS x OUT sums stay in registers, each a vector of
// partial sums, whose lanes are added up at the end. At 4 x 4, a vector of each position and of each output makes 8
// loads for 16 products. Adding up the lanes is work too; on AVX-512 all sixteen vectors are folded into one together.
//
// The ring and the taps are float32, or bfloat16 for bfloat16 features where the processor multiplies those
// (VDPBF16PS), for half the cache and twice the products an instruction.
//
// Measured (benchmarks/results/cpu/kernels.csv; 2 threads): 2.5 times as fast as eager PyTorch in float32 and 3.3 times
// in bfloat16, at the median.
#pragma once

#include <math.h>

#include "check.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_dual_head_args& a) {
    return valid_dtype(a.dtype) && valid(a.direction_weight) && valid(a.direction_bias) && valid(a.distance_weight) &&
           valid(a.distance_bias) && valid(a.sample) && valid(a.anchor) && valid(a.direction) && a.n >= 0 && a.c >= 1 &&
           a.cz >= 1 && a.height >= 1 && a.width >= 1 &&
           (a.n == 0 || !a.sample.data == !a.anchor.data);  // an empty tensor has any address
}

constexpr int OUT = 4;                   // output channels of a tile
constexpr int PIXELS = W == 16 ? 4 : 2;  // positions of a tile

// f(row, dense) for row y of sample n: a pointer to t[n, 0, y, 0] of the dtype's type, and whether the row's elements
// lie in memory as (x, c) without gaps.
template <class F>
void with_row(const cf_tensor4& t, int64_t n, int64_t y, int64_t channels, const F& f) {
    with_type(t.dtype, [&](auto type) {
        typedef decltype(type) T;
        T* row = const_cast<T*>(static_cast<const T*>(t.data)) + n * t.strides[0] + y * t.strides[2];
        f(row, t.strides[1] == 1 && t.strides[3] == channels);
        return 0;
    });
}

// out[x, c] = t[n, c, y, x] for one row of pixels.
inline void read_row(const cf_tensor4& t, int64_t n, int64_t y, int64_t channels, int64_t width, float* out) {
    with_row(t, n, y, channels, [&](auto* row, bool dense) {
        if (dense) return widen(row, out, width * channels);
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t x = 0; x < width; ++x)
                out[x * channels + c] = to_float(row[c * t.strides[1] + x * t.strides[3]]);
    });
}

inline void assign(float& to, float value) { to = value; }
inline void assign(half& to, float value) { to = to_half(value); }
inline void assign(bfloat& to, float value) { to = {narrow(broadcast(value))[0]}; }

// t[n, c, y, x] = values[x, c] for one row of pixels.
inline void write_row(const cf_tensor4& t, int64_t n, int64_t y, int64_t channels, int64_t width, const float* values) {
    with_row(t, n, y, channels, [&](auto* row, bool dense) {
        if (!dense) {
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t x = 0; x < width; ++x)
                    assign(row[c * t.strides[1] + x * t.strides[3]], values[x * channels + c]);
            return;
        }
        const int64_t size = width * channels;
        int64_t i = 0;
        for (; i + W <= size; i += W) store(row + i, load(values + i));
        if (i < size) store_part(row + i, load_part(values + i, size - i), size - i);
    });
}

// out = anchor - sample, (width, cz), in row y of sample n; `other` is memory of the same size.
inline void offset_row(const cf_dual_head_args& a, int64_t n, int64_t y, float* out, float* other) {
    read_row(a.anchor, n, y, a.cz, a.width, out);
    read_row(a.sample, n, y, a.cz, a.width, other);
    for (int64_t i = 0; i < a.cz * a.width; ++i) out[i] -= other[i];
}

// What the ring holds for features of type T.
template <class T>
struct Ring {
    typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct Ring<bfloat> {
    typedef bfloat type;
};
#endif
// How many of them a vector has.
template <class R>
constexpr int64_t LANES = 4 * W / static_cast<int64_t>(sizeof(R));

inline vf load_raw(const float* p) { return load(p); }
inline vf multiply_add(vf a, vf b, vf sum) { return fma(a, b, sum); }
#if defined(__AVX512BF16__)
inline __m512bh load_raw(const bfloat* p) {
    __m512bh v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline vf multiply_add(__m512bh a, __m512bh b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#endif

// The sums of PIXELS neighbouring positions and OUT output channels. `rows` point at the left neighbour of the first
// position, in three rows of `padded` channels a position; the weights are (3 rows, 3 positions, padded / LANES, OUT,
// LANES), in the order in which they are read.
template <class R>
void convolve(const R* const rows[3], int64_t padded, const R* weights, float out[PIXELS][OUT]) {
    vf sums[PIXELS][OUT] = {};
    for (int i = 0; i < 3; ++i) {
        const R* in = rows[i];
        for (int64_t k = 0; k < 3 * padded; k += LANES<R>, weights += OUT * LANES<R>) {
            decltype(load_raw(weights)) w[OUT];
            for (int o = 0; o < OUT; ++o) w[o] = load_raw(weights + o * LANES<R>);
            for (int p = 0; p < PIXELS; ++p) {
                const auto value = load_raw(in + p * padded + k);
                for (int o = 0; o < OUT; ++o) sums[p][o] = multiply_add(value, w[o], sums[p][o]);
            }
        }
    }
#if CF_WIDTH == 16
    // All sixteen sums over lanes at once: each step adds the halves of two vectors into one. 15 additions, where one
    // vector alone takes 4.
    static_assert(OUT == 4 && PIXELS == 4, "");
    __m512 quads[4], eights[2];
    for (int p = 0; p < PIXELS; ++p) {
        __m512d pairs[2];
        for (int i = 0; i < 2; ++i) {
            const __m512 a = (__m512)sums[p][2 * i], b = (__m512)sums[p][2 * i + 1];
            pairs[i] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        }
        quads[p] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
    }
    for (int i = 0; i < 2; ++i)
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    _mm512_storeu_ps(out[0], _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                                           _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd)));
#else
    for (int p = 0; p < PIXELS; ++p)
        for (int o = 0; o < OUT; ++o) out[p][o] = sum(sums[p][o]);
#endif
}

// Copies row y of sample n into `row`, with zeros around it, and returns the sum of its products with the distance's
// weights.
template <class T, class R>
double fill_row(const cf_dual_head_args& a, int64_t n, int64_t y, int64_t padded, int64_t padded_width,
                const float* weights, R* row) {
    const size_t pixel = static_cast<size_t>(padded) * sizeof(R);
    if (y < 0 || y >= a.height) {
        memset(row, 0, pixel * (padded_width + 2));
        return 0;
    }
    memset(row, 0, pixel);
    memset(row + (a.width + 1) * padded, 0, pixel * (padded_width + 1 - a.width));
    const T* h = static_cast<const T*>(a.h) + (n * a.height + y) * a.width * a.c;
    vf even = {}, odd = {};
    for (int64_t x = 0; x < a.width; ++x, h += a.c) {
        R* to = row + (x + 1) * padded;
        for (int64_t c = 0; c < padded; c += W) {
            const vf value = a.c - c >= W ? load(h + c) : (a.c > c ? load_part(h + c, a.c - c) : vf{});
            store(to + c, value);
            vf& total = x & 1 ? odd : even;
            total = fma(value, load(weights + c), total);
        }
    }
    return sum(even + odd);
}

template <class T>
struct DualHead {
    typedef typename Ring<T>::type R;

    const cf_dual_head_args& a;
    // channels, positions and outputs in whole vectors and tiles
    const int64_t padded = round_up(a.c, LANES<R>), padded_width = round_up(a.width, PIXELS),
                  outs = round_up(a.cz, OUT);
    // An item of work is so many rows of a sample. By the shape alone: the distance's sum is made item by item.
    const int64_t rows = a.height < 64 ? 4 : ceil_div(a.height, 16), items = ceil_div(a.height, rows);
    const int64_t taps = 9 * padded * outs, row_values = a.cz * a.width;
    const bool anchored = a.anchor.data;

    // Results of the items and the parameters, in scratch memory.
    double* partial = nullptr;          // (n, items), parts of the distance's sum
    R* weights = nullptr;               // as convolve reads them, OUT outputs behind one another
    float* distance_weights = nullptr;  // (padded)
    float* biases = nullptr;            // (outs)
    float* channels = nullptr;          // (padded), for a row of weights on its way
    float* lengths = nullptr;           // (n), |p - R|

    int run(int64_t threads) {
        if (!allocate()) return CF_OUT_OF_MEMORY;
        read_parameters();
        if (anchored) {
            const int status = find_lengths(a.n * row_values * a.height < 64 << 10 ? 1 : threads);
            if (status != CF_OK) return status;
        }
        const size_t row_size = static_cast<size_t>((padded_width + 2) * padded);
        const size_t bytes =
            3 * row_size * sizeof(R) + static_cast<size_t>(outs * padded_width + 2 * row_values) * sizeof(float);
        // starting a second thread costs as much as so many products
        if (a.n * a.height * a.width * taps < 512 << 10) threads = 1;
        const int status =
            parallel_for_with_scratch(a.n * items, threads, bytes, [&](void* memory, int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item) run_item(item, static_cast<R*>(memory), row_size);
            });
        if (status != CF_OK) return status;
        for (int64_t n = 0; n < a.n; ++n) a.distance[n] = distance(n);
        return CF_OK;
    }

    bool allocate() {
        const size_t partial_bytes = static_cast<size_t>(a.n * items) * sizeof(double),
                     taps_bytes = static_cast<size_t>(taps) * sizeof(R);
        const size_t floats = static_cast<size_t>(2 * padded + outs + a.n);
        char* memory = static_cast<char*>(scratch(CALL_SCRATCH, partial_bytes + taps_bytes + floats * sizeof(float)));
        if (!memory) return false;
        partial = reinterpret_cast<double*>(memory);
        weights = reinterpret_cast<R*>(memory + partial_bytes);
        distance_weights = reinterpret_cast<float*>(memory + partial_bytes + taps_bytes);
        biases = distance_weights + padded;
        channels = biases + outs;
        lengths = channels + padded;
        memset(weights, 0, taps_bytes);
        memset(distance_weights, 0, static_cast<size_t>(2 * padded + outs) * sizeof(float));
        return true;
    }

    // Weights are packed in every call: they are few, and so the op needs no packed copy of them.
    void read_parameters() {
        for (int64_t o = 0; o < a.cz; ++o)
            for (int64_t tap = 0; tap < 9; ++tap) {
                widen(a.direction_weight, (o * 9 + tap) * a.c, channels, a.c);  // what is behind them stays 0
                R* to = weights + (o / OUT * 9 + tap) * padded * OUT + o % OUT * LANES<R>;
                for (int64_t c = 0; c < padded; c += LANES<R>)
                    for (int64_t i = 0; i < LANES<R>; i += W) store(to + c * OUT + i, load(channels + c + i));
            }
        widen(a.distance_weight, 0, distance_weights, a.c);
        widen(a.direction_bias, 0, biases, a.cz);
    }

    // Before the directions, each of which is divided by its sample's.
    int find_lengths(int64_t threads) {
        const size_t bytes = 2 * static_cast<size_t>(row_values) * sizeof(float);
        return parallel_for_with_scratch(a.n, threads, bytes, [&](void* memory, int64_t begin, int64_t end) {
            float* offset = static_cast<float*>(memory);
            for (int64_t n = begin; n < end; ++n) {
                double square = 0;
                for (int64_t y = 0; y < a.height; ++y) {
                    offset_row(a, n, y, offset, offset + row_values);
                    for (int64_t i = 0; i < row_values; ++i) square += offset[i] * offset[i];
                }
                lengths[n] = sqrtf(static_cast<float>(square / static_cast<double>(row_values * a.height)));
            }
        });
    }

    // The directions of some rows of a sample, and their part of the distance. ring: three rows of row_size, and room
    // for results.
    void run_item(int64_t item, R* ring, size_t row_size) {
        float* result = reinterpret_cast<float*>(ring + 3 * row_size);  // (padded_width, outs)
        float* values = result + outs * padded_width;                   // (width, cz)
        float* other = values + row_values;
        const int64_t n = item / items, first = item % items * rows, last = min(first + rows, a.height);
        // row y lies in place (y + 3) % 3 of the ring, which also holds for row -1, above the image
        const auto fill = [&](int64_t y) {
            return fill_row<T, R>(a, n, y, padded, padded_width, distance_weights, ring + (y + 3) % 3 * row_size);
        };
        double pooled = 0;
        fill(first - 1);  // the rows before and after are other items' part of the distance
        pooled += fill(first);
        for (int64_t y = first; y < last; ++y) {
            const double next = fill(y + 1);
            if (y + 1 < last) pooled += next;
            for (int64_t o = 0; o < outs; o += OUT)
                for (int64_t x = 0; x < padded_width; x += PIXELS) {
                    const R* rows_at[3];
                    for (int i = 0; i < 3; ++i) rows_at[i] = ring + (y + i + 2) % 3 * row_size + x * padded;
                    float block[PIXELS][OUT];
                    convolve<R>(rows_at, padded, weights + o / OUT * 9 * padded * OUT, block);
                    for (int i = 0; i < PIXELS; ++i) memcpy(result + (x + i) * outs + o, block[i], sizeof block[i]);
                }
            float inverse = 0;
            if (anchored) {
                offset_row(a, n, y, values, other);
                inverse = 1 / (lengths[n] < 1e-6f ? 1e-6f : lengths[n]);
            } else {
                memset(values, 0, static_cast<size_t>(row_values) * sizeof(float));
            }
            for (int64_t x = 0; x < a.width; ++x)
                for (int64_t o = 0; o < a.cz; ++o)
                    values[x * a.cz + o] = result[x * outs + o] + biases[o] + values[x * a.cz + o] * inverse;
            write_row(a.direction, n, y, a.cz, a.width, values);
        }
        partial[item] = pooled;
    }

    // From the parts of sample n, in their order.
    float distance(int64_t n) const {
        double logit = 0;
        for (int64_t i = 0; i < items; ++i) logit += partial[n * items + i];
        logit = logit / static_cast<double>(a.height * a.width) + element(a.distance_bias, 0);
        // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which does not overflow
        const double positive = logit > 0 ? logit : 0;
        const double softplus = logit == logit ? positive + log1p(exp(logit > 0 ? -logit : logit)) : logit;
        return static_cast<float>(anchored ? softplus * lengths[n] : softplus);
    }
};

inline int dual_head(const cf_dual_head_args& a, int64_t threads) {
    if (a.n == 0) return CF_OK;
    return with_type(a.dtype, [&](auto type) { return DualHead<decltype(type)>{a}.run(threads); });
}

}  // namespace
}  // namespace cf
