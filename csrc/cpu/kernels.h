// The kernels, compiled with the including file's instruction set.
#include "group_norm.h"
#include "head.h"
#include "convolution.h"
#include "residual.h"
#include "step.h"

#define CF_KERNELS(isa)                                                                           \
    const cf::Kernels cf::isa##_kernels = {#isa,          cf::group_norm_silu, cf::bias_residual, \
                                           cf::dual_head, cf::coalesce_step,   cf::run_step,      \
                                           cf::W,         cf::PRODUCTS};
