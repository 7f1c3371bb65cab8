// group_norm_silu on NVIDIA GPUs; the cut into blocks is group_norm.h's.
//
// Every value is first brought near zero by k_c = K_g - pre_bias_c, K_g being the median of three elements of the
// group. A thread keeps for each of its columns the running mean and M2, the sum of squared deviations (Welford); parts
// are merged by
//
//     mean = sum_i n_i mean_i / n,  M2 = sum_i M2_i + n_i (mean_i - mean)^2        (Chan, Golub and LeVeque 1983)
//
// within a thread's vector, a block, and the cluster or the splits, in an order that the plan fixes: no atomics, the
// same bits on repeat.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "group_norm.h"

namespace cf::group_norm {
namespace {

namespace cg = cooperative_groups;

// What is given to the kernels. Of a group, float2 is mean and M2.
struct Call {
    Plan plan;
    const void* x;
    const void* skip;
    void* y;
    float2* slots;  // [n, split, group, piece]
    cf_vector weight, bias, pre_bias, scale, shift;
    int64_t scale_stride, shift_stride;
    float eps;
    int silu;
};

// The slab of a block and the place of a thread in it.
template <typename T, int V, bool CL>
struct Slab {
    const Call& call;
    const Plan& p;
    int64_t n;
    int split, piece;
    int first_group, groups;  // of the tile
    int base;                 // its first channel
    int begin, rows;          // of the block's part
    int width;                // columns there are
    int lane, column;         // of the thread: it has column to column + V - 1
    bool active;
    const T* source;
    T* target;
    unsigned source_stride, target_stride;  // of a row, in vectors
    float2* moments;                        // [entry, thread]
    float* k;                               // [channel]: what is taken off
    float* a;                               // [channel]
    float* b;                               // [channel]
    float2* statistics;                     // [group]: mean and 1 / standard deviation
    float2* own;                            // [group]: the block's moments

    __device__ explicit Slab(const Call& call) : call(call), p(call.plan) {
        const int block = static_cast<int>(blockIdx.x), rest = block / p.splits, tile = rest % p.tiles;
        split = block % p.splits;
        n = rest / p.tiles;
        piece = p.tiles_per_group > 1 ? tile % p.tiles_per_group : 0;
        first_group = p.tiles_per_group > 1 ? tile / p.tiles_per_group : tile * p.groups_per_tile;
        const int all = p.channels / p.per_group;
        groups = min(p.groups_per_tile, all - first_group);
        begin = split * p.rows_per_split;
        rows = min(p.rows_per_split, p.rows - begin);
        const int skipped = piece * p.columns;
        base = first_group * p.per_group + (CL ? skipped : begin);
        width = min(p.columns, (CL ? groups * p.per_group : p.spatial) - skipped);
        const int thread = static_cast<int>(threadIdx.x);
        lane = thread / p.vectors;
        column = thread % p.vectors * V;
        active = lane < p.lanes && column < width;
        if constexpr (CL) {
            const int c = base + column, channels = c < p.c1 ? p.c1 : p.c2;
            const int64_t position = n * p.spatial + begin;
            source = (c < p.c1 ? static_cast<const T*>(call.x) + c : static_cast<const T*>(call.skip) + (c - p.c1)) +
                     position * channels;
            target = static_cast<T*>(call.y) + position * p.channels + c;
            source_stride = static_cast<unsigned>(channels / V);
            target_stride = static_cast<unsigned>(p.channels / V);
        } else {
            source = nullptr;
            target = static_cast<T*>(call.y) + (n * p.channels + base) * p.spatial + skipped + column;
            source_stride = target_stride = static_cast<unsigned>(p.spatial / V);
        }
        const Shared at(p, sizeof(T));
        moments = reinterpret_cast<float2*>(cf_shared + at.moments);
        k = reinterpret_cast<float*>(cf_shared + at.coefficients);
        a = k + (CL ? p.columns : p.rows_per_split);
        b = a + (CL ? p.columns : p.rows_per_split);
        statistics = reinterpret_cast<float2*>(cf_shared + at.groups);
        own = statistics + p.groups_per_tile;
    }

    __device__ int channels() const { return CL ? width : rows; }

    __device__ const T* channel(int c) const {  // contiguous: its first element
        const bool first = c < p.c1;
        return static_cast<const T*>(first ? call.x : call.skip) +
               (n * (first ? p.c1 : p.c2) + (first ? c : c - p.c1)) * p.spatial;
    }

    __device__ const T* at(int row) const {
        if constexpr (CL) return source + static_cast<uint64_t>(static_cast<unsigned>(row) * source_stride) * V;
        return channel(base + row) + piece * p.columns + column;
    }

    // Rows that the threads of a lane have.
    __device__ int rows_of(int lane) const { return (rows - lane + p.lanes - 1) / p.lanes; }

    // K_g + pre_bias of group g is near its values.
    __device__ float centre(int g) const {
        const int c = g * p.per_group;
        float z[3];
        const int64_t positions[3] = {0, p.spatial / 2, p.spatial - 1};
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            if constexpr (CL) {
                z[i] = c < p.c1 ? to_float(static_cast<const T*>(call.x)[(n * p.spatial + positions[i]) * p.c1 + c])
                                : to_float(static_cast<const T*>(
                                      call.skip)[(n * p.spatial + positions[i]) * p.c2 + (c - p.c1)]);
            } else {
                z[i] = to_float(channel(c)[positions[i]]);
            }
        }
        const float median = fmaxf(fminf(z[0], z[1]), fminf(fmaxf(z[0], z[1]), z[2]));
        return call.pre_bias.data ? median + element(call.pre_bias, c) : median;
    }

    // k of every channel.
    __device__ void centres() {
        for (int i = threadIdx.x; i < channels(); i += blockDim.x) {
            const int c = base + i;
            const float near = centre(c / p.per_group);
            k[i] = call.pre_bias.data ? near - element(call.pre_bias, c) : near;
        }
    }

    // a and b of every channel, as far as they do not depend on its moments: read while x is on its way.
    __device__ void parameters() {
        for (int i = threadIdx.x; i < channels(); i += blockDim.x) {
            const int c = base + i;
            float scale = 1, shift = 0, offset = 0;
            if (call.scale.data) scale += element(call.scale, n * call.scale_stride + c);
            if (call.shift.data) shift = element(call.shift, n * call.shift_stride + c);
            if (call.bias.data) offset = element(call.bias, c);
            a[i] = call.weight.data ? element(call.weight, c) * scale : scale;
            b[i] = offset * scale + shift;
        }
    }

    // Running moments of the thread's columns, of all its rows: get(row) gives the raw vector, one row ahead.
    template <typename Get>
    __device__ void accumulate(float (&mean)[V], float (&m2)[V], const Get& get) const {
        float near[V];
#pragma unroll
        for (int j = 0; j < V; ++j) mean[j] = m2[j] = 0, near[j] = CL && active ? k[column + j] : 0;
        if (!active || lane >= rows) return;
        float count = 0;
        raw_t<T, V> next = get(lane);
#pragma unroll 1
        for (int row = lane; row < rows; row += p.lanes) {
            const raw_t<T, V> raw = next;
            if (row + p.lanes < rows) next = get(row + p.lanes);
            float z[V];
            unpack<T, V>(raw, z);
            count += 1;
            const float inverse = __frcp_rn(count), off = CL ? 0 : k[row];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float d = z[j] - (CL ? near[j] : off) - mean[j], step = d * inverse;
                mean[j] += step;
                m2[j] += d * (d - step);
            }
        }
    }

    // Leave them for the block, merged over the columns of a group.
    __device__ void leave(const float (&mean)[V], const float (&m2)[V]) {
        if (!active) return;
        int left = CL ? p.per_group - (base + column) % p.per_group : V;  // columns up to the end of the group
        const float count = static_cast<float>(rows_of(lane));
        float2* place = moments + threadIdx.x;
        float merged = 0;
        float2 all = make_float2(0, 0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            merged += 1;
            const float d = mean[j] - all.x, step = d * __frcp_rn(merged);
            all.x += step;
            all.y += m2[j] + count * d * (d - step);
            if (--left == 0 || j == V - 1) {
                *place = all;
                place += p.threads;
                merged = 0, left = p.per_group;
                all = make_float2(0, 0);
            }
        }
    }

    // The moments of the block's part of group `index` of the tile, by a warp.
    __device__ float2 merge_block(int index) const {
        const int start = CL ? max(0, (first_group + index) * p.per_group - base) : 0;
        const int end = CL ? min(width, (first_group + index + 1) * p.per_group - base) : width;
        const int first = start / V, vectors = (end - 1) / V - first + 1;
        const float total = static_cast<float>(rows) * static_cast<float>(end - start);
        return merge(vectors * p.lanes, total, [&](int i) {
            const int of = i / vectors, vector = first + i % vectors;
            const int columns = min(end, (vector + 1) * V) - max(start, vector * V);
            const int entry = CL ? first_group + index - (base + vector * V) / p.per_group : 0;
            const float2 part = moments[entry * p.threads + of * p.vectors + vector];
            return make_float3(static_cast<float>(rows_of(of) * columns), part.x, part.y);
        });
    }

    // part(i): how many elements, their mean, their M2. Every lane has the result.
    template <typename Part>
    static __device__ float2 merge(int parts, float total, const Part& part) {
        const int lane = static_cast<int>(threadIdx.x % WARP);
        float sum = 0, m2 = 0;
        for (int i = lane; i < parts; i += WARP) {
            const float3 each = part(i);
            sum += each.x * each.y;
        }
        const float mean = warp_sum(sum) / total;
        for (int i = lane; i < parts; i += WARP) {
            const float3 each = part(i);
            const float d = each.y - mean;
            m2 += each.z + each.x * d * d;
        }
        return make_float2(mean, warp_sum(m2));
    }

    __device__ float elements() const { return static_cast<float>(p.per_group) * static_cast<float>(p.spatial); }

    __device__ float2 finished(float2 all) const {
        return make_float2(all.x, __frcp_rn(__fsqrt_rn(all.y / elements() + call.eps)));
    }

    // y = act((x - k) * a + b): k becomes k + mean, rounded, and b makes good what the rounding lost (Knuth's sum of
    // two).
    __device__ void coefficients() {
        for (int i = threadIdx.x; i < channels(); i += blockDim.x) {
            const int c = base + i;
            const float2 group = statistics[c / p.per_group - first_group];
            const float near = k[i], high = near + group.x, part = high - near;
            const float low = (near - (high - part)) + (group.x - part), factor = group.y * a[i];
            k[i] = high, a[i] = factor, b[i] -= low * factor;
        }
    }

    template <int UNROLL, typename Get>
    __device__ void apply(const Get& get) const {
        if (!active) return;
        float high[V], factor[V], offset[V];
#pragma unroll
        for (int j = 0; CL && j < V; ++j) high[j] = k[column + j], factor[j] = a[column + j], offset[j] = b[column + j];
        for (int row = lane; row < rows; row += UNROLL * p.lanes) {
            raw_t<T, V> raw[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (row + u * p.lanes < rows) raw[u] = get(row + u * p.lanes);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int r = row + u * p.lanes;
                if (r >= rows) break;
                float z[V];
                unpack<T, V>(raw[u], z);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    if constexpr (CL) {
                        z[j] = (z[j] - high[j]) * factor[j] + offset[j];
                    } else {
                        z[j] = (z[j] - k[r]) * a[r] + b[r];
                    }
                    if (call.silu) z[j] = silu(z[j]);
                }
                store<T, V>(target + static_cast<uint64_t>(static_cast<unsigned>(r) * target_stride) * V, z);
            }
        }
    }
};

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, CL&& V > 1 ? 2 : 1)
    group_norm_statistics(const __grid_constant__ Call call) {
    Slab<T, V, CL> slab(call);
    const Plan& p = call.plan;
    slab.centres();
    __syncthreads();
    float mean[V], m2[V];
    slab.accumulate(mean, m2, [&](int row) { return load<T, V>(slab.at(row)); });
    slab.leave(mean, m2);
    __syncthreads();
    const int all = p.channels / p.per_group;
    float2* slots = call.slots + (slab.n * p.splits + slab.split) * all * p.tiles_per_group;
    for (int i = static_cast<int>(threadIdx.x / WARP); i < slab.groups; i += static_cast<int>(blockDim.x / WARP)) {
        const float2 moments = slab.merge_block(i);
        if (threadIdx.x % WARP == 0) slots[(slab.first_group + i) * p.tiles_per_group + slab.piece] = moments;
    }
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, CL&& V > 1 ? 2 : 1) group_norm_apply(const __grid_constant__ Call call) {
    Slab<T, V, CL> slab(call);
    const Plan& p = call.plan;
    slab.centres();
    slab.parameters();
    const int all = p.channels / p.per_group, row = CL ? p.per_group : p.spatial;
    const float2* slots = call.slots + slab.n * p.splits * all * p.tiles_per_group;
    for (int i = static_cast<int>(threadIdx.x / WARP); i < slab.groups; i += static_cast<int>(blockDim.x / WARP)) {
        const float2 moments = slab.merge(p.splits * p.tiles_per_group, slab.elements(), [&](int part) {
            const int split = part / p.tiles_per_group, piece = part % p.tiles_per_group;
            const int rows = min(p.rows_per_split, p.rows - split * p.rows_per_split);
            const int width = p.tiles_per_group > 1 ? min(p.columns, row - piece * p.columns) : row;
            const float2 slot = slots[(int64_t{split} * all + slab.first_group + i) * p.tiles_per_group + piece];
            return make_float3(static_cast<float>(rows) * static_cast<float>(width), slot.x, slot.y);
        });
        if (threadIdx.x % WARP == 0) slab.statistics[i] = slab.finished(moments);
    }
    __syncthreads();
    slab.coefficients();
    __syncthreads();
    slab.template apply<2>([&](int row) { return load<T, V>(slab.at(row)); });
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, CL&& V > 1 ? 2 : 1) group_norm_fused(const __grid_constant__ Call call) {
    Slab<T, V, CL> slab(call);
    const Plan& p = call.plan;
    T* kept = reinterpret_cast<T*>(cf_shared) + slab.column;  // a thread reads back what it has put there itself
    for (int row = slab.lane; slab.active && row < slab.rows; row += p.lanes) {
        if constexpr (V > 1) {
            __pipeline_memcpy_async(kept + row * p.columns, slab.at(row), 16);
        } else {
            kept[row * p.columns] = *slab.at(row);
        }
    }
    __pipeline_commit();
    slab.centres();
    slab.parameters();
    __syncthreads();
    __pipeline_wait_prior(0);
    const auto get = [&](int row) { return load<T, V>(kept + row * p.columns); };
    float mean[V], m2[V];
    slab.accumulate(mean, m2, get);
    slab.leave(mean, m2);
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x / WARP), warps = static_cast<int>(blockDim.x / WARP);
    for (int i = warp; i < slab.groups; i += warps) {
        const float2 moments = slab.merge_block(i);
        if (threadIdx.x % WARP == 0) {
            if (p.splits > 1) {
                slab.own[i] = moments;
            } else {
                slab.statistics[i] = slab.finished(moments);
            }
        }
    }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.splits > 1) {
        cg::cluster_group cluster = cg::this_cluster();
        cluster.sync();
        const float width = static_cast<float>(CL ? p.per_group : p.spatial);
        for (int i = warp; i < slab.groups; i += warps) {
            const float2 moments = slab.merge(p.splits, slab.elements(), [&](int rank) {
                const float2 part = *cluster.map_shared_rank(slab.own + i, rank);
                return make_float3(static_cast<float>(min(p.rows_per_split, p.rows - rank * p.rows_per_split)) * width,
                                   part.x, part.y);
            });
            if (threadIdx.x % WARP == 0) slab.statistics[i] = slab.finished(moments);
        }
    }
#endif
    __syncthreads();
    slab.coefficients();
    __syncthreads();
    slab.template apply<1>(get);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.splits > 1) cg::this_cluster().sync();  // the others may still be reading this block's moments
#endif
}

template <typename T, int V, bool CL>
int run(const Call& call, const cf_cuda_device& device, void* stream) {
    const Plan& p = call.plan;
    const Launch launch = {p.blocks, p.threads, p.fused ? p.splits : 1, p.shared_memory};
    if (p.fused) return enqueue<group_norm_fused<T, V, CL>>(device, stream, launch, call);
    const int status = enqueue<group_norm_statistics<T, V, CL>>(device, stream, launch, call);
    return status ? status : enqueue<group_norm_apply<T, V, CL>>(device, stream, launch, call);
}

}  // namespace
}  // namespace cf::group_norm

extern "C" {

int cf_cuda_group_norm_silu_plan(const cf_group_norm_silu_args* args, const cf_cuda_device* device,
                                 cf_cuda_plan* plan) {
    cf::group_norm::Plan p;
    if (const int status = cf::group_norm::make_plan(*args, *device, p)) return status;
    *plan = {p.blocks ? (p.fused ? 1 : 2) : 0, p.blocks, p.threads,  p.shared_memory,
             p.fused ? p.splits : 1,           p.vector, p.workspace};
    return CF_OK;
}

int cf_cuda_group_norm_silu(const cf_group_norm_silu_args* args, const cf_cuda_device* device, void* workspace,
                            void* stream) {
    using namespace cf::group_norm;
    Call call = {};
    if (const int status = make_plan(*args, *device, call.plan)) return status;
    if (!call.plan.blocks) return CF_OK;
    if (!args->x || !args->y || (call.plan.workspace && !workspace)) return CF_INVALID_ARGUMENT;
    for (const void* tensor : {args->x, args->skip, static_cast<const void*>(args->y)}) {
        if (!cf::is_aligned(tensor)) return CF_INVALID_ARGUMENT;
    }
    call.x = args->x, call.skip = args->skip, call.y = args->y;
    call.slots = static_cast<float2*>(workspace);
    call.weight = args->weight, call.bias = args->bias, call.pre_bias = args->pre_bias;
    call.scale = args->scale, call.shift = args->shift;
    call.scale_stride = args->scale_stride, call.shift_stride = args->shift_stride;
    call.eps = static_cast<float>(args->eps), call.silu = args->silu != 0;
    return cf::with_type(args->dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int WIDE = 16 / sizeof(T);
        const bool wide = call.plan.vector > 1;
        if (call.plan.channels_last) {
            return wide ? run<T, WIDE, true>(call, *device, stream) : run<T, 1, true>(call, *device, stream);
        }
        return wide ? run<T, WIDE, false>(call, *device, stream) : run<T, 1, false>(call, *device, stream);
    });
}
}
