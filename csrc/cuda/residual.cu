// bias_residual on NVIDIA GPUs: one pass.
#include "residual.h"

namespace cf::residual {
namespace {

struct Call {
    Plan plan;
    const void* x;
    const void* residual;
    void* y;
    cf_vector bias;
};

template <typename T, int V, bool CL>
__global__ void __launch_bounds__(THREADS, 4) bias_residual(const __grid_constant__ Call call) {
    const Plan& p = call.plan;
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x), lane = thread / p.vectors;
    const int64_t column = (int64_t{block % p.column_tiles} * p.vectors + thread % p.vectors) * V;
    if (lane >= p.lanes || column >= p.columns) return;
    const int64_t first = int64_t{block / p.column_tiles} * p.lanes * ROWS + lane;
    const T* x = static_cast<const T*>(call.x) + column;
    const T* residual = static_cast<const T*>(call.residual) + column;
    float bias[V];
#pragma unroll
    for (int j = 0; j < V; ++j) bias[j] = CL && call.bias.data ? element(call.bias, column + j) : 0;
    raw_t<T, V> left[ROWS], right[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t row = first + int64_t{i} * p.lanes;
        if (row >= p.rows) break;
        left[i] = load<T, V>(x + row * p.columns);
        if (call.residual) right[i] = load<T, V>(residual + row * p.columns);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t row = first + int64_t{i} * p.lanes;
        if (row >= p.rows) break;
        float z[V], r[V];
        unpack<T, V>(left[i], z);
        const float of_row = !CL && call.bias.data ? element(call.bias, row % p.channels) : 0;
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] += CL ? bias[j] : of_row;
        if (call.residual) {
            unpack<T, V>(right[i], r);
#pragma unroll
            for (int j = 0; j < V; ++j) z[j] += r[j];
        }
        store<T, V>(static_cast<T*>(call.y) + row * p.columns + column, z);
    }
}

}  // namespace
}  // namespace cf::residual

extern "C" {

int cf_cuda_bias_residual_plan(const cf_bias_residual_args* args, const cf_cuda_device*, cf_cuda_plan* plan) {
    cf::residual::Plan p;
    if (const int status = cf::residual::make_plan(*args, p)) return status;
    *plan = {p.blocks ? 1 : 0, p.blocks, cf::residual::THREADS, 0, 1, p.vector, 0};
    return CF_OK;
}

int cf_cuda_bias_residual(const cf_bias_residual_args* args, const cf_cuda_device* device, void*, void* stream) {
    using namespace cf::residual;
    Call call = {};
    if (const int status = make_plan(*args, call.plan)) return status;
    if (!call.plan.blocks) return CF_OK;
    if (!args->x || !args->y) return CF_INVALID_ARGUMENT;
    if (!cf::is_aligned(args->x) || !cf::is_aligned(args->residual) || !cf::is_aligned(args->y))
        return CF_INVALID_ARGUMENT;
    call.x = args->x, call.residual = args->residual, call.y = args->y, call.bias = args->bias;
    const cf::Launch launch = {call.plan.blocks, THREADS, 1, 0};
    return cf::with_type(args->dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int WIDE = 16 / sizeof(T);
        const bool wide = call.plan.vector > 1;
        if (args->channels_last || args->spatial == 1) {
            return wide ? cf::enqueue<bias_residual<T, WIDE, true>>(*device, stream, launch, call)
                        : cf::enqueue<bias_residual<T, 1, true>>(*device, stream, launch, call);
        }
        return wide ? cf::enqueue<bias_residual<T, WIDE, false>>(*device, stream, launch, call)
                    : cf::enqueue<bias_residual<T, 1, false>>(*device, stream, launch, call);
    });
}
}
