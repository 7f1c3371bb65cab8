// Times of every way to cut calls of group_norm_silu into blocks; see launch_plans.py, which compiles and runs this.
//
//     launch_plans < calls > times
//
// A line of either is a call: batch, channels, channels of the skip, positions, groups, film, pre_bias, silu. Below it,
// of each plan: launches, bytes of a tile's rows, parts, microseconds in a CUDA graph, and whether it is the one that
// make_plan takes. Every plan must give the numbers of the first one.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "group_norm.cu"

namespace launch_plans {

using namespace cf;
using namespace cf::group_norm;
using T = __nv_bfloat16;

void check(cudaError_t error, int line) {
    if (!error) return;
    fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(error));
    exit(1);
}
#define CHECK(call) check(call, __LINE__)

__global__ void fill(T* p, int64_t n, unsigned seed) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
        unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
        h = (h ^ h >> 16) * 0x85ebca6b;
        h = (h ^ h >> 13) * 0xc2b2ae35;
        p[i] = __float2bfloat16(static_cast<float>((h ^ h >> 16) & 0xffff) / 16384.0f - 1.7f);
    }
}

__global__ void differ(const T* a, const T* b, int64_t n, int* wrong) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
        const float x = __bfloat162float(a[i]), y = __bfloat162float(b[i]);
        if (!(fabsf(x - y) <= 0.02f * (0.1f + fabsf(y)))) atomicAdd(wrong, 1);
    }
}

// The median of three replays of a graph of so many calls.
template <typename F>
float timed(cudaStream_t stream, int count, const F& f) {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; ++i) f(i % 2);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 4; ++i) {  // the first is left out
        float ms;
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(ready, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i) times.push_back(1e3f * ms / static_cast<float>(count));
    }
    CHECK(cudaGraphExecDestroy(ready));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    return times[1];
}

}  // namespace launch_plans

using namespace launch_plans;

int main() {
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    cf_cuda_device device = {};
    device.capability = properties.major * 10 + properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    device.shared_memory = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    const int64_t most = int64_t{64} * 960 * 4096, parameters = 4 << 20;
    T *x[2], *y[2], *expected, *vectors;
    float2* slots;
    int* wrong;
    for (int i = 0; i < 2; ++i) {  // taken in turn
        CHECK(cudaMalloc(&x[i], most * sizeof(T)));
        CHECK(cudaMalloc(&y[i], most * sizeof(T)));
        fill<<<1024, 256, 0, stream>>>(x[i], most, static_cast<unsigned>(i));
    }
    CHECK(cudaMalloc(&expected, most * sizeof(T)));
    CHECK(cudaMalloc(&vectors, parameters * sizeof(T)));
    CHECK(cudaMalloc(&slots, 256 << 20));
    CHECK(cudaMalloc(&wrong, sizeof(int)));
    fill<<<64, 256, 0, stream>>>(vectors, parameters, 99);

    int n, c1, c2, positions, groups, film, pre_bias, silu, failures = 0;
    while (scanf("%d,%d,%d,%d,%d,%d,%d,%d", &n, &c1, &c2, &positions, &groups, &film, &pre_bias, &silu) == 8) {
        const int64_t channels = c1 + c2, total = n * channels * positions;
        if (total > most || (3 * int64_t{n} + 4) * channels > parameters) return 2;
        cf_group_norm_silu_args a = {};
        a.dtype = CF_BFLOAT16, a.channels_last = 1, a.eps = 1e-5, a.silu = silu;
        a.n = n, a.c1 = c1, a.c2 = c2, a.spatial = positions, a.groups = groups;
        a.x = x[0], a.skip = c2 ? x[0] : nullptr, a.y = y[0];
        Plan base;
        if (make_plan(a, device, base)) return 3;
        const auto call = [&](const Plan& plan, int set, T* result) {
            Call each = {};
            each.plan = plan, each.slots = slots, each.eps = 1e-5f, each.silu = silu;
            each.x = x[set], each.skip = c2 ? x[set] + int64_t{n} * c1 * positions : nullptr, each.y = result;
            each.weight = {vectors, CF_BFLOAT16}, each.bias = {vectors + channels, CF_BFLOAT16};
            if (pre_bias) each.pre_bias = {vectors + 2 * channels, CF_BFLOAT16};
            if (film) {
                each.scale = {vectors + 3 * channels, CF_BFLOAT16}, each.shift = {vectors + 4 * channels, CF_BFLOAT16};
                each.scale_stride = each.shift_stride = 2 * channels;
            }
            return plan.vector > 1 ? run<T, 8, true>(each, device, stream) : run<T, 1, true>(each, device, stream);
        };
        printf("%d,%d,%d,%d,%d,%d,%d,%d\n", n, c1, c2, positions, groups, film, pre_bias, silu);
        const int count = std::max(2, std::min(20, static_cast<int>(150e6 / (4e6 + 2.0 * static_cast<double>(total)))));
        bool first = true;
        int columns = 0;
        for (const int64_t bytes : {256, 128, 64, 32, 16}) {
            Plan plan = base;
            if (!tile(plan, bytes, sizeof(T)) || plan.columns == columns) continue;
            columns = plan.columns;
            for (int parts = 1; parts <= MOST_SPLITS; parts *= 2) {
                split(plan, parts);
                if (plan.splits != parts) break;
                for (const bool fused : {false, true}) {
                    if (fused && (plan.tiles_per_group != 1 || parts > 8)) continue;
                    plan.fused = fused;
                    plan.shared_memory = Shared(plan, sizeof(T)).total;
                    if (plan.shared_memory > device.shared_memory) continue;
                    prepare_divisors(plan);
                    if (call(plan, 0, first ? expected : y[0])) return 4;
                    int found = 0;
                    CHECK(cudaMemsetAsync(wrong, 0, sizeof(int), stream));
                    if (!first) differ<<<1024, 256, 0, stream>>>(y[0], expected, total, wrong);
                    CHECK(cudaMemcpyAsync(&found, wrong, sizeof(int), cudaMemcpyDeviceToHost, stream));
                    CHECK(cudaStreamSynchronize(stream));
                    first = false, failures += found > 0;
                    const float us = timed(stream, count, [&](int set) { call(plan, set, y[set]); });
                    const bool is = fused == base.fused && columns == base.columns && parts == base.splits;
                    printf(" %d,%d,%d,%.2f,%d\n", fused ? 1 : 2, static_cast<int>(bytes), parts, us, is);
                }
            }
        }
    }
    if (failures) fprintf(stderr, "%d plans give other numbers than the first of their call\n", failures);
    return failures ? 5 : 0;
}
