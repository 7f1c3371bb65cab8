// group_norm_silu on NVIDIA GPUs; the cut into blocks is group_norm.h's.
//
// A thread sums, for each of its columns, d and d^2 over up to `RUN` of its rows, d being what lies above the first of
// them; from these it has mean and M2, the sum of squared deviations. Whatever the data, that loses no more digits than
// RUN allows: the first row is one of the rows, so M2 is at least sum(d^2) / RUN. A mean is kept as its distance from
// k_c = K_g - pre_bias_c, K_g being the median of three elements of the group. Parts are merged by
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

constexpr int RUN = 32;  // rows

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
    Quotient each_lane;  // rows, and lanes that have one more
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
        const Quotient part = divide(static_cast<int>(blockIdx.x), p.by_splits);
        const Quotient sample = divide(part.quotient, p.by_tiles), group = divide(sample.rest, p.by_tiles_per_group);
        split = part.rest;
        n = sample.quotient;
        piece = group.rest;
        first_group = group.quotient * p.groups_per_tile;
        const int all = p.channels / p.by_per_group;
        groups = min(p.groups_per_tile, all - first_group);
        begin = split * p.rows_per_split;
        rows = min(p.rows_per_split, p.rows - begin);
        const int skipped = piece * p.columns;
        base = first_group * p.per_group + (CL ? skipped : begin);
        width = min(p.columns, (CL ? groups * p.per_group : p.spatial) - skipped);
        const Quotient thread = divide(static_cast<int>(threadIdx.x), p.by_vectors);
        lane = thread.quotient;
        column = thread.rest * V;
        active = lane < p.lanes && column < width;
        each_lane = divide(rows, p.by_lanes);
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
    __device__ int rows_of(int lane) const { return each_lane.quotient + (lane < each_lane.rest); }

    // k of every channel; and a and b, as far as they do not depend on its moments.
    template <bool COEFFICIENTS>
    __device__ void parameters() {
        for (int i = threadIdx.x; i < channels(); i += blockDim.x) {
            const int c = base + i, of_group = c / p.by_per_group * p.per_group;
            T z[3];
            const int64_t positions[3] = {0, p.spatial / 2, p.spatial - 1};
#pragma unroll
            for (int j = 0; j < 3; ++j) {
                if constexpr (CL) {
                    z[j] = of_group < p.c1
                               ? static_cast<const T*>(call.x)[(n * p.spatial + positions[j]) * p.c1 + of_group]
                               : static_cast<const T*>(
                                     call.skip)[(n * p.spatial + positions[j]) * p.c2 + (of_group - p.c1)];
                } else {
                    z[j] = channel(of_group)[positions[j]];
                }
            }
            const unsigned pre_group = element_bits(call.pre_bias, of_group), pre = element_bits(call.pre_bias, c);
            if constexpr (COEFFICIENTS) {
                const unsigned weight = element_bits(call.weight, c), bias = element_bits(call.bias, c);
                const unsigned plus = element_bits(call.scale, n * call.scale_stride + c);
                const unsigned shift = element_bits(call.shift, n * call.shift_stride + c);
                const float scale = 1 + from_bits(call.scale, plus);
                a[i] = call.weight.data ? from_bits(call.weight, weight) * scale : scale;
                b[i] = from_bits(call.bias, bias) * scale + from_bits(call.shift, shift);
            }
            const float x = to_float(z[0]), y = to_float(z[1]), w = to_float(z[2]);
            const float median = fmaxf(fminf(x, y), fminf(fmaxf(x, y), w));
            k[i] = median + from_bits(call.pre_bias, pre_group) - from_bits(call.pre_bias, pre);
        }
    }

    // Leave the moments of all rows of the thread for the block; get(row) gives the raw vector. BARRIER: k is ready
    // after one alone.
    template <int ROWS, bool BARRIER, typename Get>
    __device__ void summarise(const Get& get) {
        float first[V], sums[V], squares[V];
        sum<ROWS>(first, sums, squares, lane, get);
        if constexpr (BARRIER) __syncthreads();
        leave(first, sums, squares, 0);
#pragma unroll 1
        for (int before = RUN; before < rows_of(lane); before += RUN) {
            sum<ROWS>(first, sums, squares, lane + before * p.lanes, get);
            leave(first, sums, squares, before);
        }
    }

    // Sums over `RUN` rows of the thread, of what lies above the first of them.
    template <int ROWS, typename Get>
    __device__ void sum(float (&first)[V], float (&sums)[V], float (&squares)[V], int start, const Get& get) const {
#pragma unroll
        for (int j = 0; j < V; ++j) first[j] = sums[j] = squares[j] = 0;
        if (!active || start >= rows) return;
        unpack<T, V>(get(start), first);
#pragma unroll
        for (int j = 0; !CL && j < V; ++j) first[j] -= k[start];
        const int end = min(rows, start + RUN * p.lanes);
#pragma unroll 1
        for (int row = start + p.lanes; row < end; row += ROWS * p.lanes) {
            raw_t<T, V> raw[ROWS];
#pragma unroll
            for (int u = 0; u < ROWS; ++u) {
                if (row + u * p.lanes < end) raw[u] = get(row + u * p.lanes);
            }
#pragma unroll
            for (int u = 0; u < ROWS; ++u) {
                if (row + u * p.lanes >= end) break;
                float z[V];
                unpack<T, V>(raw[u], z);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float d = (CL ? z[j] : z[j] - k[row + u * p.lanes]) - first[j];
                    sums[j] += d;
                    squares[j] += d * d;
                }
            }
        }
    }

    // Leave the moments of a run for the block, merged over the columns of a group, and with those of the rows before.
    __device__ void leave(const float (&first)[V], const float (&sums)[V], const float (&squares)[V], int before) {
        if (!active) return;
        int left = CL ? p.per_group - divide(base + column, p.by_per_group).rest : V;  // columns of the group to come
        const float count = static_cast<float>(min(RUN, rows_of(lane) - before)),
                    inverse = count ? reciprocal(count) : 0;
        float2* place = moments + threadIdx.x;
        float merged = 0;
        float2 all = make_float2(0, 0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float above = sums[j] * inverse, rest = squares[j] - sums[j] * above;
            merged += 1;
            const float d = (CL ? first[j] - k[column + j] : first[j]) + above - all.x, step = d * reciprocal(merged);
            all.x += step;
            all.y += (rest < 0 ? 0 : rest) + count * d * (d - step);
            if (--left == 0 || j == V - 1) {
                if (before) {
                    const float2 old = *place;
                    const float above_old = all.x - old.x, earlier = static_cast<float>(before);
                    const float share = count * reciprocal(earlier + count);
                    all.x = old.x + above_old * share;
                    all.y += old.y + above_old * above_old * earlier * merged * share;
                }
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
        const bool by_lane = p.lanes > vectors;  // the warp's lanes stand for what there is more of
        return merge(by_lane ? p.lanes : vectors, by_lane ? vectors : p.lanes, total, [&](int i, int outer) {
            const int of = by_lane ? i : outer, vector = first + (by_lane ? outer : i);
            const int columns = min(end, (vector + 1) * V) - max(start, vector * V);
            const int entry = CL ? first_group + index - (base + vector * V) / p.by_per_group : 0;
            const float2 part = moments[entry * p.threads + of * p.vectors + vector];
            return make_float3(static_cast<float>(rows_of(of) * columns), part.x, part.y);
        });
    }

    // part(i, o) for i < parts and o < outer: how many elements, their mean, their M2. Every lane has the result.
    template <typename Part>
    static __device__ float2 merge(int parts, int outer, float total, const Part& part) {
        const int lane = static_cast<int>(threadIdx.x % WARP);
        float sum = 0, m2 = 0;
        for (int o = 0; o < outer; ++o) {
            for (int i = lane; i < parts; i += WARP) {
                const float3 each = part(i, o);
                sum += each.x * each.y;
            }
        }
        const float mean = warp_sum(sum) * reciprocal(total);
        for (int o = 0; o < outer; ++o) {
            for (int i = lane; i < parts; i += WARP) {
                const float3 each = part(i, o);
                const float d = each.y - mean;
                m2 += each.z + each.x * d * d;
            }
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
            const float2 group = statistics[c / p.by_per_group - first_group];
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
__global__ void __launch_bounds__(THREADS, HELD<false, CL, V>)
    group_norm_statistics(const __grid_constant__ Call call) {
    Slab<T, V, CL> slab(call);
    const Plan& p = call.plan;
    slab.template parameters<false>();
    if constexpr (!CL) __syncthreads();
    slab.template summarise<4, CL>([&](int row) { return load<T, V>(slab.at(row)); });
    __syncthreads();
    const int all = p.channels / p.by_per_group;
    float2* slots = call.slots + (slab.n * p.splits + slab.split) * all * p.tiles_per_group;
    for (int i = static_cast<int>(threadIdx.x / WARP); i < slab.groups; i += static_cast<int>(blockDim.x / WARP)) {
        const float2 moments = slab.merge_block(i);
        if (threadIdx.x % WARP == 0) slots[(slab.first_group + i) * p.tiles_per_group + slab.piece] = moments;
    }
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, HELD<true, CL, V>) group_norm_apply(const __grid_constant__ Call call) {
    Slab<T, V, CL> slab(call);
    const Plan& p = call.plan;
    slab.template parameters<true>();
    const int all = p.channels / p.by_per_group, row = CL ? p.per_group : p.spatial;
    const float2* slots = call.slots + slab.n * p.splits * all * p.tiles_per_group;
    for (int i = static_cast<int>(threadIdx.x / WARP); i < slab.groups; i += static_cast<int>(blockDim.x / WARP)) {
        const float2 moments = slab.merge(p.splits * p.tiles_per_group, 1, slab.elements(), [&](int part, int) {
            const Quotient of = divide(part, p.by_tiles_per_group);
            const int split = of.quotient, piece = of.rest;
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
    slab.template apply<4>([&](int row) { return load<T, V>(slab.at(row)); });
}

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, HELD<true, CL, V>) group_norm_fused(const __grid_constant__ Call call) {
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
    slab.template parameters<true>();
    __syncthreads();
    __pipeline_wait_prior(0);
    const auto get = [&](int row) { return load<T, V>(kept + row * p.columns); };
    slab.template summarise<1, false>(get);
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
            const float2 moments = slab.merge(p.splits, 1, slab.elements(), [&](int rank, int) {
                const float2 part = *cluster.map_shared_rank(slab.own + i, rank);
                return make_float3(static_cast<float>(min(p.rows_per_split, p.rows - rank * p.rows_per_split)) * width,
                                   part.x, part.y);
            });
            if (threadIdx.x % WARP == 0) slab.statistics[i] = slab.finished(moments);
        }
        cluster.barrier_arrive();
    }
#endif
    __syncthreads();
    slab.coefficients();
    __syncthreads();
    slab.template apply<1>(get);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.splits > 1) cg::this_cluster().barrier_wait();  // the others may still be reading this block's moments
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
