#include "isa.h"

#include <string.h>

#include "processor.h"

namespace cf {
namespace {

// The kernels of that name, or null if the processor lacks an instruction that they use.
const Kernels* find(const char* isa) {
#if defined(__x86_64__) && !defined(CF_PORTABLE_ONLY)
    const Instructions has = instructions(identify());
    if (!strcmp(isa, "avx512_bf16") && has.avx512_bf16) return &avx512_bf16_kernels;
    if (!strcmp(isa, "avx512") && has.avx512) return &avx512_kernels;
#if !defined(CF_WITHOUT_AVX2_VNNI)
    if (!strcmp(isa, "avx2_vnni") && has.avx2_vnni) return &avx2_vnni_kernels;
#endif
    if (!strcmp(isa, "avx2") && has.avx2) return &avx2_kernels;
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
