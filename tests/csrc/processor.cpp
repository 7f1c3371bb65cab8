// processor.h for test_processor.py.
#include "../../csrc/cpu/processor.h"

// By turns avx2, avx2_vnni, avx512 and avx512_bf16.
extern "C" void instructions_of(const cf::Identification* identification, uint8_t* found) {
    const cf::Instructions has = cf::instructions(*identification);
    found[0] = has.avx2, found[1] = has.avx2_vnni, found[2] = has.avx512, found[3] = has.avx512_bf16;
}

#if defined(__x86_64__)
extern "C" void identify_here(cf::Identification* identification) { *identification = cf::identify(); }

// The same of this processor by the compiler's own library.
extern "C" void instructions_by_compiler(uint8_t* found) {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    found[0] = avx2, found[1] = avx2 && __builtin_cpu_supports("avxvnni"), found[2] = avx512;
    found[3] = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif
