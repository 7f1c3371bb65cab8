#include "threads.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cf {
namespace {

void (*omp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*omp_thread_num)(void) = nullptr;
int (*omp_num_threads)(void) = nullptr;

constexpr int64_t MOST_THREADS = 64;

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
};
thread_local Buffer buffers[2];

struct Ranges {
    int64_t items;
    void (*task)(void*, int64_t, int64_t);
    void* context;
};

// Threads that stay together: the one that has the work, rank 0, and others that look for it.
struct Team {
    int64_t size = 1;
    alignas(64) int64_t posted = 0;  // counts the pieces of work; -1: there will be no more
    const Ranges* work = nullptr;
    struct alignas(64) Done {
        int64_t count;
    };
    Done done[MOST_THREADS] = {};
    int (*body)(void*);
    void* context;
    int status = 0;
};
thread_local Team* team = nullptr;

// Until ready() is true. Other threads may need the processor before it can be.
template <class F>
void look_until(const F& ready) {
    for (int spins = 0; !ready(); ++spins) {
        if (spins < 4096) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();
        }
    }
}

void run_share(const Ranges& ranges, int64_t rank, int64_t size) {
    const int64_t begin = ranges.items * rank / size, end = ranges.items * (rank + 1) / size;
    if (begin < end) ranges.task(ranges.context, begin, end);
}

void run_member(void* pointer) {
    Team& mine = *static_cast<Team*>(pointer);
    const int64_t rank = omp_thread_num(), size = omp_num_threads();
    if (rank == 0) {
        mine.size = size;
        team = &mine;
        mine.status = mine.body(mine.context);
        team = nullptr;
        __atomic_store_n(&mine.posted, -1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t seen = 0;;) {
        int64_t posted;
        look_until([&] { return (posted = __atomic_load_n(&mine.posted, __ATOMIC_ACQUIRE)) != seen; });
        if (posted < 0) return;
        seen = posted;
        run_share(*mine.work, rank, size);
        __atomic_store_n(&mine.done[rank].count, seen, __ATOMIC_RELEASE);
    }
}

void run_range(void* pointer) { run_share(*static_cast<const Ranges*>(pointer), omp_thread_num(), omp_num_threads()); }

const Kernels* find(const char* isa) {
#if defined(__x86_64__) && !defined(CF_PORTABLE_ONLY)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa, "avx512_bf16") && avx512 && products) return &avx512_bf16_kernels;
    if (!strcmp(isa, "avx512") && avx512) return &avx512_kernels;
    // every processor with AVX2 and FMA has F16C
    if (!strcmp(isa, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels;
#endif
    return strcmp(isa, "portable") ? nullptr : &portable_kernels;
}

const Kernels* best() {
    const char* const faster[] = {"avx512_bf16", "avx512", "avx2"};
    for (const char* isa : faster)
        if (const Kernels* found = find(isa)) return found;
    return &portable_kernels;
}

const Kernels* current = best();

bool valid(int64_t dtype) { return dtype == CF_FLOAT32 || dtype == CF_FLOAT16 || dtype == CF_BFLOAT16; }
bool valid(const cf_vector& v) { return valid(v.dtype) || !v.data; }
bool valid(const cf_tensor4& t) { return valid(t.dtype) || !t.data; }

bool valid(const cf_group_norm_silu_args& a) {
    return valid(a.dtype) && valid(a.weight) && valid(a.bias) && valid(a.pre_bias) && valid(a.scale) &&
           valid(a.shift) && a.n >= 0 && a.c1 >= 1 && a.c2 >= 0 && a.spatial >= 0 && a.groups >= 1 &&
           (a.c1 + a.c2) % a.groups == 0 && a.eps >= 0 && (a.c2 == 0 || a.skip || a.n * a.spatial == 0);
}

bool valid(const cf_dual_head_args& a) {
    return valid(a.dtype) && valid(a.direction_weight) && valid(a.direction_bias) && valid(a.distance_weight) &&
           valid(a.distance_bias) && valid(a.sample) && valid(a.anchor) && valid(a.direction) && a.n >= 0 && a.c >= 1 &&
           a.cz >= 1 && a.height >= 1 && a.width >= 1 &&
           (a.n == 0 || !a.sample.data == !a.anchor.data);  // an empty tensor has any address
}

// The rest are steps alone, and of no samples, which have any address, only if they have other arguments that are valid.

bool valid_activation(int64_t dtype) { return dtype == CF_FLOAT32 || dtype == CF_BFLOAT16; }
bool valid_image(const cf_image& image, int64_t n) {
    return (image.data || n == 0) && (image.border == 0 || image.border == 1);
}

bool valid(const cf_group_norm_image_args& a) {
    const bool quantised = a.y.dtype == CF_UINT8;
    return valid(a.norm) && valid_activation(a.norm.dtype) && valid_image(a.y, a.norm.n) &&
           (quantised || a.y.dtype == a.norm.dtype) && quantised == !!a.quantisation.inverse &&
           quantised == !!a.quantisation.zero && (a.norm.x || a.norm.n == 0) && a.norm.spatial >= 1 && a.width >= 1 &&
           a.norm.spatial % a.width == 0;
}

bool valid(const cf_convolution_args& a) {
    const bool integers = a.x.dtype == CF_UINT8;
    const int64_t size = integers ? 1 : (a.x.dtype == CF_BFLOAT16 ? 2 : 4);
    return (integers || valid_activation(a.x.dtype)) &&
           (a.x.dtype == CF_FLOAT32 ? a.y.dtype == CF_FLOAT32 : valid_activation(a.y.dtype)) && valid_image(a.x, a.n) &&
           valid_image(a.y, a.n) && a.n >= 0 && a.height >= 1 && a.width >= 1 && a.channels >= 1 &&
           a.channels * size % 4 == 0 && a.outputs >= 1 && (a.taps == 1 || (a.taps == 9 && a.x.border == 1)) &&
           a.stride >= 1 && a.weight && integers == !!a.scale &&
           (!a.residual.data || (valid_image(a.residual, a.n) && a.residual.dtype == a.y.dtype)) &&
           (!integers || a.channels * a.taps <= INT32_MAX / (255 * 128));  // a sum of more might not fit
}

bool valid(const cf_gather_args& a) {
    bool parts = true;
    for (int i = 0; i < 2; ++i)
        parts = parts && valid(a.parts[i]) && a.channels[i] >= 0 && (a.channels[i] == 0 || a.parts[i].data || a.n == 0);
    return parts && valid_activation(a.y.dtype) && valid_image(a.y, a.n) && a.n >= 0 && a.height >= 1 && a.width >= 1 &&
           a.factor >= 1 && a.height % a.factor == 0 && a.width % a.factor == 0 && a.y_channels >= 1 &&
           a.channels[0] + a.channels[1] <= a.y_channels;
}

bool valid(const cf_attention_args& a) {
    return valid_activation(a.dtype) && a.n >= 0 && a.heads >= 1 && a.length >= 1 && a.k_length >= 1 && a.width >= 1 &&
           (a.dtype == CF_FLOAT32 || a.width % 2 == 0) && ((a.q.data && a.k.data && a.v.data && a.y) || a.n == 0);
}

bool valid(const cf_layer_norm_args& a) {
    return valid_activation(a.dtype) && a.rows >= 0 && a.channels >= 1 && a.weight && a.bias && a.eps >= 0 &&
           ((a.x && a.y) || a.rows == 0);
}

bool valid(const cf_gate_args& a) {
    return valid_activation(a.dtype) && a.rows >= 0 && a.channels >= 1 && ((a.value && a.gate && a.y) || a.rows == 0);
}

bool valid(const cf_pointwise_args& a) {
    return valid_activation(a.dtype) && a.count >= 0 && a.function >= CF_IDENTITY && a.function <= CF_TANH &&
           ((a.x && a.y) || a.count == 0);
}

bool valid(const cf_replace_zero_rows_args& a) {
    return a.rows >= 0 && a.channels >= 1 && a.row && ((a.x && a.y) || a.rows == 0);
}

bool valid(const cf_step& step) {
    if (!step.args) return false;
    switch (step.kind) {
#define CF_VALID(name, number, type, function) \
    case CF_##name:                            \
        return valid(*static_cast<const type*>(step.args));
        CF_STEPS(CF_VALID)
#undef CF_VALID
        default:
            return false;
    }
}

// Four hashes side by side, so that a multiplication need not wait for the one before.
struct Hash {
    uint64_t lanes[4] = {1, 2, 3, 4};
    void add(int lane, const char* from, size_t bytes) {
        uint64_t word = 0;
        memcpy(&word, from, bytes);
        lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15u;
        lanes[lane] ^= lanes[lane] >> 29;
    }
    uint64_t all() const {
        uint64_t hash = 0;
        for (uint64_t lane : lanes) hash = ((hash ^ lane) * 0x9e3779b97f4a7c15u) ^ (lane >> 32);
        return hash;
    }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        free(buffer.data);
        buffer.size = 0;
        if (posix_memalign(&buffer.data, 64, bytes)) return buffer.data = nullptr;
        buffer.size = bytes;
    }
    return buffer.data;
}

int64_t last_level_cache() {
    static const int64_t bytes = [] {
        int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
        return size > 0 ? size : int64_t{32} << 20;
    }();
    return bytes;
}

void prepare_output(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    if (bytes < 16 * static_cast<int64_t>(PAGE)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
    (void)data, (void)bytes;
#endif
}

int with_team(int64_t threads, int (*body)(void*), void* context) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1 || !omp_parallel) return body(context);
    Team mine;
    mine.body = body;
    mine.context = context;
    omp_parallel(run_member, &mine, static_cast<unsigned>(threads), 0);
    return mine.status;
}

void parallel_ranges(int64_t items, int64_t threads, void (*task)(void*, int64_t, int64_t), void* context) {
    if (threads > items) threads = items;
    if (threads <= 1 || !omp_parallel) {
        task(context, 0, items);
        return;
    }
    Ranges ranges{items, task, context};
    if (team) {
        Team& mine = *team;
        mine.work = &ranges;
        const int64_t posted = mine.posted + 1;
        __atomic_store_n(&mine.posted, posted, __ATOMIC_RELEASE);
        run_share(ranges, 0, mine.size);
        for (int64_t rank = 1; rank < mine.size; ++rank)
            look_until([&] { return __atomic_load_n(&mine.done[rank].count, __ATOMIC_ACQUIRE) == posted; });
        return;
    }
    omp_parallel(run_range, &ranges, static_cast<unsigned>(threads), 0);
}

}  // namespace cf

using namespace cf;

int cf_abi_version(void) { return CF_ABI_VERSION; }

void cf_cpu_set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(void),
                       int (*num_threads)(void)) {
    const bool complete = parallel && thread_num && num_threads;
    omp_thread_num = thread_num;
    omp_num_threads = num_threads;
    omp_parallel = complete ? parallel : nullptr;
}

const char* cf_cpu_isa(void) { return current->isa; }

int cf_cpu_set_isa(const char* isa) {
    const Kernels* found = find(isa);
    if (found) current = found;
    return found ? CF_OK : CF_INVALID_ARGUMENT;
}

int cf_cpu_group_norm_silu(const cf_group_norm_silu_args* a) {
    if (!valid(*a) || a->threads < 1) return CF_INVALID_ARGUMENT;
    return a->n * a->spatial > 0 ? current->group_norm_silu(*a) : CF_OK;
}

int cf_cpu_bias_residual(const cf_bias_residual_args* a) {
    if (!valid(a->dtype) || !valid(a->bias) || a->n < 0 || a->c < 0 || a->spatial < 0) return CF_INVALID_ARGUMENT;
    return a->n * a->c * a->spatial > 0 ? current->bias_residual(*a) : CF_OK;
}

int cf_cpu_dual_head(const cf_dual_head_args* a) {
    if (!valid(*a)) return CF_INVALID_ARGUMENT;
    return a->n > 0 ? current->dual_head(*a, a->threads) : CF_OK;
}

int cf_cpu_coalesce_step(const cf_coalesce_step_args* a) {
    if (!valid(a->dtype) || !valid(a->direction_dtype) || !valid(a->distance) || a->n < 0 || a->size < 0 ||
        !(a->eps > 0))
        return CF_INVALID_ARGUMENT;
    return a->n * a->size > 0 ? current->coalesce_step(*a) : CF_OK;
}

int cf_cpu_vector_width(void) { return current->width; }

int cf_cpu_products(void) { return current->products; }

int cf_cpu_run(const cf_program_args* a) {
    if (a->count < 0 || a->threads < 1 || (a->count > 0 && !a->steps)) return CF_INVALID_ARGUMENT;
    const auto body = [](void* context) {
        const cf_program_args& program = *static_cast<const cf_program_args*>(context);
        int status = CF_OK;
        for (int64_t i = 0; i < program.count && status == CF_OK; ++i)
            status = valid(program.steps[i]) ? current->run_step(program.steps[i], program.threads)
                                             : static_cast<int>(CF_INVALID_ARGUMENT);
        return status;
    };
    return with_team(a->threads, body, const_cast<cf_program_args*>(a));
}

int cf_cpu_fingerprint(const cf_fingerprint_args* a) {
    constexpr int64_t WORD = sizeof(uint64_t);
    if (a->count < 0 || a->whole < 0 || a->samples < 2 || !a->hash || (a->count > 0 && !a->spans))
        return CF_INVALID_ARGUMENT;
    Hash hash;
    for (int64_t i = 0; i < a->count; ++i) {
        const cf_span& span = a->spans[i];
        const char* data = static_cast<const char*>(span.data);
        if (span.bytes < 0 || (span.bytes > 0 && !data)) return CF_INVALID_ARGUMENT;
        const int64_t words = span.bytes / WORD, rest = span.bytes % WORD;
        const bool whole = span.bytes <= a->whole || words < a->samples;
        const int64_t places = whole ? words : a->samples;
        for (int64_t k = 0; k < places; ++k) {
            const int64_t word = whole ? k : k * (words - 1) / (places - 1);
            hash.add(static_cast<int>(k & 3), data + word * WORD, WORD);
        }
        if (rest) hash.add(0, data + words * WORD, static_cast<size_t>(rest));
    }
    *a->hash = hash.all();
    return CF_OK;
}
