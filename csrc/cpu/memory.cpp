#include "memory.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cf {
namespace {

struct Buffer {
    void* data;
    size_t size;
};

void free_buffers(void* of_thread) {
    for (int slot = 0; slot < 2; ++slot) free(static_cast<Buffer*>(of_thread)[slot].data);
    free(of_thread);
}

// A thread's buffers, by ScratchSlot, are freed when it ends. In C++ they would be thread_local, which brings the C++
// library into this one, and with it a newer C library than others need.
pthread_key_t buffers;
const bool has_buffers = pthread_key_create(&buffers, free_buffers) == 0;

Buffer* buffers_of_thread() {
    if (!has_buffers) return nullptr;
    if (void* mine = pthread_getspecific(buffers)) return static_cast<Buffer*>(mine);
    void* mine = calloc(2, sizeof(Buffer));
    if (mine && pthread_setspecific(buffers, mine)) {
        free(mine);
        return nullptr;
    }
    return static_cast<Buffer*>(mine);
}

int64_t cache_size() {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;  // virtual machines may report 0
}

const int64_t cache = cache_size();

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
    Buffer* mine = buffers_of_thread();
    if (!mine) return nullptr;
    Buffer& buffer = mine[slot];
    if (buffer.size < bytes) {
        free(buffer.data);  // before the larger one is allocated: the contents are not kept
        buffer.size = 0;
        if (posix_memalign(&buffer.data, 64, bytes)) return buffer.data = nullptr;
        buffer.size = bytes;
    }
    return buffer.data;
}

int64_t last_level_cache() { return cache; }

void prepare_output(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    // Smaller outputs usually come from memory that the allocator has kept, whose pages are there.
    if (bytes < 16 * static_cast<int64_t>(PAGE)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: a refusal changes nothing
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace cf
