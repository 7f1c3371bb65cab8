// Random calls of every CPU kernel, on buffers of exactly the size that the interface says, for the sanitizers to
// watch: see sanitize.sh. Every result must be written whole and be the same with one thread and with three. Values of
// ops are checked by the Python tests, those of steps here. A hash of all results is printed for each instruction set:
// it is the same for kernels that another compiler compiled (test_wheels.py).
#include <stdio.h>
#include <stdlib.h>

#include <thread>
#include <vector>

#include "random_steps.h"

namespace {

thread_local int rank_of_thread = 0, size_of_team = 1;
thread_local unsigned most_threads = 64;  // of a team, whatever is asked for

void run_as(int rank, int size, void (*task)(void*), void* data) {
    const int rank_before = rank_of_thread, size_before = size_of_team;
    rank_of_thread = rank, size_of_team = size;
    task(data);
    rank_of_thread = rank_before, size_of_team = size_before;
}

void parallel(void (*task)(void*), void* data, unsigned count, unsigned) {
    const int size = static_cast<int>(count < most_threads ? count : most_threads);
    std::vector<std::thread> team;
    for (int i = 1; i < size; ++i) team.emplace_back(run_as, i, size, task, data);
    run_as(0, size, task, data);
    for (auto& thread : team) thread.join();
}

uint64_t hash = 0;  // of all results

void add_to_hash(const char* data, size_t size) {
    for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<unsigned char>(data[i])) * 0x100000001b3u;
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
    std::vector<Buffer>&one = call.results, three = one;
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
        add_to_hash(one[i].bytes.data(), one[i].bytes.size());
        if (one[i].bytes != three[i].bytes) {
            printf("%s: three threads have another result than one\n", name);
            exit(1);
        }
    }
}

// On a thread of its own, whose scratch memory is no larger than the program needs.
void run_once(const Program& p, int64_t threads, unsigned most) {
    std::thread([&] {
        most_threads = most;
        const cf_program_args args{p.steps.data(), static_cast<int64_t>(p.steps.size()), threads};
        if (cf_cpu_run(&args) == CF_OK) return;
        printf("a program: refused\n");
        exit(1);
    }).join();
}

void clear(const Program& p) {
    for (const auto& memory : p.memories)
        if (memory->written) memory->bytes.assign(memory->bytes.size(), '\xff');
}

std::vector<std::vector<char>> results_of(const Program& p) {
    std::vector<std::vector<char>> results;
    for (const auto& memory : p.memories)
        if (memory->written) results.push_back(memory->bytes);
    return results;
}

// With one thread, and then with several or fewer than asked for, both programs at once: the same results.
void run(const Program& one, const Program& other) {
    std::vector<std::vector<char>> expected[2];
    const Program* const programs[] = {&one, &other};
    for (int i = 0; i < 2; ++i) {
        clear(*programs[i]);
        run_once(*programs[i], 1, 1);
        for (const auto& check : programs[i]->checks) check();
        for (const auto& refused : programs[i]->refusals) refused();
        expected[i] = results_of(*programs[i]);
        for (const auto& result : expected[i]) add_to_hash(result.data(), result.size());
        clear(*programs[i]);
    }
    const int64_t threads[] = {draw(2, 4), draw(2, 4)};
    const auto most = static_cast<unsigned>(draw(0, 3) ? 64 : draw(1, 3));
    std::vector<std::thread> both;
    for (int i = 0; i < 2; ++i) both.emplace_back(run_once, std::cref(*programs[i]), threads[i], most);
    for (auto& thread : both) thread.join();
    for (int i = 0; i < 2; ++i)
        if (results_of(*programs[i]) != expected[i]) {
            printf("a program: several threads have another result than one\n");
            exit(1);
        }
}

// Steps that each read the one before's result, from an image of random numbers on.
Program chain(int64_t count, bool large) {
    Program p;
    const int64_t dtypes[] = {CF_FLOAT32, CF_BFLOAT16, CF_UINT8};
    const int64_t dtype = dtypes[draw(0, multiplies(CF_UINT8) ? 2 : 1)], n = draw(0, 15) ? draw(1, 3) : 0;
    const int64_t height = draw(0, 3) ? draw(1, large ? 40 : 7) : 1, width = draw(0, 3) ? draw(1, large ? 30 : 7) : 1;
    const int64_t channels = draw(0, 3) ? (4 / bytes_of(dtype)) * draw(1, 12) : draw(1, 50);
    const bool border = dtype == CF_UINT8 || draw(0, 1);
    Image x = p.image(n, height, width, dtype == CF_UINT8 ? (channels + 3) / 4 * 4 : channels, dtype, border,
                      draw(0, 1), false);
    while (count--) x = any_step(p, x);
    return p;
}

// What no chain may have come to.
Program apart(int64_t kind, bool large) {
    Program p;
    const int64_t n = draw(0, 15) ? draw(1, 3) : 0, dtype = draw(0, 1) ? CF_FLOAT32 : CF_BFLOAT16,
                  channels = draw(1, large ? 90 : 40);
    const int64_t height = draw(1, large ? 40 : 6), width = draw(1, large ? 30 : 6);
    if (kind == 0) gather(p, nullptr, n, dtype, draw(0, 1));
    if (kind == 1) attention(p, nullptr, n, multiplies(dtype) ? dtype : static_cast<int64_t>(CF_FLOAT32));
    if (kind == 2) dual_head_step(p, n, draw(0, 2));
    if (kind == 3)
        group_norm_image(p, p.image(n, height, width, channels, dtype, 0, false, false), draw(0, 1), draw(0, 1));
    if (kind == 4) layer_norm(p, p.image(n, 1, width, channels, dtype, 0, false, false));
    if (kind == 5) gate(p, p.image(n, 1, width, 2 * channels, dtype, 0, false, false));
    if (kind == 6) pointwise(p, p.image(n, 1, width, channels, dtype, 0, false, false));
    if (kind == 7) replace_zero_rows(p, p.image(n, 1, width, channels, CF_FLOAT32, 0, false, false));
    return p;
}

void require_refused(const cf_program_args& args) {
    if (cf_cpu_run(&args) == CF_INVALID_ARGUMENT) return;
    printf("a program of %d steps for %d threads: taken\n", static_cast<int>(args.count),
           static_cast<int>(args.threads));
    exit(1);
}

void refuse_programs() {
    const cf_layer_norm_args nothing{};
    for (const cf_step& step : {cf_step{1000, &nothing}, cf_step{-1, &nothing}, cf_step{CF_GATE, nullptr}})
        require_refused({&step, 1, 2});
    require_refused({nullptr, 0, 0});
    require_refused({nullptr, -1, 1});
    require_refused({nullptr, 1, 1});
}

void one_round(bool large) {
    const int64_t n = draw(0, 3), spatial = large ? draw(1, 1500) : draw(1, 90), dtype = draw(0, 2);
    const int64_t groups = draw(1, 5), channels = groups * draw(1, 17), c2 = draw(0, 1) * draw(0, channels - 1);
    run("group_norm_silu", cf_cpu_group_norm_silu, group_norm_silu(n, channels - c2, c2, spatial, groups, dtype));
    run("bias_residual", cf_cpu_bias_residual, bias_residual(n, channels, spatial, dtype));
    run("coalesce_step", cf_cpu_coalesce_step, coalesce_step(n, channels * spatial, dtype));
    const int64_t cz = draw(1, 9), height = draw(1, large ? 70 : 9), width = draw(1, 11);
    run("dual_head", cf_cpu_dual_head, dual_head(n, channels, cz, height, width, dtype));
    for (int64_t kind = 0; kind < 8; kind += 2) run(apart(kind, large), apart(kind + 1, large));
    run(chain(1, large), chain(draw(2, 9), false));
    fingerprints();
    packs(large);
    content_hashes(large);
}

}  // namespace

int main(int count, char** words) {
    const int rounds = count > 1 ? atoi(words[1]) : 300;
    cf_cpu_set_openmp(parallel, [] { return rank_of_thread; }, [] { return size_of_team; });
    for (const char* isa : {"portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16"}) {
        if (cf_cpu_set_isa(isa) != CF_OK) continue;
        state = 1, hash = 0xcbf29ce484222325u;
        refuse_programs();
        for (int i = 0; i < rounds; ++i) one_round(i % 10 == 0);
        printf("%s: %d rounds, results %016llx\n", isa, rounds, static_cast<unsigned long long>(hash));
    }
    return 0;
}
