// What an x86 processor can run: the instructions that it has (CPUID), of which some work only if the system saves the
// registers that they use (XGETBV).
//
// Not by __builtin_cpu_supports, which leaves the answer to a library of the compiler: with zig's, a processor has
// nothing, and everything would run on portable code, slowly and without a word.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cf {
namespace {

// What is read, by the names of CPUID's leaves and registers.
struct Identification {
    uint32_t leaf_1_c = 0, leaf_7_b = 0, leaf_7_c = 0, leaf_7_1_a = 0;
    uint32_t saved = 0;  // XCR0: registers that the system saves
};

// For each group of -m flags in setup.py, whether the processor has all of it.
struct Instructions {
    bool avx2, avx2_vnni, avx512, avx512_bf16;
};

inline bool all_of(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }
constexpr uint32_t bit(int number) { return uint32_t{1} << number; }

inline Instructions instructions(const Identification& p) {
    const bool asks = all_of(p.leaf_1_c, bit(27));                               // OSXSAVE: XCR0 can be read
    const bool ymm = asks && all_of(p.saved, bit(1) | bit(2));                   // XMM, upper halves of YMM
    const bool zmm = ymm && all_of(p.saved, bit(5) | bit(6) | bit(7));           // masks, the rest of ZMM
    const bool avx2 = ymm && all_of(p.leaf_1_c, bit(12) | bit(28) | bit(29)) &&  // FMA, AVX, F16C
                      all_of(p.leaf_7_b, bit(5));                                // AVX2
    const bool avx512 = avx2 && zmm && all_of(p.leaf_7_b, bit(16) | bit(17) | bit(30) | bit(31));  // F, DQ, BW, VL
    return {avx2, avx2 && all_of(p.leaf_7_1_a, bit(4)), avx512,                                    // AVX-VNNI
            avx512 && all_of(p.leaf_7_1_a, bit(5)) && all_of(p.leaf_7_c, bit(11))};  // AVX512_BF16, AVX512_VNNI
}

#if defined(__x86_64__)
inline Identification identify() {
    Identification p;
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) p.leaf_1_c = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        p.leaf_7_b = b, p.leaf_7_c = c;
        // a: the last of the leaves 7.N
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) p.leaf_7_1_a = a;
    }
    if (all_of(p.leaf_1_c, bit(27))) {
        __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        p.saved = a;
    }
    return p;
}
#endif

}  // namespace
}  // namespace cf
