#include "threads.h"

#include <sched.h>

namespace cf {
namespace {

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the process's OpenMP runtime.
void (*omp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*omp_thread_num)(void) = nullptr;
int (*omp_num_threads)(void) = nullptr;

constexpr int64_t MAX_THREADS = 64;

struct Ranges {
    int64_t items;
    void (*task)(void*, int64_t, int64_t);
    void* context;
};

// Threads that stay together while a program runs. Rank 0 runs the program and posts work; the others poll for it,
// since a step of a small network takes only a few microseconds (program.h).
//
// The protocol: rank 0 writes `work`, then raises `posted`; each other rank sees the new value, runs its share, and
// writes the value into its own `done`; rank 0 waits until all have. Release and acquire order the results of the share
// before the count that announces it.
struct Team {
    int64_t size = 1;
    alignas(64) int64_t posted = 0;  // counts the pieces of work; -1: there will be no more
    const Ranges* work = nullptr;
    struct alignas(64) Done {  // a cache line each: threads that write to one line would take it from each other
        int64_t count;
    };
    Done done[MAX_THREADS] = {};
    int (*body)(void*);
    void* context;
    int status = 0;
};
thread_local Team* team = nullptr;  // of the thread that is rank 0 of it

// Polls until ready() is true.
template <class F>
void poll_until(const F& ready) {
    for (int spins = 0; !ready(); ++spins) {
        if (spins < 4096) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();  // the thread waited for may need this processor
        }
    }
}

void run_share(const Ranges& ranges, int64_t rank, int64_t size) {
    const int64_t begin = ranges.items * rank / size, end = ranges.items * (rank + 1) / size;
    if (begin < end) ranges.task(ranges.context, begin, end);
}

void run_member(void* pointer) {
    Team& mine = *static_cast<Team*>(pointer);
    // OpenMP may give fewer threads than it was asked for
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
        poll_until([&] { return (posted = __atomic_load_n(&mine.posted, __ATOMIC_ACQUIRE)) != seen; });
        if (posted < 0) return;
        seen = posted;
        run_share(*mine.work, rank, size);
        __atomic_store_n(&mine.done[rank].count, seen, __ATOMIC_RELEASE);
    }
}

void run_range(void* pointer) { run_share(*static_cast<const Ranges*>(pointer), omp_thread_num(), omp_num_threads()); }

}  // namespace

void set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(void),
                int (*num_threads)(void)) {
    const bool complete = parallel && thread_num && num_threads;
    omp_thread_num = thread_num;
    omp_num_threads = num_threads;
    omp_parallel = complete ? parallel : nullptr;
}

int with_team(int64_t threads, int (*body)(void*), void* context) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads <= 1 || !omp_parallel) return body(context);
    Team mine;
    mine.body = body;
    mine.context = context;
    omp_parallel(run_member, &mine, static_cast<unsigned>(threads), 0);
    return mine.status;
}

int64_t sharing_threads(int64_t threads) {
    if (team) return team->size;
    return omp_parallel ? threads : 1;
}

void parallel_ranges(int64_t items, int64_t threads, void (*task)(void*, int64_t, int64_t), void* context) {
    if (threads > items) threads = items;
    if (threads <= 1 || !omp_parallel) {
        task(context, 0, items);
        return;
    }
    Ranges ranges{items, task, context};
    if (team) {
        // Every member takes part, also where fewer threads are asked for: a range may be empty.
        Team& mine = *team;
        mine.work = &ranges;
        const int64_t posted = mine.posted + 1;
        __atomic_store_n(&mine.posted, posted, __ATOMIC_RELEASE);
        run_share(ranges, 0, mine.size);
        for (int64_t rank = 1; rank < mine.size; ++rank)
            poll_until([&] { return __atomic_load_n(&mine.done[rank].count, __ATOMIC_ACQUIRE) == posted; });
        return;
    }
    omp_parallel(run_range, &ranges, static_cast<unsigned>(threads), 0);
}

}  // namespace cf
