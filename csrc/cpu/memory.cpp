#include "memory.h"

#include <stdlib.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cf {
namespace {

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
};
thread_local Buffer buffers[2];  // by ScratchSlot

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        free(buffer.data);  // before the larger one is allocated: the contents are not kept
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
        return size > 0 ? size : int64_t{32} << 20;  // virtual machines may report 0
    }();
    return bytes;
}

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
