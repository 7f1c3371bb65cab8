// Runs a program: a network as a list of steps, in one call.
//
// The threads of a program form a team that stays together from the first step to the last (threads.h). The network of
// emoji-64 is 80 steps, and two evaluations of it take 0.84 ms (benchmarks/results/cpu/sampler.csv; bfloat16, 2
// threads): 5 microseconds a step, too short to wake sleeping threads for each. How much a team gains shows in
// group_norm.h, where a second thread pays off from 4096 elements on instead of 32768.
//
// The steps are those of CF_STEPS in abi.h. Each has a struct of arguments there, and in one of the headers below a
// function valid(args) and a function that runs it.
#pragma once

#include "attention.h"
#include "convolution.h"
#include "group_norm.h"
#include "head.h"
#include "image.h"
#include "rows.h"
#include "winograd.h"

namespace cf {
namespace {

inline int run_step(const cf_step& step, int64_t threads) {
    if (!step.args) return CF_INVALID_ARGUMENT;
    switch (step.kind) {
#define CF_RUN_STEP(name, number, type, function)                \
    case CF_##name: {                                            \
        const type& args = *static_cast<const type*>(step.args); \
        if (valid(args)) return function(args, threads);         \
        break;                                                   \
    }
        CF_STEPS(CF_RUN_STEP)
#undef CF_RUN_STEP
    }
    return CF_INVALID_ARGUMENT;
}

inline int run_program(const cf_program_args& a) {
    if (a.count < 0 || a.threads < 1 || (a.count > 0 && !a.steps)) return CF_INVALID_ARGUMENT;
    const auto body = [](void* context) {
        const cf_program_args& program = *static_cast<const cf_program_args*>(context);
        int status = CF_OK;
        for (int64_t i = 0; i < program.count && status == CF_OK; ++i)
            status = run_step(program.steps[i], program.threads);
        return status;
    };
    return with_team(a.threads, body, const_cast<cf_program_args*>(&a));
}

}  // namespace
}  // namespace cf
