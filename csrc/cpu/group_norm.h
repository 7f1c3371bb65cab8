// group_norm_silu. Statistics are sums of (x - shift) and of its square over chunks of a channel's positions, merged in double by Chan's rule
// in the order of the chunks; then those of a group from its channels'. The shift is the mean of a few positions: so near to the channel's
// mean, for all but a few values in a million, that the difference of the two sums loses nothing of the variance.
//
// Work is shared in one of two ways, which give the same bits. Where there are enough samples, or little of each, an item is a sample's block
// of whole groups, read for its statistics and again, from a cache, to be applied. Else (channels innermost, few samples) all threads share
// the positions of one sample, first for the statistics and then to apply them: neighbouring positions, for two threads that write every
// other piece of a row take the cache lines out of each other's hands.
#pragma once

#include <math.h>

#include "simd.h"

namespace cf {
namespace {

constexpr int64_t CHUNK = 128;             // positions a partial sum is taken over, channels innermost
constexpr int64_t RUN = 1024;              // the same, contiguous
constexpr int64_t SERIAL = 32 << 10;       // elements below which a second thread costs more than it saves
constexpr int64_t SLAB = 512 << 10;        // bytes of a block that stay in a second-level cache
constexpr int64_t SHORT_ROW = 256;         // bytes of a row below which reading it apart from its neighbours costs more than that saves

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

// The channels [offset, offset + width) of a block, in x or in skip: rows of positions, `stride` elements apart.
template <class T>
struct Part {
    const T* x;
    int64_t stride, offset, width;

    // body(channel in the block, get), get(r) being the vector of channels from there on at position r
    template <class F>
    void each_vector(const F& body) const {
        const int64_t whole = width / W * W, rest = width - whole;
        for (int64_t c = 0; c < whole; c += W) body(offset + c, [=, this_x = x + c, s = stride](int64_t r) { return load(this_x + r * s); });
        if (rest)
            body(offset + whole, [=, this_x = x + whole, s = stride](int64_t r) { return load_part(this_x + r * s, rest); });
    }
};

// The mean of a few positions, from all over the channel.
template <class T>
void find_shift(const Part<T>& part, int64_t positions, float* shift) {
    const int64_t few = positions < 8 ? positions : 8;
    part.each_vector([=](int64_t c, const auto& get) {
        vf sum = {};
        for (int64_t i = 0; i < few; ++i) sum += get(i * positions / few);
        store(shift + c, sum / static_cast<float>(few));
    });
}

// Of the positions [begin, end), at most CHUNK of them.
template <class T>
void chunk_sums(const Part<T>& part, int64_t begin, int64_t end, const float* shift, float* sums, float* squares) {
    part.each_vector([=](int64_t c, const auto&) {
        store(sums + c, vf{});
        store(squares + c, vf{});
    });
    int64_t r = begin;
    for (; r + 8 <= end; r += 8)  // eight rows at a time, each read from left to right
        part.each_vector([=](int64_t c, const auto& get) {
            const vf base = load(shift + c);
            vf s[2] = {}, q[2] = {};
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

// The next chunk of `width` channels, positions [begin, end).
inline void merge_chunk(int64_t begin, int64_t end, int64_t width, const float* shift, const float* sums, const float* squares, Channel* to) {
    const float inverse = 1 / static_cast<float>(end - begin);
    for (int64_t i = 0; i < width; ++i) {
        const float mean = sums[i] * inverse;
        if (begin == 0) to[i] = {0, 0};
        merge(to[i], begin, static_cast<double>(shift[i]) + mean, squares[i] - sums[i] * mean, end - begin);
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

template <class T>
struct Block {
    Part<T> parts[2];  // of x and of skip, either perhaps empty
    int64_t n, first, width;

    Block(const cf_group_norm_silu_args& a, int64_t n, int64_t first, int64_t width) : n(n), first(first), width(width) {
        const int64_t in_x = first >= a.c1 ? 0 : (a.c1 - first < width ? a.c1 - first : width);
        parts[0] = {static_cast<const T*>(a.x) + n * a.spatial * a.c1 + first, a.c1, 0, in_x};
        parts[1] = {in_x < width ? static_cast<const T*>(a.skip) + n * a.spatial * a.c2 + (first + in_x - a.c1) : nullptr, a.c2, in_x,
                    width - in_x};
    }
};

template <class T, bool SILU, bool STREAM>
void apply_rows(const cf_group_norm_silu_args& a, const Block<T>& block, int64_t begin, int64_t end, Coefficients k) {
    const int64_t channels = a.c1 + a.c2;
    for (const Part<T>& part : block.parts) {
        if (!part.width) continue;
        T* y = static_cast<T*>(a.y) + (block.n * a.spatial + begin) * channels + block.first + part.offset;
        const Coefficients mine{k.mean + part.offset, k.factor + part.offset, k.offset + part.offset};
        apply_channels_last<T, SILU, STREAM>(part.x + begin * part.stride, part.stride, y, channels, end - begin, part.width, mine);
    }
    if (STREAM) end_streaming();
}

// All threads on the positions of one sample after another.
template <class T, bool SILU, bool STREAM>
int share_positions(const cf_group_norm_silu_args& a) {
    const int64_t channels = a.c1 + a.c2, padded = channels + W, chunks = (a.spatial + CHUNK - 1) / CHUNK;
    Channel* channel = static_cast<Channel*>(
        scratch(0, static_cast<size_t>(padded) * (sizeof(Channel) + static_cast<size_t>(4 + 2 * chunks) * sizeof(float))));
    if (!channel) return CF_OUT_OF_MEMORY;
    float* shift = reinterpret_cast<float*>(channel + padded);
    const Coefficients k{shift + padded, shift + 2 * padded, shift + 3 * padded};
    float* sums = shift + 4 * padded;  // (chunks, 2, padded)
    const auto end_of = [&](int64_t chunk) { return (chunk + 1) * CHUNK < a.spatial ? (chunk + 1) * CHUNK : a.spatial; };
    for (int64_t n = 0; n < a.n; ++n) {
        const Block<T> block(a, n, 0, channels);
        for (const Part<T>& part : block.parts) find_shift(part, a.spatial, shift);
        parallel_for(chunks, a.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                for (const Part<T>& part : block.parts)
                    chunk_sums(part, i * CHUNK, end_of(i), shift, sums + 2 * i * padded, sums + (2 * i + 1) * padded);
        });
        for (int64_t i = 0; i < chunks; ++i)
            merge_chunk(i * CHUNK, end_of(i), channels, shift, sums + 2 * i * padded, sums + (2 * i + 1) * padded, channel);
        coefficients(a, n, 0, channels, channel, k);
        parallel_for(chunks, a.threads, [&](int64_t begin, int64_t end) {
            apply_rows<T, SILU, STREAM>(a, block, begin * CHUNK, end_of(end - 1), k);
        });
    }
    return CF_OK;
}

// A sample's block of `width` channels at a time.
template <class T, bool SILU, bool STREAM>
int share_blocks(const cf_group_norm_silu_args& a, int64_t width, int64_t threads) {
    const int64_t channels = a.c1 + a.c2, blocks = (channels + width - 1) / width, padded = width + W;
    int status = CF_OK;
    parallel_for(a.n * blocks, threads, [&](int64_t begin, int64_t end) {
        Channel* channel = static_cast<Channel*>(scratch(1, static_cast<size_t>(padded) * (sizeof(Channel) + 6 * sizeof(float))));
        if (!channel) {
            __atomic_store_n(&status, CF_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        float* shift = reinterpret_cast<float*>(channel + padded);
        float *sums = shift + padded, *squares = sums + padded;
        const Coefficients k{squares + padded, squares + 2 * padded, squares + 3 * padded};
        for (int64_t item = begin; item < end; ++item) {
            const int64_t n = item / blocks, first = item % blocks * width;
            const Block<T> block(a, n, first, channels - first < width ? channels - first : width);
            if (a.channels_last) {
                for (const Part<T>& part : block.parts) find_shift(part, a.spatial, shift);
                for (int64_t r = 0; r < a.spatial; r += CHUNK) {
                    const int64_t stop = r + CHUNK < a.spatial ? r + CHUNK : a.spatial;
                    for (const Part<T>& part : block.parts) chunk_sums(part, r, stop, shift, sums, squares);
                    merge_chunk(r, stop, block.width, shift, sums, squares, channel);
                }
                coefficients(a, n, first, block.width, channel, k);
                apply_rows<T, SILU, STREAM>(a, block, 0, a.spatial, k);
                continue;
            }
            const auto row = [&](int64_t i) {
                const int64_t c = first + i;
                return c < a.c1 ? static_cast<const T*>(a.x) + (n * a.c1 + c) * a.spatial
                                : static_cast<const T*>(a.skip) + (n * a.c2 + c - a.c1) * a.spatial;
            };
            for (int64_t i = 0; i < block.width; ++i) channel[i] = statistics_contiguous(row(i), a.spatial);
            coefficients(a, n, first, block.width, channel, k);
            T* y = static_cast<T*>(a.y) + (n * channels + first) * a.spatial;
            for (int64_t i = 0; i < block.width; ++i)
                apply_contiguous<T, SILU, STREAM>(row(i), y + i * a.spatial, a.spatial, k.mean[i], k.factor[i], k.offset[i]);
            if (STREAM) end_streaming();
        }
    });
    return status;
}

template <class T, bool SILU, bool STREAM>
int group_norm_silu_typed(const cf_group_norm_silu_args& a) {
    const int64_t channels = a.c1 + a.c2, per_group = channels / a.groups, size = static_cast<int64_t>(sizeof(T));
    const int64_t threads = a.n * channels * a.spatial < SERIAL ? 1 : a.threads;
    if (!a.channels_last) return share_blocks<T, SILU, STREAM>(a, per_group, threads);
    if (threads > 1 && a.n % threads && a.n < 4 * threads && a.spatial >= 2 * CHUNK) return share_positions<T, SILU, STREAM>(a);
    // Blocks of whole vectors, if it can be, and of what a cache holds, if their rows are not too short; at least as many as threads.
    int64_t step = per_group;
    while (step % (2 * W) && step < channels) step += per_group;
    const int64_t parts = (threads + a.n - 1) / a.n, share = (a.groups + parts - 1) / parts * per_group;
    const int64_t row = SLAB / (a.spatial * size) > SHORT_ROW / size ? SLAB / (a.spatial * size) : SHORT_ROW / size;
    const int64_t wanted = share < row ? share : (row + step - 1) / step * step;
    int64_t width = wanted >= step ? wanted / step * step : wanted / per_group * per_group;
    if (width < per_group) width = per_group;
    if (width > share) width = share;
    return share_blocks<T, SILU, STREAM>(a, width, threads);
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
