// What CUDA kernels use, for test_emulation.py, which calls the functions and knows what must come out.
#include <cuda_runtime.h>

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

namespace cg = cooperative_groups;

extern __shared__ __align__(16) unsigned char cf_shared[];

namespace {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, unsigned cluster, A... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
    config.attrs = &attribute, config.numAttrs = cluster ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Sum of a row of x [rows, length] by a block of any size. The row goes through dynamic shared memory, the warps' sums
// through static.
__global__ void __launch_bounds__(1024) sum_kernel(const float* __restrict__ x, float* __restrict__ sums, int length) {
    float* row = reinterpret_cast<float*>(cf_shared);
    __shared__ float warps[32];
    const int threads = static_cast<int>(blockDim.x * blockDim.y),
              t = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    for (int i = t; i < length; i += threads) row[length - 1 - i] = __ldg(x + blockIdx.x * length + i);
    __syncthreads();
    float sum = 0;
    for (int i = t; i < length; i += threads) sum += row[i];
    const int lanes = min(warpSize, threads - t / 32 * 32);
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

// Sums of x [rows, blocks of the cluster, threads]: every block adds up the others' parts, copied asynchronously in two
// groups.
__global__ void cluster_kernel(const float* x, float* sums) {
    const cg::cluster_group cluster = cg::this_cluster();
    const cg::thread_block block = cg::this_thread_block();
    float* part = reinterpret_cast<float*>(cf_shared);
    const unsigned threads = blockDim.x, t = block.thread_rank(), half = threads / 8;
    const float* source = x + blockIdx.x * threads;
    if (t < threads / 4) {
        if (t < half) __pipeline_memcpy_async(part + 4 * t, source + 4 * t, 16);
        __pipeline_commit();
        if (t >= half)
            __pipeline_memcpy_async(part + 4 * t, source + 4 * t, 16,
                                    t == threads / 4 - 1 ? 4 : 0);  // the last element is zero
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __pipeline_wait_prior(0);
    }
    cluster.sync();
    float sum = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
        sum += cluster.map_shared_rank(part, rank)[threads - 1 - t];
    __shared__ float total;
    if (t == 0) total = 0;
    for (unsigned i = 0; i < threads; ++i) {
        block.sync();
        if (i == t) total += sum;
    }
    block.sync();
    if (t == 0) sums[blockIdx.x] = total + 1000 * cluster.block_rank();
    cluster.sync();
}

// Rows of [16, threads], one for each function of warps.
__global__ void warp_kernel(unsigned* out) {
    const unsigned t = threadIdx.x, n = blockDim.x, all = 0xffffffffu, odd = t % 2;
    const unsigned long long wide = 0x100000000ull + t;
    out[t] = __ballot_sync(all, t % 3 == 0);
    out[n + t] = __any_sync(all, t == 33) * 2 + __all_sync(all, t < 32);
    out[2 * n + t] = __shfl_sync(all, t, 5);
    out[3 * n + t] = __shfl_sync(all, t, 9, 8);
    out[4 * n + t] = __shfl_up_sync(all, t, 3, 16);
    out[5 * n + t] = __shfl_down_sync(all, t, 3, 16);
    out[6 * n + t] = __shfl_xor_sync(all, t, 5);
    out[7 * n + t] = __float_as_uint(__shfl_sync(all, static_cast<float>(t), 1));
    out[8 * n + t] = static_cast<unsigned>(__shfl_sync(all, wide, 2) >> 31);
    out[9 * n + t] =
        odd ? __ballot_sync(0xaaaaaaaau, t > 9) : __ballot_sync(0x55555555u, t > 20);  // halves of a warp apart
    __shared__ unsigned lanes[1024];
    lanes[t] = t;
    __syncwarp();
    out[10 * n + t] = lanes[t ^ 1];
}

__global__ void convert_kernel(const float* x, unsigned short* half, unsigned short* bfloat, float* from_half,
                               float* from_bfloat) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    half[i] = __half_as_ushort(__float2half_rn(x[i]));
    bfloat[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
    const float2 h = __half22float2(__floats2half2_rn(x[i], 0)), b = __bfloat1622float2(__floats2bfloat162_rn(0, x[i]));
    from_half[i] = h.x, from_bfloat[i] = b.y;
}

__global__ void position_kernel(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = static_cast<int>(cg::this_cluster().block_rank());
}

__global__ void shared_kernel(float* out) {
    __shared__ float fixed[1024];
    out[threadIdx.x] = isnan(fixed[threadIdx.x]) ? reinterpret_cast<const float*>(cf_shared)[threadIdx.x] : 0;
    fixed[threadIdx.x] = 1;
}

}  // namespace

extern "C" {

int sum_rows(const float* x, float* sums, int rows, int length, int width, int height) {
    return launch(sum_kernel, dim3(rows), dim3(width, height), length * sizeof(float), 0, x, sums, length);
}
int cluster_sums(const float* x, float* sums, int rows, int threads, int cluster) {
    return launch(cluster_kernel, dim3(rows * cluster), dim3(threads), threads * sizeof(float), cluster, x, sums);
}
int warps(unsigned* out, int threads) { return launch(warp_kernel, dim3(1), dim3(threads), 0, 0, out); }
int convert(const float* x, unsigned short* half, unsigned short* bfloat, float* from_half, float* from_bfloat,
            int count) {
    return launch(convert_kernel, dim3(count / 256), dim3(256), 0, 0, x, half, bfloat, from_half, from_bfloat);
}
int positions(int* out, int x, int y, int z, int threads, int cluster) {
    return launch(position_kernel, dim3(x, y, z), dim3(threads / 2, 2), 0, cluster, out);
}
int read_shared(float* out, int threads, int bytes) {
    return launch(shared_kernel, dim3(1), dim3(threads), bytes, 0, out);
}
int raise_shared_limit(int bytes) {
    return cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
int last_error() { return cudaGetLastError(); }
}
