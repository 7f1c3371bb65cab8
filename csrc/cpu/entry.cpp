// The functions of abi.h, in its order; the hashes are in fingerprint.cpp.
#include "isa.h"
#include "threads.h"

using namespace cf;

int cf_abi_version(void) { return CF_ABI_VERSION; }

void cf_cpu_set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(void),
                       int (*num_threads)(void)) {
    set_openmp(parallel, thread_num, num_threads);
}

const char* cf_cpu_isa(void) { return kernels->isa; }

int cf_cpu_set_isa(const char* isa) { return choose_isa(isa) ? CF_OK : CF_INVALID_ARGUMENT; }

#define CF_ENTRY(name) \
    int cf_cpu_##name(const cf_##name##_args* args) { return kernels->name(*args); }
CF_OPS(CF_ENTRY)

int cf_cpu_vector_width(void) { return kernels->width; }

int cf_cpu_products(void) { return kernels->products; }

int cf_cpu_largest_weight(void) { return kernels->largest_weight; }

int cf_cpu_run(const cf_program_args* args) { return kernels->run_program(*args); }

int cf_cpu_pack(const cf_pack_args* args) { return kernels->pack(*args); }
