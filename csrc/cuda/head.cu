// dual_head on NVIDIA GPUs, in two launches: the convolution with the sums over the image from the same read of h,
// then, with those sums complete, the distance and the anchor's part of the direction.
#include "head.h"

namespace cf::head {
namespace {

struct Call {
    Plan plan;
    const void* h;
    const void* weight;  // (cz, 3, 3, c), of h's dtype
    cf_vector direction_bias, distance_weight, distance_bias;
    cf_tensor4 sample, anchor, direction;
    float* distance;
    float2* slots;
    float* unanchored;
};

__device__ __forceinline__ int64_t offset(const cf_tensor4& t, int64_t n, int o, int y, int x) {
    return n * t.strides[0] + o * t.strides[1] + y * t.strides[2] + x * t.strides[3];
}

__device__ __forceinline__ float difference(const Call& call, int64_t n, int o, int y, int x) {
    return element(call.anchor.data, call.anchor.dtype, offset(call.anchor, n, o, y, x)) -
           element(call.sample.data, call.sample.dtype, offset(call.sample, n, o, y, x));
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) dual_head_heads(const __grid_constant__ Call call) {
    const Plan& p = call.plan;
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    const int64_t n = block / p.blocks_of_sample;
    const int item = block % p.blocks_of_sample * (THREADS / p.lanes) + thread / p.lanes, lane = thread % p.lanes;
    const bool active = item < p.items;
    const int first = item % p.parts * OUTPUTS, x = item / p.parts % p.runs * PIXELS, y = item / p.parts / p.runs;
    const T* h = static_cast<const T*>(call.h) + n * p.height * p.width * p.c;
    const T* weight = static_cast<const T*>(call.weight) + int64_t{first} * 9 * p.c;

    float sums[PIXELS][OUTPUTS], pooled = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PIXELS * OUTPUTS; ++i) sums[i / OUTPUTS][i % OUTPUTS] = 0;
    for (int c = lane * V; active && c < p.c; c += p.lanes * V) {
#pragma unroll 1
        for (int down = 0; down < 3; ++down) {
            const int row = y + down - 1;
            if (row < 0 || row >= p.height) continue;
            const T* of_row = h + int64_t{row} * p.width * p.c + c;
            float z[PIXELS + 2][V];
#pragma unroll
            for (int i = 0; i < PIXELS + 2; ++i) {
                const int column = x + i - 1;
                if (column >= 0 && column < p.width) {
                    unpack<T, V>(load<T, V>(of_row + int64_t{column} * p.c), z[i]);
                } else {
#pragma unroll
                    for (int j = 0; j < V; ++j) z[i][j] = 0;
                }
            }
            if (down == 1 && first == 0) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float w = element(call.distance_weight, c + j);
#pragma unroll
                    for (int i = 0; i < PIXELS; ++i) pooled += x + i < p.width ? z[i + 1][j] * w : 0;
                }
            }
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
                if (first + o >= p.cz) break;
#pragma unroll
                for (int right = 0; right < 3; ++right) {
                    float w[V];
                    unpack<T, V>(load<T, V>(weight + ((o * 3 + down) * 3 + right) * p.c + c), w);
#pragma unroll
                    for (int i = 0; i < PIXELS; ++i) {
#pragma unroll
                        for (int j = 0; j < V; ++j) sums[i][o] += z[i + right][j] * w[j];
                    }
                }
            }
        }
    }
    // the lanes' sums, of which each lane then writes some
#pragma unroll
    for (int i = 0; i < PIXELS * OUTPUTS; ++i) {
        float& sum = sums[i / OUTPUTS][i % OUTPUTS];
        for (int step = p.lanes / 2; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
        const int o = first + i % OUTPUTS, column = x + i / OUTPUTS;
        if (!active || i % p.lanes != lane || o >= p.cz || column >= p.width) continue;
        const float value = sum + element(call.direction_bias, o);
        if (p.anchored) {
            const float d = difference(call, n, o, y, column);
            squares += d * d;
            call.unanchored[((n * p.height + y) * p.width + column) * p.cz + o] = value;
        } else {
            put(const_cast<void*>(call.direction.data), call.direction.dtype, offset(call.direction, n, o, y, column),
                value);
        }
    }
    float* scratch = reinterpret_cast<float*>(cf_shared);
    pooled = block_sum(pooled, scratch);
    squares = block_sum(squares, scratch + THREADS / WARP);
    if (threadIdx.x == 0) call.slots[blockIdx.x] = make_float2(pooled, squares);
}

__global__ void __launch_bounds__(THREADS) dual_head_finish(const __grid_constant__ Call call) {
    const Plan& p = call.plan;
    const int block = static_cast<int>(blockIdx.x), part = block % p.finishing;
    const int64_t n = block / p.finishing;
    const float2* slots = call.slots + n * p.blocks_of_sample;
    float pooled = 0, squares = 0;
    for (int i = static_cast<int>(threadIdx.x); i < p.blocks_of_sample; i += THREADS)
        pooled += slots[i].x, squares += slots[i].y;
    float* scratch = reinterpret_cast<float*>(cf_shared);
    pooled = block_sum(pooled, scratch);
    squares = block_sum(squares, scratch + THREADS / WARP);
    const int64_t positions = int64_t{p.height} * p.width, size = positions * p.cz;
    const float length = p.anchored ? __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(size))) : 1;
    if (part == 0 && threadIdx.x == 0) {
        const float v = __fdiv_rn(pooled, static_cast<float>(positions)) + element(call.distance_bias, 0);
        call.distance[n] = (v > 20 ? v : log1pf(expf(v))) * length;
    }
    if (!p.anchored) return;
    const float inverse = __fdiv_rn(1, length < 1e-6f ? 1e-6f : length);  // NaN is kept
    const int begin = part * FINISHED, end = min(begin + FINISHED, static_cast<int>(size));
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
        const int o = i % p.cz, position = i / p.cz, y = position / p.width, x = position % p.width;
        const float value = call.unanchored[n * size + i] + difference(call, n, o, y, x) * inverse;
        put(const_cast<void*>(call.direction.data), call.direction.dtype, offset(call.direction, n, o, y, x), value);
    }
}

}  // namespace
}  // namespace cf::head

extern "C" {

int cf_cuda_dual_head_plan(const cf_dual_head_args* args, const cf_cuda_device* device, cf_cuda_plan* plan) {
    cf::head::Plan p;
    if (const int status = cf::head::make_plan(*args, *device, p)) return status;
    *plan = {p.n ? 2 : 0, p.blocks, cf::head::THREADS, cf::head::THREADS / cf::WARP * 8, 1, p.vector, p.workspace};
    return CF_OK;
}

int cf_cuda_dual_head(const cf_dual_head_args* args, const cf_cuda_device* device, void* workspace, void* stream) {
    using namespace cf::head;
    Call call = {};
    Plan& p = call.plan;
    if (const int status = make_plan(*args, *device, p)) return status;
    if (!p.n) return CF_OK;
    if (!args->h || !args->direction_weight.data || !args->direction_bias.data || !args->distance_weight.data)
        return CF_INVALID_ARGUMENT;
    if (!args->distance_bias.data || !args->direction.data || !args->distance || (p.workspace && !workspace))
        return CF_INVALID_ARGUMENT;
    if (!cf::is_aligned(args->h) || !cf::is_aligned(args->direction_weight.data)) return CF_INVALID_ARGUMENT;
    call.h = args->h, call.weight = args->direction_weight.data, call.direction_bias = args->direction_bias;
    call.distance_weight = args->distance_weight, call.distance_bias = args->distance_bias;
    call.sample = args->sample, call.anchor = args->anchor, call.direction = args->direction,
    call.distance = args->distance;
    call.slots = static_cast<float2*>(workspace);
    call.unanchored = reinterpret_cast<float*>(static_cast<char*>(workspace) + p.slots);
    cf::Launch launch = {p.blocks, THREADS, 1, THREADS / cf::WARP * 8};
    const int status = cf::with_type(args->dtype, [&](auto zero) {
        using T = decltype(zero);
        return p.vector > 1 ? cf::enqueue<dual_head_heads<T, VECTOR>>(*device, stream, launch, call)
                            : cf::enqueue<dual_head_heads<T, 1>>(*device, stream, launch, call);
    });
    launch.blocks = p.finish_blocks;
    return status ? status : cf::enqueue<dual_head_finish>(*device, stream, launch, call);
}
}
