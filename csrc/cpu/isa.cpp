#include "isa.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cf {
namespace {

#if defined(__x86_64__) && !defined(CF_PORTABLE_ONLY) && !defined(CF_WITHOUT_AVX2_VNNI)
// Not every compiler's __builtin_cpu_supports knows the name.
bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4);
}
#endif

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
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if !defined(CF_WITHOUT_AVX2_VNNI)
    if (!strcmp(isa, "avx2_vnni") && avx2 && has_avx_vnni()) return &avx2_vnni_kernels;
#endif
    if (!strcmp(isa, "avx2") && avx2) return &avx2_kernels;
#endif
    return strcmp(isa, "portable") ? nullptr : &portable_kernels;
}

const Kernels* best() {
    const char* const faster[] = {"avx512_bf16", "avx512", "avx2_vnni", "avx2"};
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
