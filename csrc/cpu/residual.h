// The op `bias_residual`: y = x + bias + residual.
//
// It is bound by memory alone: x and residual are read, y is written, two additions an element. So there are two things
// to gain: one pass where plain PyTorch makes two, and no traffic beside the three arrays. An ordinary store first
// reads the line that it writes to; where x and y together are larger than the last-level cache, y is therefore written
// past the caches (store_streaming). Where they are smaller it is not, for the next op will find y in a cache.
//
// A row is what shares biases: a position's channels (channels innermost), each with its own, or a channel's positions
// (contiguous), all with one. Without a bias there are no rows, and the array is cut into pieces of 4096 elements.
//
// Measured (benchmarks/results/cpu/kernels.csv; 2 threads): 1.3 times as fast as eager PyTorch in float32 and 2.6 times
// in bfloat16, at the median. On the smallest tensors it loses: a call from Python into a C library costs more than the
// whole of eager PyTorch's addition.
#pragma once

#include "check.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_bias_residual_args& a) {
    return valid_dtype(a.dtype) && valid(a.bias) && a.n >= 0 && a.c >= 0 && a.spatial >= 0;
}

// One row; `bias` has one for each element, or is null where `one_bias` is that of all.
template <class T, bool RESIDUAL, bool STREAM>
inline void add_row(const T* x, const T* residual, const float* bias, vf one_bias, T* y, int64_t width) {
    int64_t c = 0;
    for (; c + W <= width; c += W) {
        vf value = load(x + c) + (bias ? load(bias + c) : one_bias);
        if (RESIDUAL) value += load(residual + c);
        STREAM ? store_streaming(y + c, value) : store(y + c, value);
    }
    if (c < width) {
        const int64_t part = width - c;
        vf value = load_part(x + c, part) + (bias ? load(bias + c) : one_bias);
        if (RESIDUAL) value += load_part(residual + c, part);
        store_part(y + c, value, part);
    }
}

template <class T, bool RESIDUAL, bool STREAM>
int bias_residual_typed(const cf_bias_residual_args& a, int64_t threads) {
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    T* y = static_cast<T*>(a.y);
    const int64_t size = a.n * a.c * a.spatial;
    if (size < 64 << 10) threads = 1;  // starting a second one costs as much as it saves
    if (!a.bias.data) {
        const int64_t width = 4096;
        parallel_for(ceil_div(size, width), threads, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * width, count = min(end * width, size) - first;
            add_row<T, RESIDUAL, STREAM>(x + first, RESIDUAL ? residual + first : nullptr, nullptr, vf{}, y + first,
                                         count);
            if (STREAM) end_streaming();
        });
        return CF_OK;
    }
    float* bias = static_cast<float*>(scratch(CALL_SCRATCH, static_cast<size_t>(a.c + W) * sizeof(float)));
    if (!bias) return CF_OUT_OF_MEMORY;
    widen(a.bias, 0, bias, a.c);
    const int64_t width = a.channels_last ? a.c : a.spatial;
    parallel_for(size / width, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * width;
            const float* biases = a.channels_last ? bias : nullptr;
            const vf one_bias = a.channels_last ? vf{} : broadcast(bias[row % a.c]);
            add_row<T, RESIDUAL, STREAM>(x + at, RESIDUAL ? residual + at : nullptr, biases, one_bias, y + at, width);
        }
        if (STREAM) end_streaming();
    });
    return CF_OK;
}

inline int bias_residual(const cf_bias_residual_args& a, int64_t threads) {
    if (a.n * a.c * a.spatial == 0) return CF_OK;
    return with_type(a.dtype, [&](auto type) {
        typedef decltype(type) T;
        const int64_t size = static_cast<int64_t>(sizeof(T)), width = a.channels_last ? a.c : a.spatial;
        const int64_t bytes = a.n * a.c * a.spatial * size;
        // streaming stores need every row to start at a multiple of a vector
        const bool aligned = reinterpret_cast<uintptr_t>(a.y) % (W * size) == 0 && (!a.bias.data || width % W == 0);
        const bool stream = aligned && 2 * bytes > last_level_cache();
        prepare_output(a.y, bytes);
        if (a.residual)
            return stream ? bias_residual_typed<T, true, true>(a, threads)
                          : bias_residual_typed<T, true, false>(a, threads);
        return stream ? bias_residual_typed<T, false, true>(a, threads)
                      : bias_residual_typed<T, false, false>(a, threads);
    });
}

}  // namespace
}  // namespace cf
