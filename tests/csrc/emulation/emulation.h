// CUDA on the host, for tests: a kernel compiled as C++17 runs with one fiber for every CUDA thread, so that barriers,
// shuffles, clusters and asynchronous copies keep their meaning. The headers beside this one carry the official names;
// with this folder first on the include path a .cu file needs no change. ../emulate.py builds, or:
//     g++ -x c++ -std=c++17 -fno-strict-aliasing -I tests/csrc/emulation -c kernel.cu
//     g++ -std=c++17 -O2 -c tests/csrc/emulation/emulation.cpp      (once a program; never with -fsanitize)
//
// Threads and blocks run in an order drawn from emulation_seed. Shared memory starts as NaN (arrays of fixed size only
// without sanitizers). A fault that the emulation sees (deadlock, misaligned copy, write past shared memory) is
// printed, and the launch returns cudaErrorLaunchFailure with cudaGetErrorString telling it. As barriers are strict
// here, a thread must not return before a barrier that others reach, though recent devices let it.
//
// Every access of a .cu file that was compiled with -fsanitize=alignment, as ../emulate.py does, is checked: one of a
// vector at an address that is no multiple of its size is such a fault. emulation_record notes the calls of the runtime
// in the place of launches, for tests of the host's side.
//
// Limits: dynamic shared memory is `extern __shared__ __align__(16) unsigned char cf_shared[]`, declared at global
// scope. Every pointer is a host pointer and a launch returns when the kernel has ended. No <<<>>>, atomics, textures,
// mma, or split barriers of clusters. Indices past a __shared__ array of fixed size are found by -fsanitize=undefined.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // every block of a cluster has its own system thread
#if !defined(__clang__)
#define __builtin_assume(condition) static_cast<void>(0)
#endif

#define EMULATION_VECTOR(T, name, alignment2, alignment4)              \
    struct alignas(alignment2) name##2 { T x, y; };                    \
    struct name##3 { T x, y, z; };                                     \
    struct alignas(alignment4) name##4 { T x, y, z, w; };              \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTOR(int, int, 8, 16)
EMULATION_VECTOR(unsigned, uint, 8, 16)
EMULATION_VECTOR(float, float, 8, 16)
EMULATION_VECTOR(unsigned short, ushort, 4, 8)
EMULATION_VECTOR(unsigned char, uchar, 2, 4)
#undef EMULATION_VECTOR

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Host side.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrClusterLaunch = 120,
};
typedef struct CUstream_st* cudaStream_t;
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
    struct {
        unsigned x, y, z;
    } clusterDim;
    char pad[64];
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }

extern "C" {
void emulation_seed(uint64_t seed);                              // of the order in which threads and blocks run
void emulation_device(int capability, int shared_memory_bytes);  // 90 and 232448 unless told; clusters need 90
// Until `devices` is 0 again there are so many devices, launches do not run, and calls of the runtime are noted.
void emulation_record(int devices);
// What was noted since the last time, a line a call: its name, the device that is current, its arguments.
const char* emulation_recorded();
// While calls are noted, every call of this name returns cudaErrorInvalidValue; null for none.
void emulation_fail(const char* name);
}

namespace emulation {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*), void* call);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

// For kernels. Every wait tells where it stands, for the report of a deadlock.
struct Site {
    const char* name;
    const char* file;
    int line;
};
void sync_block(Site site);
void sync_cluster(Site site);
// All lanes of `mask` meet; returns the value of lane `source` (all bits set if it does not take part), or the ballot
// for source < 0.
uint64_t meet(unsigned mask, uint64_t value, int source, Site site);
unsigned lane();
unsigned thread_rank();
unsigned block_rank();
unsigned cluster_size();
void* map_shared(const void* pointer, unsigned rank);
void copy_async(void* to, const void* from, size_t size, size_t zeros, Site site);
void commit_copies();
void wait_copies(size_t prior);

template <class T>
uint64_t shuffle(unsigned mask, T value, int source, Site site) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "shuffles take 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return meet(mask, bits, source, site);
}

template <class To, class From>
To cast(From from) {
    To to;
    static_assert(sizeof to <= sizeof from && std::is_trivially_copyable_v<From>);
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
    const auto run = [](void* call) {
        std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->arguments);
    };
    return emulation::launch(*config, reinterpret_cast<const void*>(kernel), run, &call);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    return emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Device side. A call's place is that of the default arguments.

#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_HERE) { emulation::sync_block({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = ~0u, EMULATION_HERE) {
    emulation::meet(mask, 0, -1, {"__syncwarp", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return static_cast<unsigned>(emulation::meet(mask, predicate != 0, -1, {"__ballot_sync", file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return emulation::meet(mask, predicate != 0, -1, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_HERE) {
    return emulation::meet(mask, predicate == 0, -1, {"__all_sync", file, line}) == 0;
}

// Lanes in segments of `width`; a source outside of the segment means the lane itself, as PTX's shfl has it.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
    const int first = static_cast<int>(emulation::lane()) & -width;
    return emulation::cast<T>(
        emulation::shuffle(mask, value, first + (source & (width - 1)), {"__shfl_sync", file, line}));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
    const int lane = static_cast<int>(emulation::lane()), source = lane - static_cast<int>(delta);
    return emulation::cast<T>(
        emulation::shuffle(mask, value, source < (lane & -width) ? lane : source, {"__shfl_up_sync", file, line}));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
    const int lane = static_cast<int>(emulation::lane()), source = lane + static_cast<int>(delta);
    return emulation::cast<T>(emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                                 {"__shfl_down_sync", file, line}));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
    const int lane = static_cast<int>(emulation::lane()), source = lane ^ bits;
    return emulation::cast<T>(emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                                 {"__shfl_xor_sync", file, line}));
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// clang-format off
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }

inline float __int_as_float(int x) { return emulation::cast<float>(x); }
inline int __float_as_int(float x) { return emulation::cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::cast<float>(x); }
inline unsigned __float_as_uint(float x) { return emulation::cast<unsigned>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
// The hardware's ex2 and lg2 with a rounded factor: the error of __expf grows with |x|. __fdividef loses quotients by
// more than 2^126.
inline float __expf(float x) { return exp2f(x * 1.442695041f); }
inline float __logf(float x) { return log2f(x) * 0.693147181f; }
inline float __fdividef(float x, float y) {
    return fabsf(y) > 0x1p126f && !isinf(y) && !isnan(y) ? x * copysignf(0, y) : x / y;
}

// As in CUDA's headers, the common type is unsigned if either is.
#define EMULATION_MIN_MAX(R, A, B)                                                                                     \
    inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }   \
    inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
EMULATION_MIN_MAX(int, int, int)
EMULATION_MIN_MAX(unsigned, unsigned, unsigned)
EMULATION_MIN_MAX(unsigned, int, unsigned)
EMULATION_MIN_MAX(unsigned, unsigned, int)
EMULATION_MIN_MAX(long, long, long)
EMULATION_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATION_MIN_MAX(long long, long long, long long)
EMULATION_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMULATION_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
// clang-format on
