// All kernels, compiled for the instruction set of the including file, and the table of them (isa.h).
#pragma once

#include "group_norm.h"
#include "head.h"
#include "isa.h"
#include "program.h"
#include "residual.h"
#include "step.h"

namespace cf {
namespace {

// An op: the kernel with its arguments checked.
template <class Args, int (*kernel)(const Args&, int64_t threads)>
int op(const Args& args) {
    return valid(args) ? kernel(args, args.threads) : static_cast<int>(CF_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace cf

#define CF_KERNELS(name)                                      \
    const cf::Kernels cf::name##_kernels = {                  \
        #name,                                                \
        cf::op<cf_group_norm_silu_args, cf::group_norm_silu>, \
        cf::op<cf_bias_residual_args, cf::bias_residual>,     \
        cf::op<cf_dual_head_args, cf::dual_head>,             \
        cf::op<cf_coalesce_step_args, cf::coalesce_step>,     \
        cf::run_program,                                      \
        cf::W,                                                \
        cf::PRODUCTS,                                         \
    };
