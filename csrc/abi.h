/* The C interface of the native kernels: every function, its arguments and its status codes.
 *
 * Plain C, no framework: a library built from it loads beside any torch and any Python. A function takes one
 * structure of 64-bit fields (integers and pointers first, doubles last, so that there is no padding) and returns a
 * status. It allocates nothing that outlives the call but a scratch buffer a thread, modifies no input, and keeps no
 * pointer. Formulas are those of the Python functions of the same name.
 *
 * Shapes: x (n, c1, spatial) with channels innermost in memory (channels_last = 1) or contiguous (0); nothing is
 * broadcast. A null pointer stands for an argument that was not given. Pointers need the alignment of their element
 * type only. */
#ifndef COALESCER_FAST_ABI_H
#define COALESCER_FAST_ABI_H

#include <stdint.h>

#if defined(_WIN32)
#define CF_API __declspec(dllexport)
#else
#define CF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a structure or a meaning changes; the loader refuses a library of another version. */
#define CF_ABI_VERSION 6

enum cf_dtype { CF_FLOAT32 = 0, CF_FLOAT16 = 1, CF_BFLOAT16 = 2, CF_UINT8 = 3 };

enum cf_status {
    CF_OK = 0,
    CF_INVALID_ARGUMENT = 1, /* a size, dtype or pointer that the function does not take */
    CF_OUT_OF_MEMORY = 2,    /* no memory for the scratch buffer */
    CF_CUDA_ERROR = 1000     /* and more: 1000 + the cudaError_t of a launch that was refused */
};

/* A one-dimensional parameter: contiguous, of the length that the function says. */
typedef struct {
    const void* data;
    int64_t dtype;
} cf_vector;

typedef struct {
    const void* x;    /* (n, c1, spatial) */
    const void* skip; /* (n, c2, spatial), or null with c2 = 0 */
    void* y;          /* (n, c1 + c2, spatial) */
    int64_t dtype;    /* of x, skip and y */
    int64_t channels_last;
    int64_t n, c1, c2, spatial, groups;
    int64_t silu;       /* 1: SiLU, 0: identity */
    cf_vector weight;   /* (c1 + c2), or null */
    cf_vector bias;     /* likewise */
    cf_vector pre_bias; /* likewise */
    cf_vector scale;    /* (n, c1 + c2), rows scale_stride elements apart, or null */
    int64_t scale_stride;
    cf_vector shift; /* likewise */
    int64_t shift_stride;
    int64_t threads; /* of the CPU, how many may be used */
    double eps;
} cf_group_norm_silu_args;

typedef struct {
    const void* x;        /* (n, c, spatial) */
    const void* residual; /* of x's shape, dtype and layout, or null */
    void* y;
    int64_t dtype;
    int64_t channels_last;
    int64_t n, c, spatial;
    cf_vector bias; /* (c), or null */
    int64_t threads;
} cf_bias_residual_args;

/* A four-dimensional tensor with any strides, in elements. */
typedef struct {
    const void* data;
    int64_t dtype;
    int64_t strides[4];
} cf_tensor4;

typedef struct {
    const void* h; /* (n, c, height, width), channels innermost */
    int64_t dtype;
    int64_t n, c, cz, height, width;
    cf_vector direction_weight; /* (cz, 3, 3, c) in memory */
    cf_vector direction_bias;   /* (cz) */
    cf_vector distance_weight;  /* (c) */
    cf_vector distance_bias;    /* (1) */
    cf_tensor4 sample;          /* (n, cz, height, width), or null */
    cf_tensor4 anchor;          /* likewise */
    cf_tensor4 direction;       /* result, (n, cz, height, width), no two elements at one address */
    float* distance;            /* result, (n) */
    int64_t threads;
} cf_dual_head_args;

typedef struct {
    const void* sample;    /* (n, size) */
    int64_t dtype;         /* of sample and y */
    const void* direction; /* (n, size), elements in sample's order */
    int64_t direction_dtype;
    cf_vector distance; /* (n) */
    void* y;
    int64_t n, size;
    int64_t unit; /* 1: unit, 0: raw */
    int64_t threads;
    double eta, eps;
} cf_coalesce_step_args;

CF_API int cf_abi_version(void);

/* The OpenMP runtime that the process has already: GOMP_parallel, omp_get_thread_num and omp_get_num_threads of one
 * library, which all runtimes export. Until it is given, and for null pointers, everything runs on the calling
 * thread. Not to be called beside a kernel. */
CF_API void cf_cpu_set_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*thread_num)(void),
                              int (*num_threads)(void));

/* The instruction set in use: "avx512_bf16", "avx512", "avx2_vnni", "avx2" or "portable"; the best that the
 * processor has, unless another is chosen. */
CF_API const char* cf_cpu_isa(void);
/* CF_INVALID_ARGUMENT if the processor or the library does not have it. Not to be called beside a kernel. */
CF_API int cf_cpu_set_isa(const char* isa);

/* The ops: OP(name) has the function cf_cpu_NAME of cf_NAME_args, and a kernel `name` in a header of csrc/cpu. */
#define CF_OPS(OP)      \
    OP(group_norm_silu) \
    OP(bias_residual)   \
    OP(dual_head)       \
    OP(coalesce_step)

#define CF_FUNCTION(name) CF_API int cf_cpu_##name(const cf_##name##_args* args);
CF_OPS(CF_FUNCTION)
#undef CF_FUNCTION

/* Programs: a network as a list of steps, run in one call by threads that stay together from the first step to the
 * last. Memory is laid out and weights are packed beforehand; only attention packs its keys and values as it runs. */

/* Images with channels innermost: channel c of position (y, x) of sample n is element c of the position that begins
 * at data + n * sample + y * row + x * channels * (bytes of the dtype). With border = 1 there is one position more
 * on every side, and data points at the corner of the border, which whoever writes the image fills with zeros, in 8
 * bits with `zero`. */
typedef struct {
    void* data;
    int64_t dtype;
    int64_t row, sample; /* bytes */
    int64_t border;
} cf_image;

/* How an image of uint8 is made of float values: q[c] = round(value * inverse[c]) + zero[c], cut to 0 ... 255, with one
 * number for each channel. Both are null for other dtypes. */
typedef struct {
    const float* inverse;
    const uint8_t* zero;
} cf_quantisation;

/* group_norm_silu with channels innermost, into an image. norm's own y and threads are not used. */
typedef struct {
    cf_group_norm_silu_args norm;
    cf_image y;
    int64_t width; /* spatial is height * width */
    cf_quantisation quantisation;
} cf_group_norm_image_args;

/* How a convolution is computed: CF_WINOGRAD_m makes m x m outputs at a time of (m + 2)^2 products. */
enum cf_form { CF_DIRECT = 0, CF_WINOGRAD_2 = 2, CF_WINOGRAD_4 = 4 };

/* gelu(x) = x (1 + erf(x / sqrt(2))) / 2; CF_GELU_TANH is its approximation by tanh. */
enum cf_function {
    CF_IDENTITY = 0,
    CF_SILU = 1,
    CF_TANH = 2,
    CF_RELU = 3,
    CF_GELU = 4,
    CF_GELU_TANH = 5,
    CF_SIGMOID = 6
};

/* y = act(convolution(x) + bias + row + residual), 1x1 or 3x3, act being ReLU or nothing. A 1x1 convolution reads
 * positions (stride * i, stride * j) of x; a 3x3 one reads the 3x3 positions from (stride * i - padding,
 * stride * j - padding) on.
 *
 * Weights are packed in the order in which the kernel reads them. The outputs form vectors of cf_cpu_vector_width(),
 * the last one filled up with zeros, and the vectors form ceil(vectors / M) blocks that are as equal as can be, the
 * larger ones first; M is 4 if the width is 16, 2 if it is 8, and 3 if it is 4. A block lies in memory as (taps,
 * units, vectors, width, lanes): lanes = 4 / (bytes of the dtype) channels, which are multiplied together, and
 * units = channels / lanes. Other forms than CF_DIRECT have (m + 2)^2 points in the place of taps; for x of bfloat16
 * they are int16, and behind all of them stand the scales of the blocks, (points, vectors, width) of float32, and what
 * each channel is multiplied with, float32, with ones that mean nothing up to a multiple of the width.
 *
 * With gated = 1, y = value * function(gate), of a 1x1 convolution without act, row and residual that has two outputs
 * for each of y's, a value and a gate. Its weights, bias and scale are those of a convolution with
 * 2 * ceil(outputs / half) * half outputs, half being half the vector width: by turns the values of `half` channels of
 * y and their gates, with zeros for the channels that y does not have. */
typedef struct {
    cf_image x;        /* of float32, bfloat16, or uint8 with int8 weights; with a border if taps is 9 */
    cf_image residual; /* of y's shape and dtype, for a quantised y bfloat16, or data null */
    cf_image y;        /* float32 or bfloat16, or uint8 if x is not float32 */
    const void* weight;
    const float* bias;                            /* (outputs) */
    const float* scale;                           /* (outputs), of the integer sums, for uint8; else null */
    const float* row;                             /* (n, outputs), added at every position of a sample, or null */
    int64_t n, height, width;                     /* of y */
    int64_t channels;                             /* of x, a multiple of 4 bytes */
    int64_t outputs, taps, stride, padding, relu; /* outputs: channels of y */
    int64_t form;     /* of cf_form; others than CF_DIRECT for 3x3 with stride 1 and padding 1, and x not of uint8 */
    int64_t doubling; /* 1: position (i, j) of x stands for (2 i, 2 j) to (2 i + 1, 2 j + 1); not in CF_DIRECT */
    int64_t gated, function;      /* function: of cf_function, if gated is 1 */
    cf_quantisation quantisation; /* of y */
} cf_convolution_args;

/* y = cat(parts, 1), resized to the nearest position: position i of y is position floor(i * scale) of the parts, and
 * their last at most, along both axes, in float32 as torch has it. Converted to y's dtype. y may have more channels than
 * the parts; these are zero, in 8 bits the code of zero. */
typedef struct {
    cf_tensor4 parts[2]; /* (n, channels, from_height, from_width), any strides; the second may be null */
    int64_t channels[2];
    cf_image y;
    int64_t n, height, width, y_channels, from_height, from_width;
    cf_quantisation quantisation; /* of y, for all of its channels */
    double y_scale, x_scale;
} cf_gather_args;

/* Element (n, head, i, d) is data[n * sample + head * head_stride + i * row + d], in elements. */
typedef struct {
    const void* data;
    int64_t sample, head_stride, row;
} cf_heads;

/* y = softmax(q k^T * scale + bias) v for every sample and head, over the keys whose mask is not 0. */
typedef struct {
    cf_heads q, k, v;
    cf_heads bias;       /* float32, (n, heads, length, k_length) with any strides but the last, or data null */
    const uint8_t* mask; /* (n, k_length), or null; without keys, y is 0 */
    void* y;             /* (n, length, heads * width), uint8 if it is quantised */
    int64_t dtype;       /* float32 or bfloat16 */
    int64_t n, heads, length, k_length;
    int64_t width;                /* a multiple of 4 bytes */
    cf_quantisation quantisation; /* of y */
    double scale;
} cf_attention_args;

/* y = (x - mean) / sqrt(var + eps) * weight + bias over the channels of every row. */
typedef struct {
    const void* x; /* (rows, channels) */
    void* y;       /* of x's dtype, or uint8 if it is quantised */
    int64_t dtype; /* float32 or bfloat16 */
    int64_t rows, channels;
    const float *weight, *bias;
    cf_quantisation quantisation; /* of y */
    double eps;
} cf_layer_norm_args;

/* y = value * function(gate). Rows of value begin value_stride elements after one another, those of gate
 * gate_stride. */
typedef struct {
    const void *value, *gate;
    void* y;       /* (rows, channels), uint8 if it is quantised */
    int64_t dtype; /* float32 or bfloat16 */
    int64_t rows, channels, value_stride, gate_stride, function;
    cf_quantisation quantisation; /* of y */
} cf_gate_args;

/* y = function(x * x_scale + x_shift) * y_scale + y_shift + residual, element by element. */
typedef struct {
    const void *x, *residual; /* residual may be null */
    void* y;
    int64_t dtype; /* float32 or bfloat16, of all three */
    int64_t count, function;
    double x_scale, x_shift, y_scale, y_shift;
} cf_pointwise_args;

/* y = x * (scale + plus) + shift, with a scale and a shift for every channel of a sample. */
typedef struct {
    const void* x; /* (n, spatial, channels) */
    void* y;
    int64_t dtype; /* float32 or bfloat16, of both */
    int64_t n, spatial, channels;
    cf_vector scale;      /* (n, channels), or null for 1 */
    int64_t scale_stride; /* elements from a sample's to the next; 0 if all samples share one */
    cf_vector shift;      /* likewise, or null for 0 */
    int64_t shift_stride;
    double plus;
} cf_modulate_args;

/* y = x, where every row of x that is all zeros is replaced by `row`. */
typedef struct {
    const float* x; /* (rows, channels) */
    const float* row;
    float* y;
    int64_t rows, channels;
} cf_replace_zero_rows_args;

/* Every step: STEP(name, number, type of its arguments, function of csrc/cpu that runs it). This is the only list of
 * them: the enum below and the dispatch in csrc/cpu/program.h are made from it. */
#define CF_STEPS(STEP)                                                       \
    STEP(CONVOLUTION, 0, cf_convolution_args, convolution_step)              \
    STEP(GROUP_NORM_SILU, 1, cf_group_norm_image_args, group_norm_image)     \
    STEP(GATHER, 2, cf_gather_args, gather)                                  \
    STEP(ATTENTION, 3, cf_attention_args, attention)                         \
    STEP(DUAL_HEAD, 4, cf_dual_head_args, dual_head)                         \
    STEP(LAYER_NORM, 5, cf_layer_norm_args, layer_norm)                      \
    STEP(GATE, 6, cf_gate_args, gate)                                        \
    STEP(POINTWISE, 7, cf_pointwise_args, pointwise)                         \
    STEP(REPLACE_ZERO_ROWS, 8, cf_replace_zero_rows_args, replace_zero_rows) \
    STEP(MODULATE, 9, cf_modulate_args, modulate)

#define CF_STEP_KIND(name, number, type, function) CF_##name = number,
enum cf_step_kind { CF_STEPS(CF_STEP_KIND) };
#undef CF_STEP_KIND

typedef struct {
    int64_t kind;
    const void* args; /* of the kind's type in CF_STEPS; `threads` in it is not used */
} cf_step;

typedef struct {
    const cf_step* steps;
    int64_t count;
    int64_t threads;
} cf_program_args;

/* Floats in a vector of the instruction set in use; weights are packed for it. */
CF_API int cf_cpu_vector_width(void);
/* Dtypes beside float32 that the instruction set in use multiplies: bit 0 bfloat16, bit 1 uint8. */
CF_API int cf_cpu_products(void);
/* The largest int8 weight that it multiplies with uint8, and the smallest with a minus: 127, or 64 where sums of two
 * products have 16 bits. */
CF_API int cf_cpu_largest_weight(void);
CF_API int cf_cpu_run(const cf_program_args* args);

/* Weights in the order of cf_convolution_args, rounded to the dtype. For uint8 they are int8,
 * v = round(weight * step / scale) cut to -m ... m with m = cf_cpu_largest_weight(), and sums = sum over channels and
 * taps of v * zero. */
typedef struct {
    cf_tensor4 weight; /* (outputs, channels, height, width), any strides */
    void* packed;      /* result, all of it written */
    int64_t dtype;     /* of the convolution's input: float32, bfloat16 or uint8 */
    int64_t outputs, channels, height, width;
    const float* step;  /* (channels), for uint8; else null, like the next three */
    const float* scale; /* (outputs) */
    const float* zero;  /* (channels), whole numbers from 0 to 255 */
    int64_t* sums;      /* result, (outputs) */
    int64_t form;       /* of cf_form */
    int64_t threads;
} cf_pack_args;

CF_API int cf_cpu_pack(const cf_pack_args* args);

typedef struct {
    const void* data;
    int64_t bytes; /* a multiple of the dtype's size, whatever that is */
} cf_span;

/* A hash of the contents of the spans: of all bytes of a span of up to `whole` bytes, and of `samples` words of 8
 * bytes, at equal distances, of a longer one. */
typedef struct {
    const cf_span* spans;
    int64_t count, whole, samples;
    uint64_t* hash;
} cf_fingerprint_args;

CF_API int cf_cpu_fingerprint(const cf_fingerprint_args* args);

/* A hash of all bytes and of the seed, the same for any number of threads. It is not a cryptographic one. */
typedef struct {
    const void* data;
    int64_t bytes, seed;
    uint64_t* hash;
    int64_t threads;
} cf_content_hash_args;

CF_API int cf_cpu_content_hash(const cf_content_hash_args* args);

/* The CUDA kernels, a library of their own. A function launches on the stream (a cudaStream_t) and returns: it
 * neither waits nor allocates, and leaves no error behind. At multiples of 16 bytes: x, skip, residual, y, h,
 * direction_weight, and sample and direction of the step; direction_weight has h's dtype. */

/* What a choice of launch depends on. */
typedef struct {
    int64_t ordinal;    /* CUDA's number of it */
    int64_t capability; /* compute capability times ten */
    int64_t multiprocessors;
    int64_t shared_memory; /* bytes that a block may ask for */
} cf_cuda_device;

/* How a call is launched: a pure function of its sizes, dtypes and layout, and of the device. */
typedef struct {
    int64_t launches;
    int64_t blocks, threads, shared_memory; /* of the first launch */
    int64_t cluster;                        /* blocks that exchange through shared memory, 1 for none */
    int64_t vector;                         /* elements that a thread reads at a time */
    int64_t workspace;                      /* bytes of device memory that the call needs beside its arguments */
} cf_cuda_plan;

/* The compute capabilities times ten that the library has code for, "80,90"; "host" if it was built to run on the
 * CPU. */
CF_API const char* cf_cuda_architectures(void);
/* What a GPU has. */
CF_API int cf_cuda_describe(int64_t ordinal, cf_cuda_device* device);
/* What CF_CUDA_ERROR + an error means. */
CF_API const char* cf_cuda_error(int status);

CF_API int cf_cuda_group_norm_silu_plan(const cf_group_norm_silu_args* args, const cf_cuda_device* device,
                                        cf_cuda_plan* plan);
CF_API int cf_cuda_bias_residual_plan(const cf_bias_residual_args* args, const cf_cuda_device* device,
                                      cf_cuda_plan* plan);
CF_API int cf_cuda_dual_head_plan(const cf_dual_head_args* args, const cf_cuda_device* device, cf_cuda_plan* plan);
CF_API int cf_cuda_coalesce_step_plan(const cf_coalesce_step_args* args, const cf_cuda_device* device,
                                      cf_cuda_plan* plan);

CF_API int cf_cuda_group_norm_silu(const cf_group_norm_silu_args* args, const cf_cuda_device* device, void* workspace,
                                   void* stream);
CF_API int cf_cuda_bias_residual(const cf_bias_residual_args* args, const cf_cuda_device* device, void* workspace,
                                 void* stream);
CF_API int cf_cuda_dual_head(const cf_dual_head_args* args, const cf_cuda_device* device, void* workspace,
                             void* stream);
CF_API int cf_cuda_coalesce_step(const cf_coalesce_step_args* args, const cf_cuda_device* device, void* workspace,
                                 void* stream);

#ifdef __cplusplus
}
#endif

#endif
