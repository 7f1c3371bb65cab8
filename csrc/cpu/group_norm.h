// The op and step `group_norm_silu`: y = act(GN(cat([x, skip], 1) + pre_bias) * (1 + scale) + shift), with GN the
// normalisation by the mean and variance of a group of channels over all positions, and act SiLU or nothing.
//
// Memory traffic. The least is to read x and write y, but a group's mean is known only when all of the group was read:
// so x is read twice. The second reading is free where the sample is still in a cache. All else is folded in: skip is
// read where it lies instead of being concatenated, scale, shift and pre_bias become two numbers a channel
// (Coefficients), and y is written once, for a program in the dtype and layout that the next convolution reads, 8 bits
// and a border included. Where x and y together are larger than the last-level cache, y is written past the caches. On
// such tensors the op runs at 73 % (float32) and 64 % (bfloat16) of the speed of a copy, at the median
// (benchmarks/results/cpu/kernels.csv, 2 threads).
//
// Statistics. E[x^2] - E[x]^2 cancels where the mean is large. Instead, sums of (x - shift) and of its square are taken
// over chunks of a channel's positions, the shift being the mean of a few positions of the channel; chunks are merged
// in double by Chan's rule, in their order; and a group's statistics follow from its channels'. So the result does not
// depend on how chunks are shared among threads. The mean is subtracted as a float, and the rest of it with the offset:
// data a thousand standard deviations from zero keep their precision.
//
// Work is shared in one of two ways, which give the same bits. Where there are enough samples, an item is a sample
// (channels innermost) or a group (contiguous), read for its statistics and then again, from a cache, to be normalised.
// Where there are few, all threads share the positions of one sample, first for the statistics and then to normalise.
// Blocks of channels were shared at first, and are no longer: the pieces of a row that two threads write lie in the
// same cache lines, which they then take from each other again and again.
#pragma once

#include <math.h>

#include "check.h"
#include "image.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_group_norm_silu_args& a) {
    return valid_dtype(a.dtype) && valid(a.weight) && valid(a.bias) && valid(a.pre_bias) && valid(a.scale) &&
           valid(a.shift) && a.n >= 0 && a.c1 >= 1 && a.c2 >= 0 && a.spatial >= 0 && a.groups >= 1 &&
           (a.c1 + a.c2) % a.groups == 0 && a.eps >= 0 && (a.c2 == 0 || a.skip || a.n * a.spatial == 0);
}

inline bool valid(const cf_group_norm_image_args& a) {
    const bool quantised = a.y.dtype == CF_UINT8;
    return valid(a.norm) && valid_activation(a.norm.dtype) && valid(a.y, a.norm.n) &&
           (quantised || a.y.dtype == a.norm.dtype) && valid(a.quantisation, quantised) &&
           (a.norm.x || a.norm.n == 0) && a.norm.spatial >= 1 && a.width >= 1 && a.norm.spatial % a.width == 0;
}

// Elements below which a second thread costs more than it saves, where it starts once (`blocks`) or twice
// (`positions`). In a program the threads are there already, polling, so that they pay off much earlier.
struct Serial {
    int64_t blocks, positions;
};
constexpr Serial IN_AN_OP{32 << 10, 96 << 10}, IN_A_PROGRAM{4 << 10, 12 << 10};

// Positions that a partial sum is taken over: contiguous, and channels innermost. The latter are enough chunks for
// threads to share, and not so many that merging them is work. They depend on the shape alone, as the order of the sums
// must.
constexpr int64_t CONTIGUOUS_CHUNK = 1024;
inline int64_t chunk_of(int64_t spatial) { return spatial < 1024 ? 32 : (spatial < 4096 ? 64 : 128); }

// For every channel of a block: its mean, and the sum of the squared deviations from it, over the positions so far.
struct Channels {
    double *mean, *m2;
};

// For every channel of a block: y = act((x - mean) * factor + offset). The mean is rounded to float, and what was
// rounded off is part of the offset.
struct Coefficients {
    float *mean, *factor, *offset;
};

// Arrays as long as a block of channels, with room for a whole vector behind the last of them, in scratch memory.
struct Workspace {
    Channels channels;
    float *shift, *sums, *squares;                         // of the statistics
    float *weight, *bias, *pre_bias, *scale, *film_shift;  // the parameters
    Coefficients coefficients;

    static constexpr size_t DOUBLES = 2, FLOATS = 11;
    static size_t bytes(int64_t width) {
        return static_cast<size_t>(width + W) * (DOUBLES * sizeof(double) + FLOATS * sizeof(float));
    }

    Workspace(void* memory, int64_t width) {
        const int64_t length = width + W;
        double* doubles = static_cast<double*>(memory);
        channels = {doubles, doubles + length};
        float* next = reinterpret_cast<float*>(doubles + DOUBLES * length);
        float** const arrays[FLOATS] = {&shift,
                                        &sums,
                                        &squares,
                                        &weight,
                                        &bias,
                                        &pre_bias,
                                        &scale,
                                        &film_shift,
                                        &coefficients.mean,
                                        &coefficients.factor,
                                        &coefficients.offset};
        for (float** array : arrays) {
            *array = next;
            next += length;
        }
    }
};

// The channels [offset, offset + width) of a sample, in x or in skip: rows of positions, `stride` elements apart.
template <class T>
struct Part {
    const T* x;
    int64_t stride, offset, width;

    // body(c, get) for every vector of channels: c is its first channel, counted in the sample, and get(r) its value at
    // position r.
    template <class F>
    void each_vector(const F& body) const {
        const int64_t whole = width / W * W, rest = width - whole;
        for (int64_t c = 0; c < whole; c += W)
            body(offset + c, [=, this_x = x + c, s = stride](int64_t r) { return load(this_x + r * s); });
        if (rest)
            body(offset + whole,
                 [=, this_x = x + whole, s = stride](int64_t r) { return load_part(this_x + r * s, rest); });
    }
};

// shift = the mean of up to eight positions from all over the channel, near enough to its mean that sums about it do
// not cancel.
template <class T>
void find_shift(const Part<T>& part, int64_t positions, float* shift) {
    const int64_t few = min(positions, 8);
    part.each_vector([=](int64_t c, const auto& get) {
        vf sum = {};
        for (int64_t i = 0; i < few; ++i) sum += get(i * positions / few);
        store(shift + c, sum / static_cast<float>(few));
    });
}

// sums and squares of x - shift over the positions [begin, end), a chunk.
template <class T>
void chunk_sums(const Part<T>& part, int64_t begin, int64_t end, const float* shift, float* sums, float* squares) {
    part.each_vector([=](int64_t c, const auto&) {
        store(sums + c, vf{});
        store(squares + c, vf{});
    });
    int64_t r = begin;
    // eight rows at a time, so that the sums are loaded and stored once for eight additions; each row is read from left
    // to right
    for (; r + 8 <= end; r += 8)
        part.each_vector([=](int64_t c, const auto& get) {
            const vf base = load(shift + c);
            vf s[2] = {}, q[2] = {};  // two of each, so that an addition need not wait for the one before it
            for (int i = 0; i < 8; ++i) {
                const vf d = get(r + i) - base;
                s[i & 1] += d;
                q[i & 1] = fma(d, d, q[i & 1]);
            }
            store(sums + c, load(sums + c) + (s[0] + s[1]));
            store(squares + c, load(squares + c) + (q[0] + q[1]));
        });
    for (; r < end; ++r)
        part.each_vector([=](int64_t c, const auto& get) {
            const vf d = get(r) - load(shift + c);
            store(sums + c, load(sums + c) + d);
            store(squares + c, fma(d, d, load(squares + c)));
        });
}

// Chan's rule: adds `added` positions of mean `other_mean` and squared deviations `other_m2` to `count` positions.
inline void merge(double& mean, double& m2, double count, double other_mean, double other_m2, double added) {
    const double share = added / (count + added), delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * delta * (count * share);
}

// Merges the sums of the chunk [begin, end) into the statistics of the positions before it.
inline void merge_chunk(int64_t begin, int64_t end, int64_t width, const float* shift, const float* sums,
                        const float* squares, Channels to) {
    const float inverse = 1 / static_cast<float>(end - begin);
    const double count = begin, added = end - begin;
    double *means = to.mean, *m2s = to.m2;
    if (begin == 0)
        for (int64_t i = 0; i < width; ++i) means[i] = m2s[i] = 0;
    for (int64_t i = 0; i < width; ++i) {
        const float mean = sums[i] * inverse;
        merge(means[i], m2s[i], count, static_cast<double>(shift[i]) + mean, squares[i] - sums[i] * mean, added);
    }
}

// Mean and squared deviations of one channel whose positions are contiguous. The shift of a chunk is the mean of all
// that precedes it.
template <class T>
void statistics_contiguous(const T* x, int64_t positions, double& channel_mean, double& channel_m2) {
    channel_mean = channel_m2 = 0;
    const int64_t few = min(positions, 4);
    for (int64_t i = 0; i < few; ++i) channel_mean += to_float(x[i]) / static_cast<double>(few);
    for (int64_t begin = 0; begin < positions; begin += CONTIGUOUS_CHUNK) {
        const int64_t count = min(positions - begin, CONTIGUOUS_CHUNK), whole = count / W * W, part = count - whole;
        const T* run = x + begin;
        const float shift = static_cast<float>(channel_mean);
        const vf base = broadcast(shift);
        vf sums[4] = {}, squares[4] = {};
        const auto add = [&](vf d, int v) {
            sums[v] += d;
            squares[v] = fma(d, d, squares[v]);
        };
        int64_t i = 0;
        for (; i + 4 * W <= whole; i += 4 * W)
            for (int v = 0; v < 4; ++v) add(load(run + i + v * W) - base, v);
        for (; i < whole; i += W) add(load(run + i) - base, 0);
        if (part) {
            vf lanes;  // 0 behind the last position, where a zero that was loaded would count as 0 - shift
            for (int lane = 0; lane < W; ++lane) lanes[lane] = lane < part ? 1.0f : 0.0f;
            add((load_part(run + whole, part) - base) * lanes, 1);
        }
        const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3])), mean = total / static_cast<float>(count);
        const float m2 = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) - total * mean;
        if (begin == 0) channel_mean = 0;
        merge(channel_mean, channel_m2, begin, static_cast<double>(shift) + mean, m2, count);
    }
}

// `count` elements of a parameter from `offset` on as floats; `absent` for each if the parameter is not given.
inline void parameter(const cf_vector& v, int64_t offset, float absent, float* to, int64_t count) {
    if (v.data) return widen(v, offset, to, count);
    for (int64_t i = 0; i < count; ++i) to[i] = absent;
}

// The parameters of the channels [first, first + width), those that are the same for all samples.
inline void read_parameters(const cf_group_norm_silu_args& a, int64_t first, int64_t width, const Workspace& ws) {
    parameter(a.weight, first, 1, ws.weight, width);
    parameter(a.bias, first, 0, ws.bias, width);
    parameter(a.pre_bias, first, 0, ws.pre_bias, width);
    parameter({}, 0, 0, ws.scale, width);
    parameter({}, 0, 0, ws.film_shift, width);
}

// term(begin) + ... + term(end - 1), in eight sums at a time: in one, each addition would wait for the one before it.
template <class F>
inline double sum_of(int64_t begin, int64_t end, const F& term) {
    double lanes[8] = {};
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += term(i + lane);
    for (; i < end; ++i) lanes[0] += term(i);
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// The coefficients of the channels [first, first + width) of sample n, which are whole groups, from parameters and
// statistics. Once for a channel, so double costs little. The pre-bias moves a channel's mean, and so the group's
// statistics, but not its deviations.
inline void find_coefficients(const cf_group_norm_silu_args& a, int64_t n, int64_t first, int64_t width,
                              const Workspace& ws) {
    if (a.scale.data) widen(a.scale, n * a.scale_stride + first, ws.scale, width);
    if (a.shift.data) widen(a.shift, n * a.shift_stride + first, ws.film_shift, width);
    const int64_t per_group = (a.c1 + a.c2) / a.groups;
    const double positions = static_cast<double>(a.spatial), per_channel = 1 / static_cast<double>(per_group);
    const double* __restrict means = ws.channels.mean, * __restrict m2s = ws.channels.m2;
    const float* __restrict weight = ws.weight, * __restrict bias = ws.bias, * __restrict pre_bias = ws.pre_bias;
    const float* __restrict scale = ws.scale, * __restrict shift = ws.film_shift;
    float* __restrict mean_out = ws.coefficients.mean, * __restrict factor_out = ws.coefficients.factor;
    float* __restrict offset_out = ws.coefficients.offset;
    for (int64_t begin = 0; begin < width; begin += per_group) {
        const int64_t end = begin + per_group;
        const double mean = per_channel * sum_of(begin, end, [=](int64_t i) { return means[i] + pre_bias[i]; });
        const double m2 = sum_of(begin, end, [=](int64_t i) {
            const double delta = means[i] + pre_bias[i] - mean;
            return m2s[i] + positions * delta * delta;
        });
        const double inverse = 1 / sqrt(m2 * per_channel / positions + a.eps);
        for (int64_t i = begin; i < end; ++i) {
            const double gain = 1 + static_cast<double>(scale[i]), factor = inverse * weight[i] * gain,
                         centre = mean - pre_bias[i];
            const float rounded = static_cast<float>(centre);
            mean_out[i] = rounded;
            factor_out[i] = static_cast<float>(factor);
            offset_out[i] = static_cast<float>(bias[i] * gain + shift[i] - (centre - rounded) * factor);
        }
    }
}

template <bool SILU>
inline vf apply(vf x, vf mean, vf factor, vf offset) {
    const vf y = fma(x - mean, factor, offset);
    return SILU ? silu(y) : y;
}

// Where normalised rows go (a Target): `row` gives what stores the channels of position r of sample n, and `finish` is
// called when a thread has written the positions [begin, end) of sample n. Dense writes the op's y, one row behind the
// other.
template <class T, bool STREAM>
struct Dense {
    T* y;
    int64_t spatial, channels;

    struct Row {
        T* y;
        void whole(int64_t c, vf value) const { STREAM ? store_streaming(y + c, value) : store(y + c, value); }
        void part(int64_t c, vf value, int64_t count) const { store_part(y + c, value, count); }
    };

    Row row(int64_t n, int64_t r) const { return {y + (n * spatial + r) * channels}; }
    void finish(int64_t, int64_t, int64_t) const {
        if (STREAM) end_streaming();
    }
};

// Writes the positions [begin, end) of a block of channels, which begins at channel `offset` of the target.
template <class T, bool SILU, class Target>
void apply_channels_last(const T* x, int64_t x_stride, const Target& target, int64_t n, int64_t begin, int64_t end,
                         int64_t offset, int64_t width, Coefficients k) {
    for (int64_t r = begin; r < end; ++r, x += x_stride) {
        const auto row = target.row(n, r);
        int64_t c = 0;
        for (; c + W <= width; c += W)
            row.whole(offset + c, apply<SILU>(load(x + c), load(k.mean + c), load(k.factor + c), load(k.offset + c)));
        if (c < width) {
            const int64_t part = width - c;
            const vf value =
                apply<SILU>(load_part(x + c, part), load(k.mean + c), load(k.factor + c), load(k.offset + c));
            row.part(offset + c, value, part);
        }
    }
}

template <class T, bool SILU, bool STREAM>
void apply_contiguous(const T* x, T* y, int64_t positions, float mean, float factor, float offset) {
    const vf m = broadcast(mean), f = broadcast(factor), o = broadcast(offset);
    int64_t i = 0;
    for (; i + W <= positions; i += W) {
        const vf value = apply<SILU>(load(x + i), m, f, o);
        STREAM ? store_streaming(y + i, value) : store(y + i, value);
    }
    if (i < positions) store_part(y + i, apply<SILU>(load_part(x + i, positions - i), m, f, o), positions - i);
}

template <class T>
struct Sample {
    Part<T> parts[2];  // of x and of skip, the latter perhaps empty
    int64_t n;

    Sample(const cf_group_norm_silu_args& a, int64_t n) : n(n) {
        parts[0] = {static_cast<const T*>(a.x) + n * a.spatial * a.c1, a.c1, 0, a.c1};
        parts[1] = {a.c2 ? static_cast<const T*>(a.skip) + n * a.spatial * a.c2 : nullptr, a.c2, a.c1, a.c2};
    }
};

template <class T, bool SILU, class Target>
void apply_rows(const Sample<T>& sample, int64_t begin, int64_t end, Coefficients k, const Target& target) {
    for (const Part<T>& part : sample.parts) {
        if (!part.width) continue;
        const Coefficients mine{k.mean + part.offset, k.factor + part.offset, k.offset + part.offset};
        const T* x = part.x + begin * part.stride;
        apply_channels_last<T, SILU>(x, part.stride, target, sample.n, begin, end, part.offset, part.width, mine);
    }
    target.finish(sample.n, begin, end);
}

// All threads share the positions of one sample, then of the next.
template <class T, bool SILU, class Target>
int share_positions(const cf_group_norm_silu_args& a, int64_t threads, const Target& target) {
    const int64_t channels = a.c1 + a.c2, padded = channels + W;
    const int64_t chunk = chunk_of(a.spatial), chunks = ceil_div(a.spatial, chunk);
    const size_t bytes = Workspace::bytes(channels);
    char* memory =
        static_cast<char*>(scratch(CALL_SCRATCH, bytes + static_cast<size_t>(2 * chunks * padded) * sizeof(float)));
    if (!memory) return CF_OUT_OF_MEMORY;
    const Workspace ws(memory, channels);
    float* sums = reinterpret_cast<float*>(memory + bytes);  // (chunks, 2, padded)
    read_parameters(a, 0, channels, ws);
    const auto end_of = [&](int64_t i) { return min((i + 1) * chunk, a.spatial); };
    for (int64_t n = 0; n < a.n; ++n) {
        const Sample<T> sample(a, n);
        for (const Part<T>& part : sample.parts) find_shift(part, a.spatial, ws.shift);
        parallel_for(chunks, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                for (const Part<T>& part : sample.parts)
                    chunk_sums(part, i * chunk, end_of(i), ws.shift, sums + 2 * i * padded,
                               sums + (2 * i + 1) * padded);
        });
        // by one thread, in order: so many chunks are little work, and the order decides the bits
        for (int64_t i = 0; i < chunks; ++i)
            merge_chunk(i * chunk, end_of(i), channels, ws.shift, sums + 2 * i * padded, sums + (2 * i + 1) * padded,
                        ws.channels);
        find_coefficients(a, n, 0, channels, ws);
        // not by chunks, of which there may be fewer than threads
        parallel_for(a.spatial, threads, [&](int64_t begin, int64_t end) {
            apply_rows<T, SILU>(sample, begin, end, ws.coefficients, target);
        });
    }
    return CF_OK;
}

// body(n, first, workspace) for every block of `width` channels of every sample, each by one thread; first is the
// block's first channel, and the parameters of its channels are in the workspace.
template <class F>
int share_blocks(const cf_group_norm_silu_args& a, int64_t width, int64_t threads, const F& body) {
    const int64_t blocks = (a.c1 + a.c2) / width;
    return parallel_for_with_scratch(a.n * blocks, threads, Workspace::bytes(width),
                                     [&](void* memory, int64_t begin, int64_t end) {
                                         const Workspace ws(memory, width);
                                         for (int64_t item = begin; item < end; ++item) {
                                             const int64_t first = item % blocks * width;
                                             if (item == begin || blocks > 1) read_parameters(a, first, width, ws);
                                             body(item / blocks, first, ws);
                                         }
                                     });
}

// Each thread has samples of its own, channels innermost.
template <class T, bool SILU, class Target>
int share_samples(const cf_group_norm_silu_args& a, int64_t threads, const Target& target) {
    const int64_t channels = a.c1 + a.c2, chunk = chunk_of(a.spatial);
    return share_blocks(a, channels, threads, [&](int64_t n, int64_t, const Workspace& ws) {
        const Sample<T> sample(a, n);
        for (const Part<T>& part : sample.parts) find_shift(part, a.spatial, ws.shift);
        for (int64_t r = 0; r < a.spatial; r += chunk) {
            const int64_t stop = min(r + chunk, a.spatial);
            for (const Part<T>& part : sample.parts) chunk_sums(part, r, stop, ws.shift, ws.sums, ws.squares);
            merge_chunk(r, stop, channels, ws.shift, ws.sums, ws.squares, ws.channels);
        }
        find_coefficients(a, n, 0, channels, ws);
        apply_rows<T, SILU>(sample, 0, a.spatial, ws.coefficients, target);
    });
}

// Each thread has groups of its own, contiguous.
template <class T, bool SILU, bool STREAM>
int share_groups(const cf_group_norm_silu_args& a, int64_t threads) {
    const int64_t channels = a.c1 + a.c2, width = channels / a.groups;
    return share_blocks(a, width, threads, [&](int64_t n, int64_t first, const Workspace& ws) {
        const auto row = [&](int64_t i) {
            const int64_t c = first + i;
            return c < a.c1 ? static_cast<const T*>(a.x) + (n * a.c1 + c) * a.spatial
                            : static_cast<const T*>(a.skip) + (n * a.c2 + c - a.c1) * a.spatial;
        };
        for (int64_t i = 0; i < width; ++i)
            statistics_contiguous(row(i), a.spatial, ws.channels.mean[i], ws.channels.m2[i]);
        find_coefficients(a, n, first, width, ws);
        const Coefficients& k = ws.coefficients;
        T* y = static_cast<T*>(a.y) + (n * channels + first) * a.spatial;
        for (int64_t i = 0; i < width; ++i)
            apply_contiguous<T, SILU, STREAM>(row(i), y + i * a.spatial, a.spatial, k.mean[i], k.factor[i],
                                              k.offset[i]);
        if (STREAM) end_streaming();
    });
}

// Channels innermost. Samples are shared where they divide evenly among the threads, or are so many that it does not
// matter.
template <class T, bool SILU, class Target>
int share_rows(const cf_group_norm_silu_args& a, int64_t threads, Serial serial, const Target& target) {
    const int64_t size = a.n * (a.c1 + a.c2) * a.spatial;
    const bool few = a.n % threads && a.n < 4 * threads;
    if (few && size >= serial.positions && a.spatial > chunk_of(a.spatial))
        return share_positions<T, SILU>(a, threads, target);
    return share_samples<T, SILU>(a, size < serial.blocks ? 1 : threads, target);
}

// ---- the op

template <class T, bool SILU, bool STREAM>
int group_norm_silu_typed(const cf_group_norm_silu_args& a, int64_t threads) {
    const int64_t channels = a.c1 + a.c2, size = a.n * channels * a.spatial;
    if (!a.channels_last) return share_groups<T, SILU, STREAM>(a, size < IN_AN_OP.blocks ? 1 : threads);
    return share_rows<T, SILU>(a, threads, IN_AN_OP, Dense<T, STREAM>{static_cast<T*>(a.y), a.spatial, channels});
}

inline int group_norm_silu(const cf_group_norm_silu_args& a, int64_t threads) {
    if (threads < 1) return CF_INVALID_ARGUMENT;
    if (a.n * a.spatial == 0) return CF_OK;
    return with_type(a.dtype, [&](auto type) {
        typedef decltype(type) T;
        const int64_t channels = a.c1 + a.c2, size = static_cast<int64_t>(sizeof(T));
        // streaming stores need every row of every part to start at a multiple of a vector
        const bool aligned = reinterpret_cast<uintptr_t>(a.y) % (W * size) == 0 &&
                             (a.channels_last ? channels % W == 0 && a.c1 % W == 0 : a.spatial % W == 0);
        const int64_t bytes = a.n * channels * a.spatial * size;
        const bool stream = aligned && 2 * bytes > last_level_cache();  // input and output
        prepare_output(a.y, bytes);
        if (a.silu)
            return stream ? group_norm_silu_typed<T, true, true>(a, threads)
                          : group_norm_silu_typed<T, true, false>(a, threads);
        return stream ? group_norm_silu_typed<T, false, true>(a, threads)
                      : group_norm_silu_typed<T, false, false>(a, threads);
    });
}

// ---- the step, which writes an image

template <class T>
struct ImageTarget {
    cf_image image;
    int64_t width, channels, spatial;
    cf_quantisation quantisation;

    Row<T> row(int64_t n, int64_t r) const {
        const int64_t y = r / width, x = r - y * width;
        return {reinterpret_cast<T*>(address(image, {n, y, x}, channels * static_cast<int64_t>(sizeof(T)))),
                quantisation};
    }
    void finish(int64_t n, int64_t begin, int64_t) const {
        // by the thread that has the first position
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
        return norm.silu ? share_rows<T, true>(norm, threads, IN_A_PROGRAM, target)
                         : share_rows<T, false>(norm, threads, IN_A_PROGRAM, target);
    };
    return with_activation(norm.dtype,
                           [&](auto type) { return a.y.dtype == CF_UINT8 ? run(type, uint8_t{}) : run(type, type); });
}

}  // namespace
}  // namespace cf
