// How coalesce_step is cut into blocks: a sample is a block's, or a cluster's where there are clusters, or, without a
// length to find, any number of blocks'.
#ifndef COALESCER_FAST_CUDA_STEP_H
#define COALESCER_FAST_CUDA_STEP_H

#include "device.h"

namespace cf::step {

constexpr int THREADS = 512;
constexpr int VECTOR = 8;  // elements, if the sizes are multiples of it
constexpr int HELD = 2;    // vectors that a thread keeps in registers between the length and the update

struct Plan {
    int vector;
    int64_t n, size, size_of_part;
    int parts, threads, cluster;  // parts: of a sample
    int64_t blocks;
};

inline int make_plan(const cf_coalesce_step_args& a, const cf_cuda_device& device, Plan& p) {
    if (!is_dtype(a.dtype) || !is_dtype(a.direction_dtype) || !is_vector(a.distance) || a.n < 0 || a.size < 0)
        return CF_INVALID_ARGUMENT;
    p = {};
    p.n = a.n, p.size = a.size;
    p.vector = a.size % VECTOR ? 1 : VECTOR;
    if (!a.n || !a.size) return CF_OK;
    const int64_t round = int64_t{THREADS} * p.vector, wanted = cdiv(a.size, round);
    // A cluster is worth its blocks while all of them run at once: with 64 samples on 132 multiprocessors, clusters of
    // four took twice the time of single blocks (H100).
    const int64_t room = a.n > device.multiprocessors ? 1 : device.multiprocessors / a.n;
    const int64_t clustered = device.capability < 90 ? 1 : room < 8 ? room : 8;
    const int64_t most = a.unit ? clustered : wanted;
    p.size_of_part = round_up(cdiv(a.size, wanted < most ? wanted : most), p.vector);
    if (cdiv(a.size, p.size_of_part) > 0x7fffffff) return CF_INVALID_ARGUMENT;
    p.parts = static_cast<int>(cdiv(a.size, p.size_of_part));
    p.threads = static_cast<int>(p.size_of_part < round ? round_up(cdiv(p.size_of_part, p.vector), WARP) : THREADS);
    p.cluster = a.unit ? p.parts : 1;
    p.blocks = p.n * p.parts;
    return CF_OK;
}

}  // namespace cf::step

#endif
