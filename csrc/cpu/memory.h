// Scratch memory, and what kernels know about caches and pages.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace cf {

// A thread has two buffers, because the thread that runs a kernel also does its share of the work.
enum ScratchSlot { CALL_SCRATCH = 0, WORKER_SCRATCH = 1 };

// Memory of the calling thread, of at least `bytes` bytes, aligned to 64 bytes, valid until the thread asks for the
// same slot again. Null if there is none. It is kept for the next call: allocating it anew would cost more than a small
// kernel.
void* scratch(ScratchSlot slot, size_t bytes);

// The size of the last-level cache in bytes.
int64_t last_level_cache();

// To be called before an output of `bytes` bytes is written. A large output is often new memory, whose pages the system
// provides when they are first touched, 4 KiB at a time, which costs more than the kernel: this asks for huge pages.
void prepare_output(void* data, int64_t bytes);

}  // namespace cf
