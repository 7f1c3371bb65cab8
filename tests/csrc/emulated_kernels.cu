#include <cuda_runtime.h>

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

namespace cg = cooperative_groups;

extern __shared__ __align__(16) unsigned char cf_shared[];

namespace {
__global__ void __launch_bounds__(1024) sum_rows(const float* __restrict__ x, float* __restrict__ sums, int length) {
    float* row = reinterpret_cast<float*>(cf_shared);
    __shared__ float warps[32];
    const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x);
    for (int i = t; i < length; i += threads) row[length - 1 - i] = __ldg(x + blockIdx.x * length + i);
    __syncthreads();
    float sum = 0;
    for (int i = t; i < length; i += threads) sum += row[i];
    const int lanes = min(32, threads - t / 32 * 32);
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_down_sync(0xffffffffu, sum, step);
        if (t % 32 + step < lanes) sum += other;
    }
    if (t % 32 == 0) warps[t / 32] = sum;
    __syncthreads();
    if (t == 0) {
        for (int w = 1; w < (threads + 31) / 32; ++w) sum += warps[w];
        sums[blockIdx.x] = sum;
    }
}
}  // namespace

extern "C" int sum_rows(const float* x, float* sums, int rows, int length, int threads) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(rows), config.blockDim = dim3(threads), config.dynamicSmemBytes = length * sizeof(float);
    return cudaLaunchKernelEx(&config, &sum_rows, x, sums, length);
}
