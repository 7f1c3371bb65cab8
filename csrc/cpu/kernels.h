// All kernels, compiled for the instruction set of the including file, and the table of them (isa.h).
#pragma once

#include "group_norm.h"
#include "head.h"
#include "isa.h"
#include "pack.h"
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

#define CF_OP(name) cf::op<cf_##name##_args, cf::name>,
#define CF_KERNELS(isa)                                                                           \
    const cf::Kernels cf::isa##_kernels = {                                                       \
        #isa, CF_OPS(CF_OP) cf::run_program, CF_OP(pack) cf::W, cf::PRODUCTS, cf::LARGEST_WEIGHT, \
    };
