// The functions of abi.h, in its order; cf_cpu_fingerprint is in fingerprint.cpp.
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

int cf_cpu_group_norm_silu(const cf_group_norm_silu_args* args) { return kernels->group_norm_silu(*args); }

int cf_cpu_bias_residual(const cf_bias_residual_args* args) { return kernels->bias_residual(*args); }

int cf_cpu_dual_head(const cf_dual_head_args* args) { return kernels->dual_head(*args); }

int cf_cpu_coalesce_step(const cf_coalesce_step_args* args) { return kernels->coalesce_step(*args); }

int cf_cpu_vector_width(void) { return kernels->width; }

int cf_cpu_products(void) { return kernels->products; }

int cf_cpu_run(const cf_program_args* args) { return kernels->run_program(*args); }
