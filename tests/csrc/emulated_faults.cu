// Kernels with a planted fault and the same without, to see whether the emulation finds it: emulated_faults NAME
// faulty|sound SEED Prints how many threads saw a wrong value and what the launch returned.
#include <cuda_runtime.h>

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace cg = cooperative_groups;

extern __shared__ __align__(16) unsigned char cf_shared[];

namespace {

constexpr unsigned THREADS = 64, BLOCKS = 4;

// Every kernel sets right[i] to 1 for the threads that saw what they should. x[i] = i for all threads of the grid.
#define KERNEL(name)       \
    template <bool faulty> \
    __global__ void name([[maybe_unused]] const float* __restrict__ x, float* __restrict__ right)
#define POSITION                                                                \
    [[maybe_unused]] float* const shared = reinterpret_cast<float*>(cf_shared); \
    [[maybe_unused]] const unsigned t = threadIdx.x, i = blockIdx.x * THREADS + t, next = (t + 1) % THREADS;

KERNEL(sync_block) {
    POSITION
    shared[t] = x[i];
    if (!faulty) __syncthreads();
    right[i] = shared[next] == x[i] - t + next;
}

// The second write may overtake the first read.
KERNEL(sync_block_again) {
    POSITION
    shared[t] = x[i];
    __syncthreads();
    const float first = shared[THREADS - 1 - t];
    if (!faulty) __syncthreads();
    shared[t] = -1;
    right[i] = first == x[i] - t + (THREADS - 1 - t);
}

KERNEL(sync_warp) {
    POSITION
    shared[t] = x[i];
    if (!faulty) __syncwarp();
    right[i] = shared[t ^ 1] == static_cast<float>(i ^ 1);
}

KERNEL(sync_cluster) {
    POSITION
    const auto cluster = cg::this_cluster();
    shared[t] = x[i];
    if (!faulty) cluster.sync();
    const unsigned other = (cluster.block_rank() + 1) % BLOCKS;
    right[i] = cluster.map_shared_rank(shared, other)[t] == static_cast<float>(other * THREADS + t);
    cluster.sync();
}

// A block may end while others read its shared memory.
KERNEL(sync_cluster_at_end) {
    POSITION
    const auto cluster = cg::this_cluster();
    shared[t] = x[i];
    cluster.sync();
    const unsigned other = (cluster.block_rank() + 1) % BLOCKS;
    right[i] = cluster.map_shared_rank(shared, other)[t] == static_cast<float>(other * THREADS + t);
    if (!faulty) cluster.sync();
}

KERNEL(wait_for_copy) {
    POSITION
    __pipeline_memcpy_async(shared + t, x + i, 4);
    __pipeline_commit();
    if (!faulty) __pipeline_wait_prior(0);
    right[i] = shared[t] == x[i];
}

KERNEL(misaligned_copy) {
    POSITION
    if (t % 4 == 0) __pipeline_memcpy_async(shared + t, x + i + faulty, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    right[i] = shared[t] == x[i];
}

KERNEL(misaligned_load) {
    POSITION
    const float* const from = x + i - t % 4 + (faulty ? t % 4 : 0);
    const float4 four = *reinterpret_cast<const float4*>(from);
    right[i] = four.x == *from;
}

KERNEL(misaligned_store) {
    POSITION
    if (t % 4) return;
    const uint2 ones = make_uint2(0x3f800000, 0x3f800000);
    __stcg(reinterpret_cast<uint2*>(right + i + faulty), ones);
    right[i + 2 - 2 * faulty] = right[i + 3] = 1;
}

KERNEL(set_static) {
    POSITION
    __shared__ float value[THREADS];
    if (!faulty) value[t] = 0;
    right[i] = value[t] == 0;
    value[t] = x[i];
}

KERNEL(write_shared) {
    POSITION
    shared[t + faulty] = x[i];
    __syncthreads();
    right[i] = shared[t] == x[i];
}

KERNEL(read_shared) {
    POSITION
    shared[t] = x[i];
    __syncthreads();
    right[i] = faulty ? shared[t + 1] == x[i] + 1 : 1;
}

KERNEL(read_global) {
    POSITION
    right[i] = x[i + faulty] == x[i] + faulty;
}

// The blocks of a grid have no order.
KERNEL(write_same) {
    POSITION
    right[i] = 1;
    if (faulty && t == 5) right[t] = 1;
}

KERNEL(divergent_sync) {
    POSITION
    right[i] = 1;
    if (!faulty || t < 40) __syncthreads();
}

KERNEL(two_syncs) {
    POSITION
    right[i] = 1;
    if (faulty && t < 40)
        __syncthreads();
    else
        __syncthreads();
}

KERNEL(sync_or_warp) {
    POSITION
    right[i] = 1;
    if (faulty && t < 32) __syncwarp(t < 3 ? 7u : ~0u);
    __syncthreads();
}

KERNEL(sync_some_blocks) {
    POSITION
    right[i] = 1;
    if (!faulty || blockIdx.x != 2) cg::this_cluster().sync();
}

using Kernel = void (*)(const float*, float*);
#define CASE(name)                         \
    {                                      \
        #name, { name<false>, name<true> } \
    }
const struct {
    const char* name;
    Kernel kernels[2];
} cases[] = {
    CASE(sync_block),          CASE(sync_block_again), CASE(sync_warp),       CASE(sync_cluster),
    CASE(sync_cluster_at_end), CASE(wait_for_copy),    CASE(misaligned_copy), CASE(misaligned_load),
    CASE(misaligned_store),    CASE(set_static),       CASE(write_shared),    CASE(read_shared),
    CASE(read_global),         CASE(write_same),       CASE(divergent_sync),  CASE(two_syncs),
    CASE(sync_or_warp),        CASE(sync_some_blocks),
};

}  // namespace

int main(int, char** arguments) {
    std::vector<float> x(BLOCKS * THREADS), right(BLOCKS * THREADS);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
    emulation_seed(strtoull(arguments[3], nullptr, 10));
    for (const auto& c : cases) {
        if (strcmp(c.name, arguments[1])) continue;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = BLOCKS, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(BLOCKS), config.blockDim = dim3(THREADS),
        config.dynamicSmemBytes = THREADS * sizeof(float);
        config.attrs = &attribute, config.numAttrs = strstr(c.name, "cluster") || strstr(c.name, "blocks") ? 1 : 0;
        const cudaError_t error =
            cudaLaunchKernelEx(&config, c.kernels[!strcmp(arguments[2], "faulty")], x.data(), right.data());
        int wrong = 0;
        for (const float r : right) wrong += r != 1;
        printf("%d wrong; %s\n", wrong, cudaGetErrorString(error));
    }
}
