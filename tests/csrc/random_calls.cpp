// Random calls of every native kernel, on buffers of exactly the size that the interface says, for the sanitizers to watch: see sanitize.sh.
// Every result must be written whole and be the same with one thread and with three. Values are checked by the Python tests.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "../../csrc/abi.h"

namespace {

thread_local int rank_of_thread = 0, size_of_team = 1;

void parallel(void (*task)(void*), void* data, unsigned count, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < count; ++i)
        team.emplace_back([=] {
            rank_of_thread = static_cast<int>(i), size_of_team = static_cast<int>(count);
            task(data);
        });
    size_of_team = static_cast<int>(count);
    task(data);
    for (auto& thread : team) thread.join();
    size_of_team = 1;
}

uint64_t state = 1;
int64_t draw(int64_t from, int64_t to) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return from + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(to - from + 1));
}

const int64_t sizes[] = {4, 2, 2};

struct Buffer {
    std::vector<char> bytes;
    int64_t dtype = 0;
    size_t offset = 0;
    char* data() { return bytes.data() + offset; }
};

// `count` elements of about unit size, starting on an address that is a multiple of the element's size only.
Buffer numbers(int64_t count, int64_t dtype) {
    Buffer b;
    b.dtype = dtype;
    b.offset = static_cast<size_t>(draw(0, 1) * sizes[dtype]);
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

Buffer poisoned(int64_t count, int64_t dtype) {
    Buffer b = numbers(count, dtype);
    if (count) memset(b.data(), 0xff, static_cast<size_t>(count * sizes[dtype]));  // NaN in all three
    return b;
}

void require_written(const char* name, Buffer& b) {
    for (char* p = b.data(); p < b.bytes.data() + b.bytes.size(); p += sizes[b.dtype])
        if (static_cast<unsigned char>(p[0]) == 0xff && static_cast<unsigned char>(p[sizes[b.dtype] - 1]) == 0xff) {
            printf("%s: an element was not written\n", name);
            exit(1);
        }
}

// The call with one thread and with three, into two outputs that must be equal.
template <class Args, class SetOutput>
void run(const char* name, int (*function)(const Args*), Args args, std::vector<Buffer> one, const SetOutput& set) {
    std::vector<Buffer> three = one;
    for (auto* outputs : {&one, &three}) {
        set(args, *outputs);
        args.threads = outputs == &one ? 1 : 3;
        if (function(&args) != CF_OK) {
            printf("%s: refused\n", name);
            exit(1);
        }
    }
    for (size_t i = 0; i < one.size(); ++i) {
        require_written(name, one[i]);
        if (one[i].bytes != three[i].bytes) {
            printf("%s: three threads have another result than one\n", name);
            exit(1);
        }
    }
}

cf_vector vector(std::vector<Buffer>& keep, int64_t count, bool maybe = true) {
    if (maybe && draw(0, 2) == 0) return {nullptr, 0};
    keep.push_back(numbers(count, draw(0, 2)));
    return {keep.back().data(), keep.back().dtype};
}

// (n, c, h, w), contiguous or with channels innermost
cf_tensor4 tensor(Buffer& b, int64_t c, int64_t h, int64_t w) {
    if (draw(0, 1)) return {b.data(), b.dtype, {c * h * w, h * w, w, 1}};
    return {b.data(), b.dtype, {c * h * w, 1, c * w, c}};
}

void one_round(bool large) {
    std::vector<Buffer> keep;
    keep.reserve(16);
    const int64_t n = draw(0, 3), spatial = large ? draw(1, 1500) : draw(1, 90), dtype = draw(0, 2);
    const int64_t groups = draw(1, 5), channels = groups * draw(1, 17), c2 = draw(0, 1) * draw(0, channels - 1), c1 = channels - c2;
    {
        Buffer x = numbers(n * c1 * spatial, dtype), skip = numbers(n * c2 * spatial, dtype);
        cf_group_norm_silu_args a{};
        a.x = x.data(), a.skip = c2 ? skip.data() : nullptr, a.dtype = dtype, a.channels_last = draw(0, 1);
        a.n = n, a.c1 = c1, a.c2 = c2, a.spatial = spatial, a.groups = groups, a.silu = draw(0, 1), a.eps = 1e-5;
        a.weight = vector(keep, channels), a.bias = vector(keep, channels), a.pre_bias = vector(keep, channels);
        a.scale = vector(keep, n * channels), a.scale_stride = channels;
        a.shift = vector(keep, n * channels), a.shift_stride = channels;
        run("group_norm_silu", cf_cpu_group_norm_silu, a, {poisoned(n * channels * spatial, dtype)}, [](auto& args, auto& out) { args.y = out[0].data(); });
    }
    {
        Buffer x = numbers(n * channels * spatial, dtype), other = numbers(n * channels * spatial, dtype);
        cf_bias_residual_args a{};
        a.x = x.data(), a.residual = draw(0, 1) ? other.data() : nullptr, a.dtype = dtype, a.channels_last = draw(0, 1);
        a.n = n, a.c = channels, a.spatial = spatial, a.bias = vector(keep, channels);
        run("bias_residual", cf_cpu_bias_residual, a, {poisoned(n * channels * spatial, dtype)}, [](auto& args, auto& out) { args.y = out[0].data(); });
    }
    {
        const int64_t size = channels * spatial, other = draw(0, 2);
        Buffer sample = numbers(n * size, dtype), direction = numbers(n * size, other);
        cf_coalesce_step_args a{};
        a.sample = sample.data(), a.dtype = dtype, a.direction = direction.data(), a.direction_dtype = other;
        a.distance = vector(keep, n, false), a.n = n, a.size = size, a.unit = draw(0, 1), a.eta = 0.5, a.eps = 1e-6;
        run("coalesce_step", cf_cpu_coalesce_step, a, {poisoned(n * size, dtype)}, [](auto& args, auto& out) { args.y = out[0].data(); });
    }
    {
        const int64_t cz = draw(1, 9), height = draw(1, large ? 70 : 9), width = draw(1, 11), size = n * cz * height * width;
        Buffer h = numbers(n * channels * height * width, dtype), sample = numbers(size, draw(0, 2)), anchor = numbers(size, draw(0, 2));
        cf_dual_head_args a{};
        a.h = h.data(), a.dtype = dtype, a.n = n, a.c = channels, a.cz = cz, a.height = height, a.width = width;
        a.direction_weight = vector(keep, cz * 9 * channels, false), a.direction_bias = vector(keep, cz, false);
        a.distance_weight = vector(keep, channels, false), a.distance_bias = vector(keep, 1, false);
        if (draw(0, 1)) a.sample = tensor(sample, cz, height, width), a.anchor = tensor(anchor, cz, height, width);
        std::vector<Buffer> out{poisoned(size, draw(0, 2)), poisoned(n, CF_FLOAT32)};
        out[1].offset = 0;
        out[1].bytes.resize(static_cast<size_t>(n) * 4);
        a.direction = tensor(out[0], cz, height, width);
        run("dual_head", cf_cpu_dual_head, a, out, [](auto& args, auto& outputs) {
            args.direction.data = outputs[0].data();
            args.distance = reinterpret_cast<float*>(outputs[1].data());
        });
    }
}

}  // namespace

int main(int count, char** words) {
    const int rounds = count > 1 ? atoi(words[1]) : 300;
    cf_cpu_set_openmp(parallel, [] { return rank_of_thread; }, [] { return size_of_team; });
    for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16"}) {
        if (cf_cpu_set_isa(isa) != CF_OK) continue;
        for (int i = 0; i < rounds; ++i) one_round(i % 10 == 0);
        printf("%s: %d rounds\n", isa, rounds);
    }
    return 0;
}
