#include "isa.h"

#include <string.h>

namespace cf {
namespace {

// The kernels of that name, or null if the processor lacks an instruction that they use.
const Kernels* find(const char* isa) {
#if defined(__x86_64__) && !defined(CF_PORTABLE_ONLY)
    __builtin_cpu_init();
    // one test for each -m flag of setup.py
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(isa, "avx512_bf16") && avx512 && products) return &avx512_bf16_kernels;
    if (!strcmp(isa, "avx512") && avx512) return &avx512_kernels;
    // every processor with AVX2 and FMA has F16C
    if (!strcmp(isa, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels;
#endif
    return strcmp(isa, "portable") ? nullptr : &portable_kernels;
}

const Kernels* best() {
    const char* const faster[] = {"avx512_bf16", "avx512", "avx2"};
    for (const char* isa : faster)
        if (const Kernels* found = find(isa)) return found;
    return &portable_kernels;
}

}  // namespace

const Kernels* kernels = best();

bool choose_isa(const char* isa) {
    const Kernels* found = find(isa);
    if (found) kernels = found;
    return found;
}

}  // namespace cf
