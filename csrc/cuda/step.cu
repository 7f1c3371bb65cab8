// coalesce_step on NVIDIA GPUs: length and update in one launch, the first HELD vectors of every thread read once.
#include <cooperative_groups.h>

#include "step.h"

namespace cf::step {
namespace {

namespace cg = cooperative_groups;

struct Call {
    Plan plan;
    const void* sample;
    const void* direction;
    void* y;
    cf_vector distance;
    float eta, eps;
    int unit;
};

template <typename T, int V>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[V]) {
    if constexpr (V == 1) {
        out[0] = to_float(*p);
    } else {
        constexpr int WIDE = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < V; i += WIDE) {
            float part[WIDE];
            unpack<T, WIDE>(load<T, WIDE>(p + i), part);
#pragma unroll
            for (int j = 0; j < WIDE; ++j) out[i + j] = part[j];
        }
    }
}

template <typename T, int V>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[V]) {
    if constexpr (V == 1) {
        *p = from_float<T>(in[0]);
    } else {
        constexpr int WIDE = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < V; i += WIDE) {
            float part[WIDE];
#pragma unroll
            for (int j = 0; j < WIDE; ++j) part[j] = in[i + j];
            store<T, WIDE>(p + i, part);
        }
    }
}

template <typename S, typename D, int V>
__global__ void __launch_bounds__(THREADS, 1) coalesce_step(const __grid_constant__ Call call) {
    const Plan& p = call.plan;
    const int block = static_cast<int>(blockIdx.x);
    const int64_t n = block / p.parts, begin = block % p.parts * p.size_of_part;
    const int64_t end = begin + p.size_of_part < p.size ? begin + p.size_of_part : p.size;
    const S* sample = static_cast<const S*>(call.sample) + n * p.size;
    const D* direction = static_cast<const D*>(call.direction) + n * p.size;
    S* y = static_cast<S*>(call.y) + n * p.size;
    const int64_t first = begin + int64_t{threadIdx.x} * V, stride = int64_t{blockDim.x} * V;

    float v[HELD][V], r[HELD][V];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (first + i * stride >= end) break;
        load_floats<D, V>(direction + first + i * stride, v[i]);
        load_floats<S, V>(sample + first + i * stride, r[i]);
    }
    float length = call.eta * element(call.distance, n);
    if (call.unit) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            if (first + i * stride >= end) break;
#pragma unroll
            for (int j = 0; j < V; ++j) squares += v[i][j] * v[i][j];
        }
        for (int64_t at = first + HELD * stride; at < end; at += stride) {
            float w[V];
            load_floats<D, V>(direction + at, w);
#pragma unroll
            for (int j = 0; j < V; ++j) squares += w[j] * w[j];
        }
        float* scratch = reinterpret_cast<float*>(cf_shared);
        float sum = block_sum(squares, scratch);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        if (p.cluster > 1) {
            cg::cluster_group cluster = cg::this_cluster();
            float* own = scratch + blockDim.x / WARP;
            if (threadIdx.x == 0) *own = sum;
            cluster.sync();
            sum = 0;
            for (int rank = 0; rank < p.cluster; ++rank) sum += *cluster.map_shared_rank(own, rank);
        }
#endif
        const float rms = __fsqrt_rn(__fdiv_rn(sum, static_cast<float>(p.size)));
        length = __fdiv_rn(length, rms < call.eps ? call.eps : rms);  // NaN is kept
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (first + i * stride >= end) break;
#pragma unroll
        for (int j = 0; j < V; ++j) r[i][j] += length * v[i][j];
        store_floats<S, V>(y + first + i * stride, r[i]);
    }
    for (int64_t at = first + HELD * stride; at < end; at += stride) {
        float w[V], z[V];
        load_floats<D, V>(direction + at, w);
        load_floats<S, V>(sample + at, z);
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] += length * w[j];
        store_floats<S, V>(y + at, z);
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.cluster > 1) cg::this_cluster().sync();  // the others may still be reading this block's sum
#endif
}

}  // namespace
}  // namespace cf::step

extern "C" {

int cf_cuda_coalesce_step_plan(const cf_coalesce_step_args* args, const cf_cuda_device* device, cf_cuda_plan* plan) {
    cf::step::Plan p;
    if (const int status = cf::step::make_plan(*args, *device, p)) return status;
    *plan = {p.blocks ? 1 : 0,         p.blocks, p.threads, p.threads / cf::WARP * 4 + 4,
             p.blocks ? p.cluster : 1, p.vector, 0};
    return CF_OK;
}

int cf_cuda_coalesce_step(const cf_coalesce_step_args* args, const cf_cuda_device* device, void*, void* stream) {
    using namespace cf::step;
    Call call = {};
    if (const int status = make_plan(*args, *device, call.plan)) return status;
    if (!call.plan.blocks) return CF_OK;
    if (!args->sample || !args->direction || !args->distance.data || !args->y) return CF_INVALID_ARGUMENT;
    if (!cf::is_aligned(args->sample) || !cf::is_aligned(args->direction) || !cf::is_aligned(args->y))
        return CF_INVALID_ARGUMENT;
    call.sample = args->sample, call.direction = args->direction, call.y = args->y, call.distance = args->distance;
    call.eta = static_cast<float>(args->eta), call.eps = static_cast<float>(args->eps), call.unit = args->unit != 0;
    const cf::Launch launch = {call.plan.blocks, call.plan.threads, call.plan.cluster,
                               call.plan.threads / cf::WARP * 4 + 4};
    return cf::with_type(args->dtype, [&](auto zero) {
        return cf::with_type(args->direction_dtype, [&](auto other) {
            using S = decltype(zero);
            using D = decltype(other);
            return call.plan.vector > 1 ? cf::enqueue<coalesce_step<S, D, VECTOR>>(*device, stream, launch, call)
                                        : cf::enqueue<coalesce_step<S, D, 1>>(*device, stream, launch, call);
        });
    });
}
}
