// coalesce_step: an item of work is a sample; its direction is read twice, the second time from a cache.
#pragma once

#include <math.h>

#include "simd.h"

namespace cf {
namespace {

// The mean of the squares, overflowing where float32 does.
template <class T>
float mean_square(const T* x, int64_t size) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += 2048) {
        const int64_t end = size - begin < 2048 ? size : begin + 2048;
        vf sums[4] = {};
        int64_t i = begin;
        for (; i + 4 * W <= end; i += 4 * W)
            for (int v = 0; v < 4; ++v) {
                const vf value = load(x + i + v * W);
                sums[v] = fma(value, value, sums[v]);
            }
        for (; i < end; i += W) {
            const vf value = end - i < W ? load_part(x + i, end - i) : load(x + i);
            sums[0] = fma(value, value, sums[0]);
        }
        total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return static_cast<float>(total) / static_cast<float>(size);
}

template <class T, class D>
int coalesce_step_typed(const cf_coalesce_step_args& a) {
    const int64_t threads = a.n * a.size < 64 << 10 ? 1 : a.threads;  // a second one costs as much
    parallel_for(a.n, threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            const T* sample = static_cast<const T*>(a.sample) + n * a.size;
            const D* direction = static_cast<const D*>(a.direction) + n * a.size;
            T* y = static_cast<T*>(a.y) + n * a.size;
            float length = static_cast<float>(a.eta) * element(a.distance, n);
            if (a.unit) {
                const float rms = sqrtf(mean_square(direction, a.size)), eps = static_cast<float>(a.eps);
                length /= rms < eps ? eps : rms;
            }
            const vf factor = broadcast(length);
            int64_t i = 0;
            for (; i + W <= a.size; i += W) store(y + i, fma(factor, load(direction + i), load(sample + i)));
            if (i < a.size) {
                const int64_t part = a.size - i;
                store_part(y + i, fma(factor, load_part(direction + i, part), load_part(sample + i, part)), part);
            }
        }
    });
    return CF_OK;
}

inline int coalesce_step(const cf_coalesce_step_args& a) {
    return with_type(a.dtype, [&](auto sample) {
        return with_type(a.direction_dtype,
                         [&](auto direction) { return coalesce_step_typed<decltype(sample), decltype(direction)>(a); });
    });
}

}  // namespace
}  // namespace cf
