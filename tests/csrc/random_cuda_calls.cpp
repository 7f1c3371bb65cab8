// Random calls of every CUDA kernel, run by emulation/, for any device that a launch may be cut for: see
// sanitize_cuda.sh.
//     random_cuda_calls ROUNDS [small] [SEED]
// Every result must be near that of plain loops in float64 and have the same bits in another order of threads and
// blocks; nothing that a call reads may change. Tolerances are loose: they are there to see a wrong index. Small calls
// ask for few threads and are made once, as ThreadSanitizer needs 0.4 ms for every thread. Prints how many calls took
// which way.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "random_calls.h"

extern "C" {
void emulation_seed(uint64_t seed);
void emulation_device(int capability, int shared_memory_bytes);
}

namespace {

bool small = false;
int current_round = 0;
std::string described;  // the call
std::map<std::string, int> counts;

template <class... T>
std::string text(const char* format, T... values) {
    char buffer[400];
    snprintf(buffer, sizeof buffer, format, values...);
    return buffer;
}

void require(bool condition, const std::string& otherwise) {
    if (condition) return;
    printf("round %d: %s: %s\n", current_round, described.c_str(), otherwise.c_str());
    exit(1);
}

// ---- what must come out, in memory order

double number(const void* data, int64_t dtype, int64_t i) {
    if (dtype == CF_FLOAT32) return static_cast<const float*>(data)[i];
    const unsigned bits = static_cast<const uint16_t*>(data)[i];
    const int digits = dtype == CF_FLOAT16 ? 10 : 7, most = dtype == CF_FLOAT16 ? 31 : 255;
    const int exponent = bits >> digits & most, mantissa = bits & ((1 << digits) - 1);
    double magnitude = ldexp(mantissa + (exponent ? 1 << digits : 0), (exponent ? exponent : 1) - most / 2 - digits);
    if (exponent == most) magnitude = mantissa ? NAN : INFINITY;
    return bits >> 15 ? -magnitude : magnitude;
}
double number(const cf_vector& v, int64_t i, double otherwise = 0) {
    return v.data ? number(v.data, v.dtype, i) : otherwise;
}

using Numbers = std::vector<double>;
Numbers all(const void* data, int64_t dtype, int64_t count) {
    Numbers values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = number(data, dtype, i);
    return values;
}

std::vector<Numbers> expected(const cf_group_norm_silu_args& a) {
    const int64_t channels = a.c1 + a.c2, width = channels / a.groups;
    const auto place = [&](int64_t n, int64_t c, int64_t i, int64_t of) {
        return a.channels_last ? (n * a.spatial + i) * of + c : (n * of + c) * a.spatial + i;
    };
    Numbers y(static_cast<size_t>(a.n * channels * a.spatial)), z(static_cast<size_t>(width * a.spatial));
    for (int64_t n = 0; n < a.n; ++n) {
        for (int64_t first = 0; first < channels; first += width) {
            double mean = 0, square = 0;
            for (int64_t c = first, at = 0; c < first + width; ++c) {
                for (int64_t i = 0; i < a.spatial; ++i, ++at) {
                    z[at] = c < a.c1 ? number(a.x, a.dtype, place(n, c, i, a.c1))
                                     : number(a.skip, a.dtype, place(n, c - a.c1, i, a.c2));
                    mean += z[at] += number(a.pre_bias, c);
                }
            }
            mean /= static_cast<double>(z.size());
            for (const double value : z) square += (value - mean) * (value - mean);
            const double rstd = 1 / sqrt(square / static_cast<double>(z.size()) + a.eps);
            for (int64_t c = first, at = 0; c < first + width; ++c) {
                for (int64_t i = 0; i < a.spatial; ++i, ++at) {
                    double v = (z[at] - mean) * rstd * number(a.weight, c, 1) + number(a.bias, c);
                    v = v * (1 + number(a.scale, n * a.scale_stride + c)) + number(a.shift, n * a.shift_stride + c);
                    y[place(n, c, i, channels)] = a.silu ? v / (1 + exp(-v)) : v;
                }
            }
        }
    }
    return {y};
}

std::vector<Numbers> expected(const cf_bias_residual_args& a) {
    Numbers y = all(a.x, a.dtype, a.n * a.c * a.spatial);
    for (int64_t i = 0; i < a.n * a.c * a.spatial; ++i) {
        y[i] += number(a.bias, (a.channels_last ? i : i / a.spatial) % a.c) +
                (a.residual ? number(a.residual, a.dtype, i) : 0);
    }
    return {y};
}

std::vector<Numbers> expected(const cf_coalesce_step_args& a) {
    Numbers y = all(a.sample, a.dtype, a.n * a.size);
    const Numbers direction = all(a.direction, a.direction_dtype, a.n * a.size);
    for (int64_t n = 0; n < a.n; ++n) {
        double squares = 0;
        for (int64_t i = n * a.size; i < (n + 1) * a.size; ++i) squares += direction[i] * direction[i];
        const double rms = a.unit ? std::max(sqrt(squares / static_cast<double>(a.size)), a.eps) : 1;
        for (int64_t i = n * a.size; i < (n + 1) * a.size; ++i)
            y[i] += a.eta * number(a.distance, n) / rms * direction[i];
    }
    return {y};
}

std::vector<Numbers> expected(const cf_dual_head_args& a) {
    const int64_t size = a.cz * a.height * a.width;
    Numbers direction(static_cast<size_t>(a.n * size)), distance(static_cast<size_t>(a.n));
    const Numbers h = all(a.h, a.dtype, a.n * a.height * a.width * a.c),
                  weight = all(a.direction_weight.data, a.dtype, a.cz * 9 * a.c);
    const auto at = [](const cf_tensor4& t, int64_t n, int64_t o, int64_t y, int64_t x) {
        return n * t.strides[0] + o * t.strides[1] + y * t.strides[2] + x * t.strides[3];
    };
    const auto each = [&](const auto& f) {
        for (int64_t i = 0; i < size; ++i) f(i / (a.height * a.width), i / a.width % a.height, i % a.width);
    };
    for (int64_t n = 0; n < a.n; ++n) {
        const auto difference = [&](int64_t o, int64_t y, int64_t x) {
            return number(a.anchor.data, a.anchor.dtype, at(a.anchor, n, o, y, x)) -
                   number(a.sample.data, a.sample.dtype, at(a.sample, n, o, y, x));
        };
        double length = 1, pooled = 0, squares = 0;
        if (a.sample.data) {
            each([&](int64_t o, int64_t y, int64_t x) { squares += difference(o, y, x) * difference(o, y, x); });
            length = sqrt(squares / static_cast<double>(size));
        }
        each([&](int64_t o, int64_t y, int64_t x) {
            double sum = number(a.direction_bias, o);
            for (int64_t tap = 0; tap < 9; ++tap) {
                const int64_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
                if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
                const double* pixel = &h[((n * a.height + row) * a.width + column) * a.c];
                const double* tap_weight = &weight[(o * 9 + tap) * a.c];
                for (int64_t c = 0; c < a.c; ++c) sum += pixel[c] * tap_weight[c];
            }
            direction[at(a.direction, n, o, y, x)] =
                sum + (a.sample.data ? difference(o, y, x) / std::max(length, 1e-6) : 0);
        });
        const int64_t of_sample = a.height * a.width * a.c;
        for (int64_t i = 0; i < of_sample; ++i) pooled += h[n * of_sample + i] * number(a.distance_weight, i % a.c);
        distance[n] =
            log1p(exp(pooled / static_cast<double>(a.height * a.width) + number(a.distance_bias, 0))) * length;
    }
    return {direction, distance};
}

// ---- calls

std::string sizes_of(std::initializer_list<std::pair<const char*, int64_t>> values) {
    std::string all;
    for (const auto& [name, value] : values) all += text(" %s %lld", name, static_cast<long long>(value));
    return all;
}
std::string describe(const cf_group_norm_silu_args& a) {
    return "group_norm_silu" + sizes_of({{"n", a.n},
                                         {"c1", a.c1},
                                         {"c2", a.c2},
                                         {"spatial", a.spatial},
                                         {"groups", a.groups},
                                         {"dtype", a.dtype},
                                         {"channels_last", a.channels_last},
                                         {"pre_bias", a.pre_bias.data != nullptr},
                                         {"scale", a.scale.data != nullptr},
                                         {"shift", a.shift.data != nullptr},
                                         {"silu", a.silu}});
}
std::string describe(const cf_bias_residual_args& a) {
    return "bias_residual" + sizes_of({{"n", a.n},
                                       {"c", a.c},
                                       {"spatial", a.spatial},
                                       {"dtype", a.dtype},
                                       {"channels_last", a.channels_last},
                                       {"bias", a.bias.data != nullptr},
                                       {"residual", a.residual != nullptr}});
}
std::string describe(const cf_coalesce_step_args& a) {
    return "coalesce_step" + sizes_of({{"n", a.n},
                                       {"size", a.size},
                                       {"dtype", a.dtype},
                                       {"direction_dtype", a.direction_dtype},
                                       {"unit", a.unit}});
}
std::string describe(const cf_dual_head_args& a) {
    return "dual_head" + sizes_of({{"n", a.n},
                                   {"c", a.c},
                                   {"cz", a.cz},
                                   {"height", a.height},
                                   {"width", a.width},
                                   {"dtype", a.dtype},
                                   {"anchored", a.sample.data != nullptr}});
}
std::string describe(const cf_cuda_device& d) {
    return sizes_of(
        {{"capability", d.capability}, {"multiprocessors", d.multiprocessors}, {"shared_memory", d.shared_memory}});
}

// The ways that plans tell apart.
void count(const cf_group_norm_silu_args& a, const cf_cuda_plan& plan) {
    const int64_t width = (a.c1 + a.c2) / a.groups, slots = plan.workspace / (8 * a.n * a.groups);
    const char* of = slots > 4 ? "many" : slots > 1 ? "2 to 4" : "1";
    if (plan.launches == 1) {
        ++counts[text("group_norm_silu: cluster of %d", int(plan.cluster))];
    } else {
        ++counts[text("group_norm_silu: 2 launches, %s slots a group", of)];
    }
    ++counts[text("group_norm_silu: %s, vectors of %d", a.channels_last ? "channels last" : "contiguous",
                  int(plan.vector))];
    if (a.channels_last && width % plan.vector) ++counts["group_norm_silu: groups that begin within a vector"];
    if (width > 256 * plan.vector) ++counts["group_norm_silu: groups wider than a tile"];
    for (const int of_group : {3, 10, 12, 30}) {
        if (width == of_group) ++counts[text("group_norm_silu: %2d channels a group", of_group)];
    }
}
void count(const cf_bias_residual_args& a, const cf_cuda_plan& plan) {
    const bool channels_last = a.channels_last || a.spatial == 1;
    ++counts[text("bias_residual: %s, vectors of %d", channels_last ? "channels last" : "contiguous",
                  int(plan.vector))];
}
void count(const cf_coalesce_step_args& a, const cf_cuda_plan& plan) {
    const char* blocks = plan.blocks > a.n ? "many blocks" : "one block";
    ++counts[a.unit ? text("coalesce_step: cluster of %d", int(plan.cluster)) : text("coalesce_step: raw, %s", blocks)];
    ++counts[text("coalesce_step: vectors of %d", int(plan.vector))];
}
void count(const cf_dual_head_args& a, const cf_cuda_plan& plan) {
    ++counts[text("dual_head: %s, %s", a.sample.data ? "anchored" : "not anchored",
                  plan.blocks > a.n ? "many blocks" : "one block")];
    ++counts[text("dual_head: vectors of %d", int(plan.vector))];
}

cf_cuda_device any_device() {
    const int64_t capability = draw(0, 2) ? 90 : 80,
                  kilobyte = int64_t{1} << draw(0, small ? 4 : 7);  // as often small as large
    return {0, capability, draw(0, 1) ? draw(1, 132) : draw(1, 8),
            std::min<int64_t>(draw(kilobyte << 10, kilobyte << 11), 227 << 10)};
}

void require_near(const Buffer& result, const Numbers& right) {
    const double tolerance[] = {1e-4, 1e-3, 4e-3};
    for (size_t i = 0; i < right.size(); ++i) {
        const double x = number(result.bytes.data() + result.offset, result.dtype, static_cast<int64_t>(i)),
                     y = right[i];
        if (fabs(x - y) <= tolerance[result.dtype] * (1 + fabs(y))) continue;
        require(false, text("element %zu of %zu is %g and should be %g", i, right.size(), x, y));
    }
}

// What is refused: `refused` tries a call changed in one way.

constexpr int NO_DTYPE = 3;

template <class T>
void shift(T*& tensor) {
    tensor = const_cast<char*>(static_cast<const char*>(tensor)) + 4;
}

template <class Refused>
void spoil(const cf_group_norm_silu_args& a, const Refused& refused) {
    using Args = cf_group_norm_silu_args;
    refused("x at 4 bytes", [](Args& b) { shift(b.x); });
    if (a.skip) refused("skip at 4 bytes", [](Args& b) { shift(b.skip); });
    refused("y at 4 bytes", [](Args& b) { shift(b.y); });
    refused("no x", [](Args& b) { b.x = nullptr; });
    refused("no y", [](Args& b) { b.y = nullptr; });
    if (a.skip) refused("no skip", [](Args& b) { b.skip = nullptr; });
    if (!a.skip) refused("a skip without channels", [](Args& b) { b.skip = b.x; });
    refused("no such dtype", [](Args& b) { b.dtype = NO_DTYPE; });
    refused("no such dtype of weight", [](Args& b) { b.weight = {b.x, NO_DTYPE}; });
    refused("no such dtype of shift", [](Args& b) { b.shift = {b.x, -1}; });
    refused("groups that do not divide", [](Args& b) { b.groups = b.c1 + b.c2 + 1; });
    refused("no groups", [](Args& b) { b.groups = 0; });
    refused("n below zero", [](Args& b) { b.n = -1; });
}

template <class Refused>
void spoil(const cf_bias_residual_args& a, const Refused& refused) {
    using Args = cf_bias_residual_args;
    refused("x at 4 bytes", [](Args& b) { shift(b.x); });
    if (a.residual) refused("residual at 4 bytes", [](Args& b) { shift(b.residual); });
    refused("y at 4 bytes", [](Args& b) { shift(b.y); });
    refused("no x", [](Args& b) { b.x = nullptr; });
    refused("no y", [](Args& b) { b.y = nullptr; });
    refused("no such dtype", [](Args& b) { b.dtype = NO_DTYPE; });
    refused("no such dtype of bias", [](Args& b) { b.bias = {b.x, NO_DTYPE}; });
    refused("n below zero", [](Args& b) { b.n = -1; });
}

template <class Refused>
void spoil(const cf_coalesce_step_args&, const Refused& refused) {
    using Args = cf_coalesce_step_args;
    refused("sample at 4 bytes", [](Args& b) { shift(b.sample); });
    refused("direction at 4 bytes", [](Args& b) { shift(b.direction); });
    refused("y at 4 bytes", [](Args& b) { shift(b.y); });
    refused("no distance", [](Args& b) { b.distance.data = nullptr; });
    refused("no y", [](Args& b) { b.y = nullptr; });
    refused("no such dtype", [](Args& b) { b.dtype = NO_DTYPE; });
    refused("no such dtype of direction", [](Args& b) { b.direction_dtype = -1; });
    refused("no such dtype of distance", [](Args& b) { b.distance.dtype = NO_DTYPE; });
    refused("n below zero", [](Args& b) { b.n = -1; });
}

template <class Refused>
void spoil(const cf_dual_head_args& a, const Refused& refused) {
    using Args = cf_dual_head_args;
    refused("h at 4 bytes", [](Args& b) { shift(b.h); });
    refused("direction_weight at 4 bytes", [](Args& b) { shift(b.direction_weight.data); });
    refused("direction_weight of another dtype", [](Args& b) { b.direction_weight.dtype = (b.dtype + 1) % 3; });
    refused("no h", [](Args& b) { b.h = nullptr; });
    refused("no distance", [](Args& b) { b.distance = nullptr; });
    refused("no bias", [](Args& b) { b.direction_bias.data = nullptr; });
    refused("no such dtype", [](Args& b) { b.dtype = b.direction_weight.dtype = NO_DTYPE; });
    refused("no such dtype of direction", [](Args& b) { b.direction.dtype = NO_DTYPE; });
    if (a.sample.data) refused("no anchor", [](Args& b) { b.anchor.data = nullptr; });
    if (!a.sample.data) refused("no sample", [](Args& b) { b.anchor = b.direction; });
    refused("no channels", [](Args& b) { b.cz = 0; });
}

template <class Args>
struct Function {
    int (*plan)(const Args*, const cf_cuda_device*, cf_cuda_plan*);
    int (*launch)(const Args*, const cf_cuda_device*, void*, void*);
};

// A call that is small enough, of those that `any` draws.
template <class Args, class Any>
void run(const Function<Args>& function, const Any& any) {
    for (;;) {
        Call<Args> call = any();
        const cf_cuda_device device = any_device();
        cf_cuda_plan plan;
        described = describe(call.args) + ";" + describe(device);
        const int status = function.plan(&call.args, &device, &plan);
        if (status == CF_INVALID_ARGUMENT && device.shared_memory < 48 << 10) continue;  // of no real device
        require(status == CF_OK, text("the plan is refused, %d", status));
        if (plan.launches * plan.blocks * plan.threads > (small ? 1100 : 16000)) continue;
        require(plan.cluster == 1 || (device.capability == 90 && plan.cluster <= 8),
                "a cluster that the device does not have");
        require(plan.shared_memory <= device.shared_memory, "more shared memory than there is");

        if (plan.launches) count(call.args, plan);
        const std::vector<Buffer> inputs = call.inputs, poison = call.results;
        std::vector<Buffer> again = call.results;
        for (auto* results : {&call.results, &again}) {
            if (small && results == &again) break;
            std::vector<char> workspace(static_cast<size_t>(plan.workspace), -1);
            emulation_seed(static_cast<uint64_t>(draw(0, 0x7fffffff)));
            set_results(call.args, *results);
            const int launched = function.launch(&call.args, &device, workspace.data(), nullptr);
            require(launched == CF_OK,
                    launched >= CF_CUDA_ERROR ? cf_cuda_error(launched) : text("refused, %d", launched));
        }
        const std::vector<Numbers> right = expected(call.args);
        for (size_t i = 0; i < right.size(); ++i) {
            require_near(call.results[i], right[i]);
            require(small || call.results[i].bytes == again[i].bytes, "other bits in another order");
        }
        for (size_t i = 0; i < inputs.size(); ++i)
            require(inputs[i].bytes == call.inputs[i].bytes, text("input %zu was written", i));

        if (!plan.launches) return;
        again = poison;
        set_results(call.args, again);
        std::vector<char> workspace(static_cast<size_t>(plan.workspace));
        const auto refused = [&](const char* why, const auto& change) {
            Args args = call.args;
            change(args);
            require(function.launch(&args, &device, workspace.data(), nullptr) == CF_INVALID_ARGUMENT,
                    text("is not refused: %s", why));
        };
        spoil(call.args, refused);
        if (plan.workspace) {
            require(function.launch(&call.args, &device, nullptr, nullptr) == CF_INVALID_ARGUMENT,
                    "is not refused: no workspace");
        }
        for (size_t i = 0; i < poison.size(); ++i)
            require(again[i].bytes == poison[i].bytes, "a refused call was launched");
        return;
    }
}

template <class... T>
int64_t one_of(T... values) {
    const int64_t choices[] = {values...};
    return choices[draw(0, sizeof...(values) - 1)];
}

// Mostly few, sometimes many, and often a multiple of eight, which vectors are made of.
int64_t any_size(int64_t few, int64_t many) {
    const int64_t size = draw(1, draw(0, 3) ? few : small ? few : many);
    return draw(0, 1) ? size : (size + 7) / 8 * 8;
}

int64_t any_n() { return draw(0, 9) ? draw(1, small ? 1 : 3) : 0; }

Call<cf_group_norm_silu_args> any_group_norm_silu() {
    const int64_t many = small ? 4000 : 60000, n = any_n();
    int64_t groups = one_of(draw(1, 4), draw(1, 24), draw(1, 3) * 8), spatial = any_size(60, 2500);
    int64_t width = one_of(draw(1, 40), draw(1, 40), 3, 10, 12, 30, draw(257, 1200), draw(33, 150) * 8);
    if (!small && draw(0, 3) == 0)
        groups = draw(1, 3), width = 8, spatial = draw(500, 5000);  // only long rows of blocks are split
    if (!small && draw(0, 5) == 0) groups = draw(1, 2), width = draw(150, 256), spatial = 3;  // too few rows to split
    if (groups * width > 2 * many / 3) width = 1;
    if (n * groups * width * spatial > many) spatial = draw(1, std::max<int64_t>(1, many / n / groups / width));
    const int64_t channels = groups * width;
    const int64_t c2 = draw(0, 1) ? 0 : draw(0, 1) ? draw(0, channels - 1) : draw(0, (channels - 1) / 8) * 8;
    return group_norm_silu(n, channels - c2, c2, spatial, groups, draw(0, 2));
}

void one_round() {
    run<cf_group_norm_silu_args>({cf_cuda_group_norm_silu_plan, cf_cuda_group_norm_silu}, any_group_norm_silu);
    run<cf_bias_residual_args>({cf_cuda_bias_residual_plan, cf_cuda_bias_residual}, [] {
        return bias_residual(any_n(), any_size(40, 1200), any_size(20, 1200), draw(0, 2));
    });
    run<cf_coalesce_step_args>({cf_cuda_coalesce_step_plan, cf_cuda_coalesce_step}, [] {
        return coalesce_step(any_n(), any_size(1500, draw(0, 1) ? 9000 : 40000), draw(0, 2));
    });
    run<cf_dual_head_args>({cf_cuda_dual_head_plan, cf_cuda_dual_head}, [] {
        const int64_t cz = draw(1, draw(0, 1) ? 4 : 19), height = draw(1, small ? 4 : 9),
                      width = draw(1, small ? 6 : 11);
        return dual_head(any_n(), any_size(24, 200), cz, height, width, draw(0, 2));
    });
}

}  // namespace

int main(int words, char** word) {
    const int rounds = words > 1 ? atoi(word[1]) : 300;
    small = words > 2 && !strcmp(word[2], "small");
    if (words > 2 + small) state = static_cast<uint64_t>(atoi(word[2 + small]));
    for_cuda = true;
    emulation_device(90, 227 << 10);
    for (current_round = 0; current_round < rounds; ++current_round) one_round();
    for (const auto& [way, calls] : counts) printf("%5d %s\n", calls, way.c_str());
    printf("%d rounds\n", rounds);
    return 0;
}
