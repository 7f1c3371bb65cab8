// How a kernel shares its work between threads.
//
// The library starts no threads of its own and links to no OpenMP: cf_cpu_set_openmp hands it the functions of the
// OpenMP runtime that torch has already loaded, so that there is one pool of threads in the process.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../abi.h"
#include "memory.h"

namespace cf {

// See cf_cpu_set_openmp.
void set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(void),
                int (*num_threads)(void));

// Calls body(context) with a team of `threads` threads around it, which parallel_ranges uses inside body. Threads of a
// team wait for work by polling instead of sleeping. A team has 64 threads at most, and fewer if OpenMP gives fewer.
// Returns what body returns.
int with_team(int64_t threads, int (*body)(void*), void* context);

// Calls task(context, begin, end) for a partition of [0, items) into one range a thread. Where the ranges end depends
// on the number of threads, so the result of an item must not depend on its range.
void parallel_ranges(int64_t items, int64_t threads, void (*task)(void*, int64_t, int64_t), void* context);

// How many threads parallel_ranges would use: those of the team, where there is one, which may be fewer than were asked
// for.
int64_t sharing_threads(int64_t threads);

namespace {

// Calls body(begin, end) for a partition of [0, items).
template <class F>
inline void parallel_for(int64_t items, int64_t threads, const F& body) {
    parallel_ranges(
        items, threads,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&body));
}

// The same with body(memory, begin, end), memory being `bytes` of the thread's scratch memory. Returns CF_OUT_OF_MEMORY
// if any thread could not have it.
template <class F>
inline int parallel_for_with_scratch(int64_t items, int64_t threads, size_t bytes, const F& body) {
    int status = CF_OK;
    parallel_for(items, threads, [&](int64_t begin, int64_t end) {
        if (void* memory = scratch(WORKER_SCRATCH, bytes))
            body(memory, begin, end);
        else
            __atomic_store_n(&status, CF_OUT_OF_MEMORY, __ATOMIC_RELAXED);  // several threads may fail at once
    });
    return status;
}

}  // namespace
}  // namespace cf
