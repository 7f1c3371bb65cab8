// What the CUDA kernels share: elements and vectors of 16 bytes, parameters of any dtype, sums over a warp, launches.
//
// Plain CUDA C++17 on the runtime's own headers; the tests compile the same files for the CPU, on headers of the same
// names.
#ifndef COALESCER_FAST_CUDA_DEVICE_H
#define COALESCER_FAST_CUDA_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../abi.h"

extern __shared__ __align__(16) unsigned char cf_shared[];  // what a launch asks for

namespace cf {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return cdiv(a, b) * b; }

// ---- elements

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// V elements as they lie in memory: 16 or 8 bytes, or a single element.
template <typename T, int V>
struct Raw {
    static_assert(V * sizeof(T) == 16 || V * sizeof(T) == 8, "a vector has 16 or 8 bytes");
    using type = std::conditional_t<V * sizeof(T) == 16, uint4, uint2>;
};
template <typename T>
struct Raw<T, 1> {
    using type = T;
};
template <typename T, int V>
using raw_t = typename Raw<T, V>::type;

template <typename T, int V>
__device__ __forceinline__ raw_t<T, V> load(const T* p) {
    return *reinterpret_cast<const raw_t<T, V>*>(p);
}

template <typename T>
__device__ __forceinline__ void unpack_word(unsigned word, float* out) {
    if constexpr (sizeof(T) == 4) {
        *out = __int_as_float(static_cast<int>(word));
    } else if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
        out[0] = pair.x, out[1] = pair.y;
    } else {  // bfloat16 is the upper half of a float
        out[0] = __int_as_float(static_cast<int>(word << 16));
        out[1] = __int_as_float(static_cast<int>(word & 0xffff0000u));
    }
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const raw_t<T, V>& raw, float (&out)[V]) {
    if constexpr (V == 1) {
        out[0] = to_float(raw);
    } else {
        constexpr int IN_WORD = 4 / sizeof(T);
        unpack_word<T>(raw.x, out);
        unpack_word<T>(raw.y, out + IN_WORD);
        if constexpr (V > 2 * IN_WORD) {
            unpack_word<T>(raw.z, out + 2 * IN_WORD);
            unpack_word<T>(raw.w, out + 3 * IN_WORD);
        }
    }
}

template <typename T>
__device__ __forceinline__ unsigned pack_word(const float* in) {
    if constexpr (sizeof(T) == 4) {
        return static_cast<unsigned>(__float_as_int(*in));
    } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(in[0], in[1]);
        return *reinterpret_cast<const unsigned*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
        return *reinterpret_cast<const unsigned*>(&pair);
    }
}

// An intrinsic, for the compiler cuts an assignment into four.
template <typename T, int V>
__device__ __forceinline__ void store(T* p, const float (&in)[V]) {
    if constexpr (V == 1) {
        *p = from_float<T>(in[0]);
    } else {
        static_assert(V * sizeof(T) == 16, "a vector has 16 bytes");
        constexpr int N = V / 4;
        const uint4 words =
            make_uint4(pack_word<T>(in), pack_word<T>(in + N), pack_word<T>(in + 2 * N), pack_word<T>(in + 3 * N));
        __stcg(reinterpret_cast<uint4*>(p), words);
    }
}

// Element i of something of a dtype that is known at run time only.
__device__ __forceinline__ float element(const void* data, int64_t dtype, int64_t i) {
    if (dtype == CF_FLOAT32) return static_cast<const float*>(data)[i];
    if (dtype == CF_FLOAT16) return __half2float(static_cast<const __half*>(data)[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}
__device__ __forceinline__ float element(const cf_vector& v, int64_t i) { return element(v.data, v.dtype, i); }

// The same in two parts, so that several are on their way at a time: a conversion waits for its load. 0 if there is
// none.
__device__ __forceinline__ unsigned element_bits(const cf_vector& v, int64_t i) {
    if (!v.data) return 0;
    return v.dtype == CF_FLOAT32 ? static_cast<const unsigned*>(v.data)[i]
                                 : static_cast<const unsigned short*>(v.data)[i];
}
__device__ __forceinline__ float from_bits(const cf_vector& v, unsigned bits) {
    if (v.dtype == CF_FLOAT32) return __int_as_float(static_cast<int>(bits));
    if (v.dtype == CF_BFLOAT16) return __int_as_float(static_cast<int>(bits << 16));
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ void put(void* data, int64_t dtype, int64_t i, float x) {
    if (dtype == CF_FLOAT32) {
        static_cast<float*>(data)[i] = x;
    } else if (dtype == CF_FLOAT16) {
        static_cast<__half*>(data)[i] = __float2half_rn(x);
    } else {
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
    }
}

// x / (1 + exp(-x)). Two instructions of the special function unit: the intrinsics __expf and __fdividef take several
// more to keep denormal numbers, which do not matter here: 1 + exp(-x) is at least 1, and infinite where the result is
// 0.
__device__ __forceinline__ float silu(float x) {
#ifdef __CUDA_ARCH__
    float e, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.442695041f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + e));
    return x * inverse;
#else
    return __fdividef(x, 1 + __expf(-x));
#endif
}

// ---- integers

// Quotients of non-negative int by a fixed divisor, without a division: for 2^(s-1) < d <= 2^s and
// m = ceil(2^(31+s)/d), floor(n/d) = floor(n m / 2^(31+s)) for all n < 2^31 (Granlund and Montgomery 1994).
struct Divisor {
    unsigned magic = 0, shift = 0;
    int divisor = 0;

    Divisor() = default;
    explicit Divisor(int64_t d) : divisor(static_cast<int>(d)) {
        unsigned s = 0;
        while (int64_t{1} << s < d) ++s;
        shift = 31 + s;
        magic =
            static_cast<unsigned>(((uint64_t{1} << shift) + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
    }
};

struct Quotient {
    int quotient, rest;
};

__device__ __forceinline__ int operator/(int n, const Divisor& d) {
    return static_cast<int>((uint64_t{static_cast<unsigned>(n)} * d.magic) >> d.shift);
}
__device__ __forceinline__ Quotient divide(int n, const Divisor& d) {
    const int quotient = n / d;
    return {quotient, n - quotient * d.divisor};
}

// 1 / x to the last bit but one; x may not be 0 or denormal.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }

// ---- sums, always in the same order

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The sum over a block of full warps, in every thread; scratch: a float a warp, free again after the next barrier.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
    for (unsigned i = 0; i < blockDim.x / WARP; ++i) sum += scratch[i];
    return sum;
}

// ---- host

inline bool is_dtype(int64_t dtype) { return dtype == CF_FLOAT32 || dtype == CF_FLOAT16 || dtype == CF_BFLOAT16; }
inline bool is_vector(const cf_vector& v) { return !v.data || is_dtype(v.dtype); }
inline int64_t size_of(int64_t dtype) { return dtype == CF_FLOAT32 ? 4 : 2; }
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct Launch {
    int64_t blocks;
    int threads, cluster;
    int64_t shared_memory;
};

// Enqueue a kernel; a call that asks for no block is done at once.
template <auto kernel, typename... Args>
int enqueue(const cf_cuda_device& device, void* stream, const Launch& launch, Args&&... args) {
    if (launch.blocks == 0) return CF_OK;
    if (launch.blocks > 0x7fffffff) return CF_INVALID_ARGUMENT;
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    const bool elsewhere = !error && current != device.ordinal;
    if (elsewhere) error = cudaSetDevice(static_cast<int>(device.ordinal));
    constexpr int64_t FREE = 48 << 10;  // more has to be asked for, once on every device
    static std::atomic<int64_t> granted[64];
    if (!error && launch.shared_memory > FREE &&
        launch.shared_memory > granted[device.ordinal & 63].load(std::memory_order_relaxed)) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(device.shared_memory));
        if (!error) granted[device.ordinal & 63].store(device.shared_memory, std::memory_order_relaxed);
    }
    if (!error) {
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
        config.blockDim = dim3(static_cast<unsigned>(launch.threads));
        config.dynamicSmemBytes = static_cast<size_t>(launch.shared_memory);
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = launch.cluster > 1 ? 1 : 0;
        error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
    }
    if (elsewhere) {
        const cudaError_t restored = cudaSetDevice(current);
        if (!error) error = restored;
    }
    if (error) cudaGetLastError();  // it is reported here, and nowhere else
    return error ? CF_CUDA_ERROR + static_cast<int>(error) : static_cast<int>(CF_OK);
}

// f(T()) with the C++ type of a dtype that `is_dtype`.
template <typename F>
int with_type(int64_t dtype, const F& f) {
    if (dtype == CF_FLOAT32) return f(float());
    if (dtype == CF_FLOAT16) return f(__half());
    return f(__nv_bfloat16());
}

}  // namespace cf

#endif
