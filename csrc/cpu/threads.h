// What the kernels of every instruction set share: threads, scratch memory, the table of kernels.
//
// The files of an instruction set are compiled with its flags. What is inlined into them must not be shared with other files, or the linker
// may keep the copy with instructions that the processor lacks: they include no C++ library header and define nothing with external
// linkage but their table.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../abi.h"

namespace cf {

struct Kernels {
    const char* isa;
    int (*group_norm_silu)(const cf_group_norm_silu_args&);
    int (*bias_residual)(const cf_bias_residual_args&);
    int (*dual_head)(const cf_dual_head_args&, int64_t threads);
    int (*coalesce_step)(const cf_coalesce_step_args&);
    int (*run_step)(const cf_step&, int64_t threads);
    int width;     // floats in a vector
    int products;  // see cf_cpu_products
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;

// Memory of the calling thread, at least `bytes`, aligned to 64 bytes, until its next call; null if there is none.
// `slot` 0 is for the thread that runs an op, `slot` 1 for the workers' parts of it.
void* scratch(int slot, size_t bytes);

// Bytes of the last-level cache.
int64_t last_level_cache();

// To be called before an output of so many bytes is written. Large ones are new memory, whose pages the system provides when they are first
// touched, in 4 KiB steps that cost more than the op: ask for huge pages.
void prepare_output(void* data, int64_t bytes);

// Run body(context) with a team of so many threads around it, which `parallel_ranges` in body then uses: they wait for work by looking for
// it instead of sleeping. Returns what body returns.
int with_team(int64_t threads, int (*body)(void*), void* context);

// Run task(context, begin, end) over a partition of [0, items) into one range a thread. The partition depends on the number of threads:
// what an item computes must not.
void parallel_ranges(int64_t items, int64_t threads, void (*task)(void*, int64_t, int64_t), void* context);

}  // namespace cf
