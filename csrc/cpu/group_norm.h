// group_norm_silu: an item of work is a sample's block of whole groups, whose statistics and application one thread does in a row, so that
// the second reading finds the block in its cache. Statistics: the mean and the sum of squared deviations of every 32 positions of a channel,
// two passes over registers and first-level cache, merged in double by Chan's rule; then those of a group from its channels'.
#pragma once

#include <math.h>

#include "simd.h"

namespace cf {
namespace {

constexpr int64_t CHUNK = 64;         // positions a partial sum is taken over, channels innermost
constexpr int64_t RUN = 1024;         // the same, contiguous
constexpr int64_t SERIAL = 32 << 10;  // bytes below which a second thread costs more than it saves

struct Channel {
    double mean, m2;  // of a channel's positions: mean, sum of squared deviations
};

// y = act((x - mean) * factor + offset), mean being rounded to float and the rest of it being in offset
struct Coefficients {
    float *mean, *factor, *offset;
};

// `added` more positions of another mean and m2.
inline void merge(Channel& c, double count, double mean, double m2, double added) {
    const double share = added / (count + added), delta = mean - c.mean;
    c.mean += delta * share;
    c.m2 += m2 + delta * delta * (count * share);
}

// Arrays as long as a block, in scratch memory.
struct Workspace {
    Channel* channels;
    float *shift, *sums, *squares;
};

// Statistics of `width` neighbouring channels over all positions, rows `stride` elements apart.
template <class T>
void statistics_channels_last(const T* x, int64_t stride, int64_t positions, int64_t width, Workspace ws) {
    const int64_t whole = width / W * W, part = width - whole, few = positions < 4 ? positions : 4;
    const auto each = [=](const auto& body) {  // body(c, get): get(r) is the vector of channels c.. at position r
        for (int64_t c = 0; c < whole; c += W) body(c, [=](int64_t r) { return load(x + r * stride + c); });
        if (part) body(whole, [=](int64_t r) { return load_part(x + r * stride + whole, part); });
    };
    each([=](int64_t c, const auto& get) {
        vf sum = {};
        for (int64_t r = 0; r < few; ++r) sum += get(r);
        store(ws.shift + c, sum / static_cast<float>(few));
    });
    for (int64_t i = 0; i < width; ++i) ws.channels[i] = {0, 0};
    for (int64_t begin = 0; begin < positions; begin += CHUNK) {
        const int64_t end = positions - begin < CHUNK ? positions : begin + CHUNK;
        memset(ws.sums, 0, static_cast<size_t>(whole + W) * sizeof(float));
        memset(ws.squares, 0, static_cast<size_t>(whole + W) * sizeof(float));
        int64_t r = begin;
        for (; r + 8 <= end; r += 8)  // eight rows at a time, each read from left to right
            each([=](int64_t c, const auto& get) {
                const vf shift = load(ws.shift + c);
                vf sums[2] = {}, squares[2] = {};
                for (int i = 0; i < 8; ++i) {
                    const vf d = get(r + i) - shift;
                    sums[i & 1] += d;
                    squares[i & 1] = fma(d, d, squares[i & 1]);
                }
                store(ws.sums + c, load(ws.sums + c) + (sums[0] + sums[1]));
                store(ws.squares + c, load(ws.squares + c) + (squares[0] + squares[1]));
            });
        for (; r < end; ++r)
            each([=](int64_t c, const auto& get) {
                const vf d = get(r) - load(ws.shift + c);
                store(ws.sums + c, load(ws.sums + c) + d);
                store(ws.squares + c, fma(d, d, load(ws.squares + c)));
            });
        const float inverse = 1 / static_cast<float>(end - begin);
        for (int64_t i = 0; i < width; ++i) {
            const float mean = ws.sums[i] * inverse;
            merge(ws.channels[i], begin, static_cast<double>(ws.shift[i]) + mean, ws.squares[i] - ws.sums[i] * mean, end - begin);
            ws.shift[i] = static_cast<float>(ws.channels[i].mean);
        }
    }
}

template <class T>
Channel statistics_contiguous(const T* x, int64_t positions) {
    Channel channel{0, 0};
    const int64_t few = positions < 4 ? positions : 4;
    for (int64_t i = 0; i < few; ++i) channel.mean += to_float(x[i]) / static_cast<double>(few);
    for (int64_t begin = 0; begin < positions; begin += RUN) {
        const int64_t count = positions - begin < RUN ? positions - begin : RUN, whole = count / W * W, part = count - whole;
        const T* run = x + begin;
        const float shift = static_cast<float>(channel.mean);
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
            vf lanes;
            for (int lane = 0; lane < W; ++lane) lanes[lane] = lane < part ? 1.0f : 0.0f;
            add((load_part(run + whole, part) - base) * lanes, 1);
        }
        const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3])), mean = total / static_cast<float>(count);
        const float m2 = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) - total * mean;
        if (begin == 0) channel.mean = 0;
        merge(channel, begin, static_cast<double>(shift) + mean, m2, count);
    }
    return channel;
}

// From the statistics of the channels [first, first + width), whole groups, of sample n.
inline void coefficients(const cf_group_norm_silu_args& a, int64_t n, int64_t first, int64_t width, Channel* channels, Coefficients out) {
    const int64_t per_group = (a.c1 + a.c2) / a.groups;
    for (int64_t begin = 0; begin < width; begin += per_group) {
        Channel* group = channels + begin;
        double mean = 0, m2 = 0;
        for (int64_t i = 0; i < per_group; ++i) {
            if (a.pre_bias.data) group[i].mean += element(a.pre_bias, first + begin + i);
            mean += group[i].mean;
        }
        mean /= static_cast<double>(per_group);
        for (int64_t i = 0; i < per_group; ++i) {
            const double delta = group[i].mean - mean;
            m2 += group[i].m2 + static_cast<double>(a.spatial) * delta * delta;
        }
        const double inverse = 1 / sqrt(m2 / static_cast<double>(per_group * a.spatial) + a.eps);
        for (int64_t i = begin; i < begin + per_group; ++i) {
            const int64_t c = first + i;
            const double gain = 1 + (a.scale.data ? element(a.scale, n * a.scale_stride + c) : 0.0);
            const double factor = inverse * (a.weight.data ? element(a.weight, c) : 1.0) * gain;
            const double centre = mean - (a.pre_bias.data ? element(a.pre_bias, c) : 0.0);
            out.mean[i] = static_cast<float>(centre);
            out.factor[i] = static_cast<float>(factor);
            out.offset[i] = static_cast<float>((a.bias.data ? element(a.bias, c) : 0.0) * gain +
                                               (a.shift.data ? element(a.shift, n * a.shift_stride + c) : 0.0) -
                                               (centre - out.mean[i]) * factor);
        }
    }
}

template <bool SILU>
inline vf apply(vf x, vf mean, vf factor, vf offset) {
    const vf y = fma(x - mean, factor, offset);
    return SILU ? silu(y) : y;
}

template <class T, bool SILU, bool STREAM>
void apply_channels_last(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t positions, int64_t width, Coefficients k) {
    for (int64_t r = 0; r < positions; ++r, x += x_stride, y += y_stride) {
        int64_t c = 0;
        for (; c + W <= width; c += W) {
            const vf value = apply<SILU>(load(x + c), load(k.mean + c), load(k.factor + c), load(k.offset + c));
            STREAM ? store_streaming(y + c, value) : store(y + c, value);
        }
        if (c < width) {
            const int64_t part = width - c;
            store_part(y + c, apply<SILU>(load_part(x + c, part), load(k.mean + c), load(k.factor + c), load(k.offset + c)), part);
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

template <class T, bool SILU, bool STREAM>
int group_norm_silu_typed(const cf_group_norm_silu_args& a) {
    const T *x = static_cast<const T*>(a.x), *skip = static_cast<const T*>(a.skip);
    T* y = static_cast<T*>(a.y);
    const int64_t channels = a.c1 + a.c2, per_group = channels / a.groups;
    const int64_t bytes = a.n * channels * a.spatial * static_cast<int64_t>(sizeof(T));
    const int64_t threads = bytes < SERIAL ? 1 : a.threads;

    // Channels a block: all, for rows that are read from end to end are read fastest, but for a share of the work for every thread, and for
    // blocks that the threads' shares of the last-level cache hold; whole groups and, if it can be, whole vectors.
    int64_t block = per_group;
    if (a.channels_last) {
        int64_t step = per_group;
        while (step % (2 * W) && step < channels) step += per_group;
        const int64_t parts = (threads + a.n - 1) / a.n, share = (a.groups + parts - 1) / parts * per_group;
        const int64_t cached = last_level_cache() / (2 * threads * a.spatial * static_cast<int64_t>(sizeof(T)));
        const int64_t wanted = share < cached ? share : cached;
        block = wanted >= step ? wanted / step * step : (share < step ? share : step);
        if (block > channels) block = channels;
    }
    const int64_t blocks = (channels + block - 1) / block;
    const size_t padded = static_cast<size_t>(block + W);
    const size_t scratch_bytes = padded * (sizeof(Channel) + 6 * sizeof(float));
    int status = CF_OK;

    parallel_for(a.n * blocks, threads, [&](int64_t begin, int64_t end) {
        Channel* channel = static_cast<Channel*>(scratch(1, scratch_bytes));
        if (!channel) {
            __atomic_store_n(&status, CF_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        float* floats = reinterpret_cast<float*>(channel + padded);
        const Coefficients k{floats, floats + padded, floats + 2 * padded};
        const Workspace ws{channel, floats + 3 * padded, floats + 4 * padded, floats + 5 * padded};
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / blocks, first = item % blocks * block;
            const int64_t width = channels - first < block ? channels - first : block;
            // the parts of the block in x and in skip
            const int64_t in_x = first >= a.c1 ? 0 : (a.c1 - first < width ? a.c1 - first : width), in_skip = width - in_x;
            if (a.channels_last) {
                const T* from_x = x + n * a.spatial * a.c1 + first;
                const T* from_skip = in_skip ? skip + n * a.spatial * a.c2 + (first + in_x - a.c1) : nullptr;
                if (in_x) statistics_channels_last(from_x, a.c1, a.spatial, in_x, ws);
                const Workspace ws_skip{channel + in_x, ws.shift, ws.sums, ws.squares};
                if (in_skip) statistics_channels_last(from_skip, a.c2, a.spatial, in_skip, ws_skip);
                coefficients(a, n, first, width, channel, k);
                T* to = y + n * a.spatial * channels + first;
                if (in_x) apply_channels_last<T, SILU, STREAM>(from_x, a.c1, to, channels, a.spatial, in_x, k);
                const Coefficients behind{k.mean + in_x, k.factor + in_x, k.offset + in_x};
                if (in_skip) apply_channels_last<T, SILU, STREAM>(from_skip, a.c2, to + in_x, channels, a.spatial, in_skip, behind);
            } else {
                const auto row = [&](int64_t i) {
                    const int64_t c = first + i;
                    return c < a.c1 ? x + (n * a.c1 + c) * a.spatial : skip + (n * a.c2 + c - a.c1) * a.spatial;
                };
                for (int64_t i = 0; i < width; ++i) channel[i] = statistics_contiguous(row(i), a.spatial);
                coefficients(a, n, first, width, channel, k);
                T* to = y + (n * channels + first) * a.spatial;
                for (int64_t i = 0; i < width; ++i)
                    apply_contiguous<T, SILU, STREAM>(row(i), to + i * a.spatial, a.spatial, k.mean[i], k.factor[i], k.offset[i]);
            }
        }
        if (STREAM) end_streaming();
    });
    return status;
}

inline int group_norm_silu(const cf_group_norm_silu_args& a) {
    return with_type(a.dtype, [&](auto type) {
        typedef decltype(type) T;
        const int64_t channels = a.c1 + a.c2, size = static_cast<int64_t>(sizeof(T)), vector = W * size;
        // Streaming stores need every row of every block to start on a whole vector.
        const bool aligned = reinterpret_cast<uintptr_t>(a.y) % vector == 0 &&
                             (a.channels_last ? channels % W == 0 && a.c1 % W == 0 && channels / a.groups % W == 0 : a.spatial % W == 0);
        const int64_t bytes = a.n * channels * a.spatial * size;
        const bool stream = aligned && bytes > last_level_cache();
        prepare_output(a.y, bytes);
        if (a.silu) return stream ? group_norm_silu_typed<T, true, true>(a) : group_norm_silu_typed<T, true, false>(a);
        return stream ? group_norm_silu_typed<T, false, true>(a) : group_norm_silu_typed<T, false, false>(a);
    });
}

}  // namespace
}  // namespace cf
