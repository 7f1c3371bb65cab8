// How dual_head is cut into blocks. An item is PIXELS neighbours of a row and OUTPUTS channels of the direction;
// `lanes` threads share it, each with vectors of h's channels of its own. A block has THREADS / lanes items of one
// sample.
#ifndef COALESCER_FAST_CUDA_HEAD_H
#define COALESCER_FAST_CUDA_HEAD_H

#include "device.h"

namespace cf::head {

constexpr int THREADS = 256;
constexpr int PIXELS = 4;
constexpr int OUTPUTS = 4;
constexpr int VECTOR =
    4;  // channels; with eight, which are 16 bytes of half precision, the window has no room in the registers
constexpr int FINISHED =
    1024;  // elements of the direction to which a block of the second launch adds the anchor's part

struct Plan {
    int vector, lanes;
    int64_t n;
    int c, cz, height, width;
    int runs, parts;                         // of a row into PIXELS, of the channels into OUTPUTS
    int items, blocks_of_sample, finishing;  // of a sample; finishing: blocks of the second launch
    int64_t blocks, finish_blocks;           // of all
    bool anchored;
    int64_t slots;      // bytes: for every block its part of the pooled distance and of |p - R|^2,
    int64_t workspace;  // and, if anchored, the direction without the anchor's part, (n, height, width, cz) in float32
};

inline int make_plan(const cf_dual_head_args& a, const cf_cuda_device& device, Plan& p) {
    constexpr int64_t LARGEST = 0x7fffffff;
    if (!is_dtype(a.dtype) || a.direction_weight.dtype != a.dtype || !is_dtype(a.direction_bias.dtype))
        return CF_INVALID_ARGUMENT;
    if (!is_dtype(a.distance_weight.dtype) || !is_dtype(a.distance_bias.dtype) || !is_dtype(a.direction.dtype))
        return CF_INVALID_ARGUMENT;
    // the weights of OUTPUTS channels are counted in 32 bits
    if (a.n < 0 || a.c < 1 || a.c > LARGEST / (9 * OUTPUTS) || a.cz < 1 || a.cz > LARGEST) return CF_INVALID_ARGUMENT;
    if (a.height < 0 || a.width < 0 || a.height > LARGEST || a.width > LARGEST) return CF_INVALID_ARGUMENT;
    if (a.height * (a.width + PIXELS) > LARGEST / (a.cz + OUTPUTS)) return CF_INVALID_ARGUMENT;
    p = {};
    p.anchored = a.sample.data != nullptr;
    if (p.anchored != (a.anchor.data != nullptr)) return CF_INVALID_ARGUMENT;
    if (p.anchored && (!is_dtype(a.sample.dtype) || !is_dtype(a.anchor.dtype))) return CF_INVALID_ARGUMENT;
    p.n = a.n;
    p.c = static_cast<int>(a.c), p.cz = static_cast<int>(a.cz);
    p.height = static_cast<int>(a.height), p.width = static_cast<int>(a.width);
    p.vector = a.c % VECTOR ? 1 : VECTOR;
    p.runs = static_cast<int>(cdiv(a.width, PIXELS)), p.parts = static_cast<int>(cdiv(a.cz, OUTPUTS));
    p.items = p.height * p.runs * p.parts;
    // as few lanes as fill the device: the sum over them is work
    for (p.lanes = 4; p.lanes < WARP; p.lanes *= 2) {
        if (a.n * p.items * p.lanes >= device.multiprocessors * 2 * THREADS || int64_t{p.lanes} * p.vector >= a.c)
            break;
    }
    p.blocks_of_sample = static_cast<int>(cdiv(p.items, THREADS / p.lanes));
    p.blocks = p.n * p.blocks_of_sample;
    const int64_t size = a.cz * a.height * a.width;
    p.finishing = p.anchored && size > FINISHED ? static_cast<int>(cdiv(size, FINISHED)) : 1;
    p.finish_blocks = p.n * p.finishing;
    p.slots = round_up(8 * p.blocks, 16);
    p.workspace = p.slots + (p.anchored ? 4 * p.n * size : 0);
    return CF_OK;
}

}  // namespace cf::head

#endif
