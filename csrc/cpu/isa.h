// The kernels of each instruction set, and the choice between them.
//
// The kernels are compiled once for each instruction set, with its flags (setup.py), from the same headers:
// portable.cpp, avx2.cpp, avx2_vnni.cpp, avx512.cpp and avx512_bf16.cpp only include kernels.h. A function with
// external linkage that two of these files defined would be one function to the linker, which might keep the copy with
// instructions that the processor lacks. So the headers of kernels define everything in an anonymous namespace and
// include no C++ library header; the tables here are all that the files export.
#pragma once

#include "../abi.h"

namespace cf {

// Each checks its arguments and returns a cf_status.
struct Kernels {
    const char* isa;
#define CF_FUNCTION(name) int (*name)(const cf_##name##_args&);
    CF_OPS(CF_FUNCTION)
#undef CF_FUNCTION
    int (*run_program)(const cf_program_args&);
    int (*pack)(const cf_pack_args&);
    int width;     // floats in a vector
    int products;  // see cf_cpu_products
    int largest_weight;
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx2_vnni_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;

// Those in use: the best that the processor can run, unless another is chosen.
extern const Kernels* kernels;

// Takes the named kernels into use; false if the processor or the library does not have them.
bool choose_isa(const char* isa);

}  // namespace cf
