// Random calls of every CPU kernel, on buffers of exactly the size that the interface says, for the sanitizers to watch: see sanitize.sh.
// Every result must be written whole and be the same with one thread and with three. Values are checked by the Python tests.
#include <stdio.h>
#include <stdlib.h>

#include <thread>
#include <vector>

#include "random_calls.h"

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

void require_written(const char* name, Buffer& b) {
    for (char* p = b.data(); p < b.bytes.data() + b.bytes.size(); p += sizes[b.dtype])
        if (static_cast<unsigned char>(p[0]) == 0xff && static_cast<unsigned char>(p[sizes[b.dtype] - 1]) == 0xff) {
            printf("%s: an element was not written\n", name);
            exit(1);
        }
}

// The call with one thread and with three, into two results that must be equal.
template <class Args>
void run(const char* name, int (*function)(const Args*), Call<Args> call) {
    std::vector<Buffer> &one = call.results, three = one;
    for (auto* results : {&one, &three}) {
        set_results(call.args, *results);
        call.args.threads = results == &one ? 1 : 3;
        if (function(&call.args) != CF_OK) {
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

void one_round(bool large) {
    const int64_t n = draw(0, 3), spatial = large ? draw(1, 1500) : draw(1, 90), dtype = draw(0, 2);
    const int64_t groups = draw(1, 5), channels = groups * draw(1, 17), c2 = draw(0, 1) * draw(0, channels - 1);
    run("group_norm_silu", cf_cpu_group_norm_silu, group_norm_silu(n, channels - c2, c2, spatial, groups, dtype));
    run("bias_residual", cf_cpu_bias_residual, bias_residual(n, channels, spatial, dtype));
    run("coalesce_step", cf_cpu_coalesce_step, coalesce_step(n, channels * spatial, dtype));
    const int64_t cz = draw(1, 9), height = draw(1, large ? 70 : 9), width = draw(1, 11);
    run("dual_head", cf_cpu_dual_head, dual_head(n, channels, cz, height, width, dtype));
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
