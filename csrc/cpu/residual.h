// bias_residual: an item of work is a position's row of channels (channels innermost) or a channel's positions (contiguous).
#pragma once

#include "simd.h"

namespace cf {
namespace {

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
int bias_residual_typed(const cf_bias_residual_args& a) {
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    T* y = static_cast<T*>(a.y);
    const int64_t size = a.n * a.c * a.spatial;
    const int64_t threads = size < 64 << 10 ? 1 : a.threads;  // a second one costs as much
    if (!a.bias.data) {                                       // a row of any length will do
        const int64_t width = 4096, rows = (size + width - 1) / width;
        parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * width, count = (end * width < size ? end * width : size) - first;
            add_row<T, RESIDUAL, STREAM>(x + first, RESIDUAL ? residual + first : nullptr, nullptr, vf{}, y + first,
                                         count);
            if (STREAM) end_streaming();
        });
        return CF_OK;
    }
    float* bias = static_cast<float*>(scratch(0, static_cast<size_t>(a.c + W) * sizeof(float)));
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

inline int bias_residual(const cf_bias_residual_args& a) {
    return with_type(a.dtype, [&](auto type) {
        typedef decltype(type) T;
        const int64_t size = static_cast<int64_t>(sizeof(T)), width = a.channels_last ? a.c : a.spatial;
        const int64_t bytes = a.n * a.c * a.spatial * size;
        const bool stream = reinterpret_cast<uintptr_t>(a.y) % (W * size) == 0 && (!a.bias.data || width % W == 0) &&
                            2 * bytes > last_level_cache();  // input and output
        prepare_output(a.y, bytes);
        if (a.residual) return stream ? bias_residual_typed<T, true, true>(a) : bias_residual_typed<T, true, false>(a);
        return stream ? bias_residual_typed<T, false, true>(a) : bias_residual_typed<T, false, false>(a);
    });
}

}  // namespace
}  // namespace cf
