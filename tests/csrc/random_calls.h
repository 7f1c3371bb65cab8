// Arguments of random calls, on buffers of exactly the size that the interface says, for sanitizers to watch.
#ifndef COALESCER_FAST_TESTS_RANDOM_CALLS_H
#define COALESCER_FAST_TESTS_RANDOM_CALLS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>
#include <vector>

#include "../../csrc/abi.h"

namespace {

uint64_t state = 1;
int64_t draw(int64_t from, int64_t to) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return from + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(to - from + 1));
}

const int64_t sizes[] = {4, 2, 2};
bool for_cuda = false;  // tensors at multiples of 16 bytes, as malloc has them, and direction_weight of h's dtype

struct Buffer {
    std::vector<char> bytes;
    int64_t dtype = 0;
    size_t offset = 0;
    alignas(16) static char nothing[16];
    char* data() { return bytes.empty() ? nothing : bytes.data() + offset; }  // null would mean that it was not given
    int64_t count() const { return static_cast<int64_t>(bytes.size() - offset) / sizes[dtype]; }
};

alignas(16) char Buffer::nothing[16];

// `count` elements of about unit size, starting on an address that is a multiple of the element's size only, unless
// aligned.
Buffer numbers(int64_t count, int64_t dtype, bool aligned = false) {
    Buffer b;
    b.dtype = dtype;
    b.offset = aligned ? 0 : static_cast<size_t>(draw(0, 1) * sizes[dtype]);
    b.bytes.resize(b.offset + static_cast<size_t>(count * sizes[dtype]));
    for (int64_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(draw(-1000, 1000)) * 1e-3f;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (dtype == CF_BFLOAT16) bits >>= 16;
        if (dtype == CF_FLOAT16) bits = static_cast<uint32_t>(draw(0, 1) << 15 | draw(0x2c00, 0x3bff));
        memcpy(b.data() + i * sizes[dtype], &bits, static_cast<size_t>(sizes[dtype]));
    }
    return b;
}

Buffer poisoned(int64_t count, int64_t dtype, bool aligned = false) {
    Buffer b = numbers(count, dtype, aligned);
    if (count) memset(b.data(), 0xff, static_cast<size_t>(count * sizes[dtype]));  // NaN in all three
    return b;
}

// A call: its arguments, what they point to, and its results, which set_results gives it.
template <class Args>
struct Call {
    Args args{};
    std::vector<Buffer> inputs, results;

    const char* tensor(int64_t count, int64_t dtype) {
        inputs.push_back(numbers(count, dtype, for_cuda));
        return inputs.back().data();
    }
    cf_vector vector(int64_t count, bool maybe = true) {
        if (maybe && draw(0, 2) == 0) return {nullptr, 0};
        inputs.push_back(numbers(count, draw(0, 2)));
        return {inputs.back().data(), inputs.back().dtype};
    }
};

void set_results(cf_group_norm_silu_args& a, std::vector<Buffer>& results) { a.y = results[0].data(); }
void set_results(cf_bias_residual_args& a, std::vector<Buffer>& results) { a.y = results[0].data(); }
void set_results(cf_coalesce_step_args& a, std::vector<Buffer>& results) { a.y = results[0].data(); }
void set_results(cf_dual_head_args& a, std::vector<Buffer>& results) {
    a.direction.data = results[0].data();
    a.distance = reinterpret_cast<float*>(results[1].data());
}

Call<cf_group_norm_silu_args> group_norm_silu(int64_t n, int64_t c1, int64_t c2, int64_t spatial, int64_t groups,
                                              int64_t dtype) {
    Call<cf_group_norm_silu_args> call;
    cf_group_norm_silu_args& a = call.args;
    const int64_t channels = c1 + c2;
    a.dtype = dtype, a.channels_last = draw(0, 1), a.silu = draw(0, 1), a.eps = 1e-5;
    a.n = n, a.c1 = c1, a.c2 = c2, a.spatial = spatial, a.groups = groups;
    a.x = call.tensor(n * c1 * spatial, dtype), a.skip = c2 ? call.tensor(n * c2 * spatial, dtype) : nullptr;
    a.weight = call.vector(channels), a.bias = call.vector(channels), a.pre_bias = call.vector(channels);
    for (cf_vector* v : {&a.scale, &a.shift}) {
        const int64_t stride = draw(0, 2) ? channels + draw(0, 1) * draw(0, 9) : 0;
        *v = call.vector(n ? (n - 1) * stride + channels : 0);
        (v == &a.scale ? a.scale_stride : a.shift_stride) = stride;
    }
    call.results = {poisoned(n * channels * spatial, dtype, for_cuda)};
    return call;
}

Call<cf_bias_residual_args> bias_residual(int64_t n, int64_t c, int64_t spatial, int64_t dtype) {
    Call<cf_bias_residual_args> call;
    cf_bias_residual_args& a = call.args;
    a.dtype = dtype, a.channels_last = draw(0, 1), a.n = n, a.c = c, a.spatial = spatial;
    a.x = call.tensor(n * c * spatial, dtype), a.residual = draw(0, 1) ? call.tensor(n * c * spatial, dtype) : nullptr;
    a.bias = call.vector(c);
    call.results = {poisoned(n * c * spatial, dtype, for_cuda)};
    return call;
}

Call<cf_coalesce_step_args> coalesce_step(int64_t n, int64_t size, int64_t dtype) {
    Call<cf_coalesce_step_args> call;
    cf_coalesce_step_args& a = call.args;
    a.dtype = dtype, a.direction_dtype = draw(0, 2), a.n = n, a.size = size, a.unit = draw(0, 1), a.eta = 0.5,
    a.eps = 1e-6;
    a.sample = call.tensor(n * size, dtype), a.direction = call.tensor(n * size, a.direction_dtype);
    a.distance = call.vector(n, false);
    call.results = {poisoned(n * size, dtype, for_cuda)};
    return call;
}

// (n, c, h, w), contiguous or with channels innermost
cf_tensor4 any_layout(Buffer& b, int64_t c, int64_t h, int64_t w) {
    if (draw(0, 1)) return {b.data(), b.dtype, {c * h * w, h * w, w, 1}};
    return {b.data(), b.dtype, {c * h * w, 1, c * w, c}};
}

Call<cf_dual_head_args> dual_head(int64_t n, int64_t c, int64_t cz, int64_t height, int64_t width, int64_t dtype) {
    Call<cf_dual_head_args> call;
    cf_dual_head_args& a = call.args;
    const int64_t size = n * cz * height * width;
    a.dtype = dtype, a.n = n, a.c = c, a.cz = cz, a.height = height, a.width = width;
    a.h = call.tensor(n * c * height * width, dtype);
    a.direction_weight = for_cuda ? cf_vector{call.tensor(cz * 9 * c, dtype), dtype} : call.vector(cz * 9 * c, false);
    a.direction_bias = call.vector(cz, false);
    a.distance_weight = call.vector(c, false), a.distance_bias = call.vector(1, false);
    if (draw(0, 1)) {
        for (cf_tensor4* t : {&a.sample, &a.anchor}) {
            call.inputs.push_back(numbers(size, draw(0, 2)));
            *t = any_layout(call.inputs.back(), cz, height, width);
        }
    }
    call.results = {poisoned(size, draw(0, 2)), poisoned(n, CF_FLOAT32)};
    a.direction = any_layout(call.results[0], cz, height, width);
    return call;
}

}  // namespace

#endif
