// The scheduler of emulation.h, for Linux. Every CUDA thread is a fiber. Block r of a cluster runs on system thread r,
// which gives it its own __shared__ variables; only one system thread runs at a time, the holder of the turn, so a seed
// fixes the whole schedule.
//
// The sanitizers' functions are weak: this file is compiled without them and serves programs with and without. Its own
// state is thereby invisible to them, which is meant: ThreadSanitizer sees each CUDA thread as a thread of its own,
// ordered by nothing but barriers, warp meetings and launches. It cannot be told that memory begins anew with a block,
// so under it every block has new system threads and stacks.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#error "compile this file without sanitizers"
#endif

#include "emulation.h"

#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define WEAK __attribute__((weak))
extern "C" {
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned no_sync);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_poison_memory_region(const volatile void*, size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
}

constexpr size_t SHARED = 227 << 10, GUARD = 4096, STACK = 256 << 10, PAGE = 4096;
constexpr unsigned THREADS = 1024, CLUSTER = 8, HOST = CLUSTER;

alignas(128) thread_local unsigned char cf_shared[SHARED + GUARD];
__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace {

using emulation::Site;

// ---- switching stacks

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(EMULATION_UCONTEXT)
struct Context {
    void* stack;
};
extern "C" void emulation_switch(Context* from, Context* to);
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov (%rsi), %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.size emulation_switch, .-emulation_switch
)");
constexpr int SAVED = 8,
              RETURN = 6;  // words: the return address is popped off an address that is 8 below a multiple of 16
#else
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, %function
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp; str x9, [x0]
    ldr x9, [x1]; mov sp, x9
    ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulation_switch, .-emulation_switch
)");
constexpr int SAVED = 20, RETURN = 11;
#endif
void prepare(Context& context, char* stack, void (*entry)()) {
    void** words = reinterpret_cast<void**>(stack + STACK) - SAVED;
    std::fill_n(words, SAVED, nullptr);
    words[RETURN] = reinterpret_cast<void*>(entry);
    context.stack = words;
}
#else
using Context = ucontext_t;
void emulation_switch(Context* from, Context* to) { swapcontext(from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = STACK;
    makecontext(&context, entry, 0);
}
#endif

// ---- state

struct Copy {
    void* to;
    const void* from;
    size_t size, zeros, group;
};

struct Thread {
    ~Thread() {
        if (stack) munmap(stack, STACK);
        if (tsan) __tsan_destroy_fiber(tsan);
    }
    Context context;
    char* stack = nullptr;
    void *tsan = nullptr, *fake_stack = nullptr;
    uint3 index;
    unsigned number;
    bool ended;
    Site site;      // where it waits
    unsigned mask;  // for how many lanes; 0 at a barrier
    uint64_t value;
    int source;
    std::vector<Copy> copies;
    size_t commits;
};

struct Barrier {
    unsigned arrived = 0, phase = 0;
    Site site;
    // addresses for ThreadSanitizer, by phase: a thread may reach the next phase before another has left this one
    uint64_t sync[2];
};

// Lanes of a warp that meet, or have met and are not all gone.
struct Meeting {
    const char* name;
    unsigned mask, arrived = 0, leaving = 0;
    uint64_t sync;
};

struct Block {
    std::vector<Thread> threads{THREADS};
    std::vector<unsigned> runnable;
    unsigned rank, count, left, lazy;  // lazy: warps that run only when no other can
    uint3 index;
    bool begun, ended;
    unsigned char *shared, *thread_local_begin = nullptr, *thread_local_end = nullptr;
    Barrier barrier, cluster_barrier;  // the cluster's is block 0's
    Meeting meetings[THREADS / 32][32];
    uint64_t end;  // an address for ThreadSanitizer
    Context context;
    void *tsan, *fake_stack;
    const void* system_stack;
    size_t system_stack_size;
};

struct Job {
    void (*run)(void*);
    void* call;
    dim3 grid, block, cluster;
    size_t shared;
    unsigned threads, blocks;  // of a block, of a cluster
};

struct Machine {
    std::mutex launching, m;
    std::condition_variable wake[CLUSTER + 1];
    unsigned turn = HOST;
    std::unique_ptr<Block> blocks[CLUSTER];
    Job job;
    uint64_t end;  // an address for ThreadSanitizer
    std::string failure;
    uint64_t random = 1;
    std::map<const void*, size_t> shared_limit;
    int capability = 90;
    size_t shared_memory = SHARED;
};
Machine& machine = *new Machine;  // never destroyed: its threads outlive main
__thread cudaError_t last_error;
__thread int current_device;

struct Recording {
    int devices = 0;  // 0: nothing is noted
    std::string calls, taken, failing;
};
Recording& recording = *new Recording;
__thread Block* block;
__thread Thread* current;

unsigned draw(unsigned below) {
    uint64_t z = machine.random += 0x9e3779b97f4a7c15;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<unsigned>(((z ^ z >> 31) >> 32) * below >> 32);
}

void tsan_acquire(void* p) {
    if (__tsan_acquire) __tsan_acquire(p);
}
void tsan_release(void* p) {
    if (__tsan_release) __tsan_release(p);
}

// ---- fibers

void to_scheduler() {
    Thread& t = *current;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(block->tsan, 1);
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&t.fake_stack, block->system_stack, block->system_stack_size);
    emulation_switch(&t.context, &block->context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
}

void to_fiber(Thread& t) {
    current = &t;
    threadIdx = t.index;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(t.tsan, 1);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&block->fake_stack, t.stack, STACK);
    emulation_switch(&block->context, &t.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
}

void fiber() {
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, &block->system_stack, &block->system_stack_size);
    for (;;) {  // once a block
        machine.job.run(machine.job.call);
        std::vector<Copy>().swap(current->copies);
        tsan_release(&block->end);
        tsan_release(&machine.end);
        current->ended = true;
        --block->left;
        to_scheduler();
    }
}

void renew(Thread& t) {
    if (!t.stack) {
        t.stack = static_cast<char*>(
            mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (t.stack == MAP_FAILED || mprotect(t.stack, PAGE, PROT_NONE))
            perror("emulation: stack of a thread"), abort();
    }
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(t.stack, STACK);
    if (t.tsan) __tsan_destroy_fiber(t.tsan);
    if (__tsan_create_fiber) t.tsan = __tsan_create_fiber(0);
    prepare(t.context, t.stack, fiber);
}

// ---- failures

std::string format(const char* text, ...) {
    char buffer[1000];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(buffer, sizeof buffer, text, arguments);
    va_end(arguments);
    return buffer;
}

void fail(const std::string& message) {
    if (machine.failure.empty()) machine.failure = message;
}

// Of the running thread, which never resumes: nothing on its stack is destroyed.
template <class... A>
[[noreturn]] void fail_here(const char* text, A... arguments) {
    fail(format("block (%u,%u,%u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, current->number) +
         format(text, arguments...));
    for (;;) to_scheduler();
}

std::string describe(const Thread& t) {
    if (t.ended) return "ended";
    const std::string place = format("(%s:%d)", t.site.file, t.site.line);
    return "at " + (t.mask ? format("%s of lanes %08x ", t.site.name, t.mask) : format("%s ", t.site.name)) + place;
}

void deadlock() {
    std::string message = "deadlock";
    for (unsigned r = 0; r < machine.job.blocks; ++r) {
        const Block& b = *machine.blocks[r];
        message += format("%s block (%u,%u,%u)", r ? ";" : ":", b.index.x, b.index.y, b.index.z);
        if (b.ended) message += " ended";
        for (unsigned first = 0, next; !b.ended && first < b.count; first = next) {
            const std::string state = describe(b.threads[first]);
            for (next = first + 1; next < b.count && describe(b.threads[next]) == state;) ++next;
            message += format("%s threads %u-%u ", first ? "," : "", first, next - 1) + state;
        }
    }
    fail(message);
}

// ---- the blocks of a cluster take turns

void hand_turn(unsigned to) {
    std::lock_guard<std::mutex> lock(machine.m);
    machine.turn = to;
    machine.wake[to].notify_one();
}

void await_turn(unsigned me) {
    std::unique_lock<std::mutex> lock(machine.m);
    machine.wake[me].wait(lock, [&] { return machine.turn == me; });
}

// A block that can go on, drawn by lot; CLUSTER if there is none.
unsigned any_ready() {
    unsigned ready[CLUSTER], count = 0;
    for (unsigned r = 0; r < machine.job.blocks; ++r) {
        const Block& b = *machine.blocks[r];
        if (!b.ended && (!b.begun || !b.runnable.empty())) ready[count++] = r;
    }
    return count ? ready[draw(count)] : CLUSTER;
}

void yield_turn() {
    unsigned next = any_ready();
    if (next == CLUSTER) next = HOST;  // reports a deadlock
    if (next == block->rank) return;
    hand_turn(next);
    await_turn(block->rank);
}

void begin() {
    const Job& job = machine.job;
    Block& b = *block;
    b.begun = true;
    b.count = b.left = job.threads;
    b.barrier.arrived = 0;
    b.lazy = 0;
    b.tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
    for (auto& warp : b.meetings)
        for (auto& meeting : warp) meeting.arrived = meeting.leaving = 0;
    if (b.thread_local_begin) {
        memset(b.thread_local_begin, 0xff, static_cast<size_t>(cf_shared - b.thread_local_begin));
        memset(cf_shared + sizeof cf_shared, 0xff,
               static_cast<size_t>(b.thread_local_end - cf_shared) - sizeof cf_shared);
        block = &b;
    }
    blockIdx = b.index, blockDim = job.block, gridDim = job.grid;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(cf_shared, sizeof cf_shared);
    memset(cf_shared, 0xff, std::min(job.shared + GUARD, sizeof cf_shared));
    if (__asan_poison_memory_region) __asan_poison_memory_region(cf_shared + job.shared, sizeof cf_shared - job.shared);
    b.runnable.resize(b.count);
    for (unsigned i = 0; i < b.count; ++i) {
        Thread& t = b.threads[i];
        if (!t.stack) renew(t);
        t.number = b.runnable[i] = i;
        t.index = {i % job.block.x, i / job.block.x % job.block.y, i / job.block.x / job.block.y};
        t.ended = false;
        t.copies.clear();
        t.commits = 0;
    }
}

void run_round() {
    Block& b = *block;
    const auto is_lazy = [&](unsigned i) { return b.lazy >> i / 32 & 1; };
    const auto first_lazy =
        std::partition(b.runnable.begin(), b.runnable.end(), [&](unsigned i) { return !is_lazy(i); });
    const auto end = first_lazy == b.runnable.begin() ? b.runnable.end() : first_lazy;
    std::vector<unsigned> now(b.runnable.begin(), end);
    b.runnable.erase(b.runnable.begin(), end);
    for (unsigned left = static_cast<unsigned>(now.size()); left && machine.failure.empty(); --left) {
        std::swap(now[draw(left)], now[left - 1]);
        to_fiber(b.threads[now[left - 1]]);
    }
}

void end() {
    const size_t size = machine.job.shared;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(cf_shared, sizeof cf_shared);
    for (unsigned char* p = cf_shared + size; p < cf_shared + std::min(size + GUARD, sizeof cf_shared); ++p)
        if (*p != 0xff) {
            fail(format("block (%u,%u,%u): a write at byte %zu of shared memory, which has %zu", blockIdx.x, blockIdx.y,
                        blockIdx.z, static_cast<size_t>(p - cf_shared), size));
            break;
        }
    // Another block that still reads here finds NaN, or a sanitizer finds it: this write follows the block's own
    // threads only.
    void* const writer = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
    if (writer) __tsan_switch_to_fiber(writer, 1);
    tsan_acquire(&block->end);
    memset(cf_shared, 0xff, size);
    if (writer) __tsan_switch_to_fiber(block->tsan, 1), __tsan_destroy_fiber(writer);
    if (__asan_poison_memory_region) __asan_poison_memory_region(cf_shared, sizeof cf_shared);
    for (unsigned i = 0; i < block->count; ++i) {
        Thread& t = block->threads[i];
        if (t.ended) continue;
        if (t.tsan) {  // the caller of a failed launch may go on
            __tsan_switch_to_fiber(t.tsan, 1);
            tsan_release(&machine.end);
            __tsan_switch_to_fiber(block->tsan, 1);
        }
        renew(t);
    }
    block->ended = true;
}

void run_block() {
    begin();
    while (block->left && machine.failure.empty()) {
        if (!block->runnable.empty()) run_round();
        if (block->left && machine.failure.empty() &&
            (block->runnable.empty() || (machine.job.blocks > 1 && draw(8) == 0)))
            yield_turn();
    }
    end();
}

// The thread-local variables of the program or library that has cf_shared: the kernels' __shared__ variables, and few
// others.
int find_thread_local(dl_phdr_info* info, size_t, void*) {
    auto* const data = static_cast<unsigned char*>(info->dlpi_tls_data);
    for (int i = 0; data && i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_TLS && data <= cf_shared && cf_shared < data + info->dlpi_phdr[i].p_memsz)
            block->thread_local_begin = data, block->thread_local_end = data + info->dlpi_phdr[i].p_memsz;
    return 0;
}

void work(unsigned rank) {
    block = machine.blocks[rank].get();
    block->rank = rank;
    block->shared = cf_shared;
    if (!__tsan_create_fiber && !__asan_poison_memory_region)
        dl_iterate_phdr(find_thread_local, nullptr);  // else theirs are among them
    hand_turn(HOST);
    do {
        await_turn(rank);
        run_block();
        const unsigned next = any_ready();
        hand_turn(next == CLUSTER ? HOST : next);
    } while (!__tsan_create_fiber);
}

void run_cluster(const uint3& at) {
    const Job& job = machine.job;
    for (unsigned r = 0; r < job.blocks; ++r) {
        if (!machine.blocks[r]) {
            machine.blocks[r] = std::make_unique<Block>();
            machine.turn = r;
            std::thread(work, r).detach();
            await_turn(HOST);
        }
        Block& b = *machine.blocks[r];
        b.begun = b.ended = false;
        b.cluster_barrier.arrived = 0;
        b.runnable.clear();
        b.index = {at.x + r % job.cluster.x, at.y + r / job.cluster.x % job.cluster.y,
                   at.z + r / job.cluster.x / job.cluster.y};
    }
    for (;;) {
        unsigned next = any_ready();
        if (next == CLUSTER) {
            for (next = 0; next < job.blocks && machine.blocks[next]->ended;) ++next;
            if (next == job.blocks) break;
            if (machine.failure.empty()) deadlock();
        }
        hand_turn(next);
        await_turn(HOST);
    }
    if (__tsan_create_fiber)
        for (auto& b : machine.blocks) b.reset();
}

void run_grid() {
    const dim3 &grid = machine.job.grid, &cluster = machine.job.cluster;
    const unsigned across = grid.x / cluster.x, down = grid.y / cluster.y;
    std::vector<unsigned> order(static_cast<size_t>(across) * down * (grid.z / cluster.z));
    for (unsigned i = 0; i < order.size(); ++i) {
        order[i] = i;
        std::swap(order[i], order[draw(i + 1)]);
    }
    for (const unsigned i : order) {
        run_cluster({i % across * cluster.x, i / across % down * cluster.y, i / across / down * cluster.z});
        if (!machine.failure.empty()) break;
    }
    tsan_acquire(&machine.end);
}

// ---- barriers

// The last thread of `expected` wakes those of `blocks`, itself included.
template <class Blocks>
void arrive(Barrier& barrier, unsigned expected, const Site& site, const Blocks& blocks) {
    Thread& t = *current;
    if (barrier.arrived == 0) barrier.site = site;
    if (site.line != barrier.site.line || strcmp(site.file, barrier.site.file))
        fail_here("%s at %s:%d while others are at %s:%d", site.name, site.file, site.line, barrier.site.file,
                  barrier.site.line);
    void* sync = &barrier.sync[barrier.phase & 1];
    tsan_release(sync);
    t.site = site, t.mask = 0;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0, ++barrier.phase;
        blocks([](Block& b) {
            for (unsigned i = 0; i < b.count; ++i) b.runnable.push_back(i);
            b.lazy = draw(2) ? 0 : draw(~0u);
        });
    }
    to_scheduler();
    tsan_acquire(sync);
}

cudaError_t record(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// Notes a call of the runtime; whether it is to fail.
template <class... A>
bool noted(const char* name, const char* text, A... arguments) {
    if (!recording.devices) return false;
    recording.calls += format("%s on %d:", name, current_device) + format(text, arguments...) + "\n";
    return recording.failing == name;
}

}  // namespace

// What code compiled with -fsanitize=alignment calls, in the place of UBSan's own: of LLVM's and GCC's
// ubsan_handlers.h.
struct MisalignedAccess {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char alignment, kind;  // alignment: its logarithm
};
extern "C" WEAK void __ubsan_handle_type_mismatch_v1(MisalignedAccess* access, uintptr_t address) {
    const unsigned size = 1u << access->alignment;
    if (!current || address % size == 0) return;  // else on the host, which takes any
    fail_here("a misaligned access of %u bytes at %p (%s:%u)", size, reinterpret_cast<void*>(address), access->file,
              access->line);
}

namespace emulation {

unsigned thread_rank() { return current->number; }
unsigned lane() { return current->number % 32; }
unsigned block_rank() { return block->rank; }
unsigned cluster_size() { return machine.job.blocks; }

void sync_block(Site site) {
    arrive(block->barrier, block->count, site, [](const auto& wake) { wake(*block); });
}

void sync_cluster(Site site) {
    arrive(machine.blocks[0]->cluster_barrier, machine.job.blocks * machine.job.threads, site, [](const auto& wake) {
        for (unsigned r = 0; r < machine.job.blocks; ++r) wake(*machine.blocks[r]);
    });
}

uint64_t meet(unsigned mask, uint64_t value, int source, Site site) {
    Thread& t = *current;
    const unsigned first = t.number & ~31u, bit = 1u << t.number % 32, lanes = std::min(32u, block->count - first);
    if (!(mask & bit)) fail_here("%s of lanes %08x without its own (%s:%d)", site.name, mask, site.file, site.line);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    Meeting* m = nullptr;
    for (auto& candidate : block->meetings[t.number / 32]) {
        if (candidate.leaving) continue;
        if (!candidate.arrived) {
            if (!m) m = &candidate;
        } else if (candidate.mask == mask && !strcmp(candidate.name, site.name)) {
            m = &candidate;
            break;
        }
    }
    m->name = site.name, m->mask = mask;
    t.site = site, t.mask = mask, t.value = value, t.source = source;
    tsan_release(&m->sync);
    if ((m->arrived |= bit) == mask) {
        uint64_t ballot = 0, sent[32];
        std::fill_n(sent, 32, ~uint64_t{0});
        for (unsigned i = 0; i < lanes; ++i)
            if (mask >> i & 1) {
                sent[i] = block->threads[first + i].value;
                ballot |= (sent[i] & 1) << i;
            }
        for (unsigned i = 0; i < lanes; ++i)
            if (mask >> i & 1) {
                Thread& other = block->threads[first + i];
                other.value = other.source < 0 ? ballot : sent[other.source];
                block->runnable.push_back(first + i);
            }
        m->leaving = mask;
    }
    to_scheduler();
    tsan_acquire(&m->sync);
    if (!(m->leaving &= ~bit)) m->arrived = 0;
    return t.value;
}

// A variable of the same program lies equally far from cf_shared in every system thread.
void* map_shared(const void* pointer, unsigned rank) {
    if (rank >= machine.job.blocks)
        fail_here("map_shared_rank of block %u of a cluster of %u", rank, machine.job.blocks);
    const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - cf_shared;
    return machine.blocks[rank]->shared + offset;
}

void copy_async(void* to, const void* from, size_t size, size_t zeros, Site site) {
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if ((size != 4 && size != 8 && size != 16) || zeros > size || addresses % size)
        fail_here("%s of %zu bytes, %zu of them zero, from %p to %p: wrong size or alignment (%s:%d)", site.name, size,
                  zeros, from, to, site.file, site.line);
    current->copies.push_back({to, from, size, zeros, current->commits});
}

void commit_copies() { ++current->commits; }

void wait_copies(size_t prior) {
    auto& copies = current->copies;
    const auto due = [&](const Copy& copy) { return copy.group + prior < current->commits; };
    for (const Copy& copy : copies)
        if (due(copy)) {
            memcpy(copy.to, copy.from, copy.size - copy.zeros);
            memset(static_cast<char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
        }
    copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*), void* call) {
    std::lock_guard<std::mutex> lock(machine.launching);
    if (recording.devices) {
        unsigned cluster = 1;
        for (unsigned i = 0; i < config.numAttrs; ++i) cluster *= config.attrs[i].val.clusterDim.x;
        const bool fails =
            noted("cudaLaunchKernelEx", " grid %u %u %u block %u %u %u cluster %u shared %zu stream %zu",
                  config.gridDim.x, config.gridDim.y, config.gridDim.z, config.blockDim.x, config.blockDim.y,
                  config.blockDim.z, cluster, config.dynamicSmemBytes, reinterpret_cast<size_t>(config.stream));
        return fails ? record(cudaErrorInvalidValue) : cudaSuccess;
    }
    Job job{run, call, config.gridDim, config.blockDim, {}, config.dynamicSmemBytes, 0, 0};
    for (unsigned i = 0; i < config.numAttrs; ++i)
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
            const auto& c = config.attrs[i].val.clusterDim;
            job.cluster = {c.x, c.y, c.z};
            if (machine.capability < 90) return record(cudaErrorNotSupported);
        }
    for (const dim3& size : {job.grid, job.block, job.cluster})
        if (size.x > 0x7fffffff || size.y > 65535 || size.z > 65535 || size.x == 0 || size.y == 0 || size.z == 0)
            return record(cudaErrorInvalidConfiguration);
    const uint64_t threads = uint64_t{job.block.x} * job.block.y * job.block.z;
    const uint64_t blocks = uint64_t{job.cluster.x} * job.cluster.y * job.cluster.z;
    const bool whole =
        job.grid.x % job.cluster.x == 0 && job.grid.y % job.cluster.y == 0 && job.grid.z % job.cluster.z == 0;
    if (threads > THREADS || job.block.z > 64 || blocks > CLUSTER || !whole)
        return record(cudaErrorInvalidConfiguration);
    const auto limit = machine.shared_limit.find(kernel);
    if (job.shared > (limit == machine.shared_limit.end() ? 48 << 10 : limit->second))
        return record(cudaErrorInvalidValue);
    job.threads = static_cast<unsigned>(threads), job.blocks = static_cast<unsigned>(blocks);

    machine.job = job;
    machine.failure.clear();
    run_grid();
    if (machine.failure.empty()) return cudaSuccess;
    fprintf(stderr, "emulation: %s\n", machine.failure.c_str());
    return record(cudaErrorLaunchFailure);
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    std::lock_guard<std::mutex> lock(machine.launching);
    if (noted("cudaFuncSetAttribute", " %d to %d", static_cast<int>(attribute), value))
        return record(cudaErrorInvalidValue);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > machine.shared_memory) return record(cudaErrorInvalidValue);
    machine.shared_limit[kernel] = std::max<size_t>(static_cast<size_t>(value), 48 << 10);
    return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) {
    if (noted("cudaGetDevice", "")) return record(cudaErrorInvalidValue);
    return *device = current_device, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (noted("cudaSetDevice", " to %d", device)) return record(cudaErrorInvalidValue);
    if (device < 0 || device >= std::max(recording.devices, 1)) return record(cudaErrorInvalidDevice);
    return current_device = device, cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorLaunchFailure:
            return machine.failure.empty() ? "unspecified launch failure" : machine.failure.c_str();
        case cudaErrorNotSupported:
            return "operation not supported";
    }
    return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return record(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            return *value = THREADS, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            return *value = 48 << 10, cudaSuccess;
        case cudaDevAttrWarpSize:
            return *value = 32, cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            return *value = 132, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            return *value = machine.capability / 10, cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            return *value = machine.capability % 10, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return *value = static_cast<int>(machine.shared_memory), cudaSuccess;
        case cudaDevAttrClusterLaunch:
            return *value = machine.capability >= 90, cudaSuccess;
    }
    return record(cudaErrorInvalidValue);
}

void emulation_record(int devices) { recording = {devices, {}, {}, {}}; }

const char* emulation_recorded() {
    recording.taken = std::exchange(recording.calls, {});
    return recording.taken.c_str();
}

void emulation_fail(const char* name) { recording.failing = name ? name : ""; }

void emulation_seed(uint64_t seed) { machine.random = seed; }

void emulation_device(int capability, int shared_memory_bytes) {
    machine.capability = capability;
    machine.shared_memory = std::min(static_cast<size_t>(shared_memory_bytes), SHARED);
    machine.shared_limit.clear();
}
