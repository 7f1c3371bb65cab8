// How bias_residual is cut into blocks: rows of contiguous elements, (n, position) and channels, or (n, channel) and
// positions. A block works on a tile of columns and a few rows a thread; a thread keeps to one vector of columns.
#ifndef COALESCER_FAST_CUDA_RESIDUAL_H
#define COALESCER_FAST_CUDA_RESIDUAL_H

#include "device.h"

namespace cf::residual {

constexpr int THREADS = 256;
constexpr int ROWS = 4;  // a thread

struct Plan {
    int vector;
    int64_t rows, columns, channels;
    int vectors, lanes;  // of a tile's row; rows at a time
    int column_tiles;
    int64_t blocks;
};

inline int make_plan(const cf_bias_residual_args& a, Plan& p) {
    if (!is_dtype(a.dtype) || !is_vector(a.bias) || a.n < 0 || a.c < 0 || a.spatial < 0) return CF_INVALID_ARGUMENT;
    p = {};
    // a single position is both layouts at once, and the longer row serves better
    const bool channels_last = a.channels_last || a.spatial == 1;
    p.channels = a.c;
    p.rows = channels_last ? a.n * a.spatial : a.n * a.c;
    p.columns = channels_last ? a.c : a.spatial;
    const int64_t wide = 16 / size_of(a.dtype);
    p.vector = static_cast<int>(p.columns % wide ? 1 : wide);
    const int64_t all = p.columns / p.vector;
    if (cdiv(all, THREADS) > 0x7fffffff) return CF_INVALID_ARGUMENT;
    p.column_tiles = static_cast<int>(cdiv(all, THREADS));
    p.vectors = static_cast<int>(p.column_tiles ? cdiv(all, p.column_tiles) : 1);
    p.lanes = THREADS / p.vectors;
    p.blocks = cdiv(p.rows, int64_t{p.lanes} * ROWS) * p.column_tiles;
    return CF_OK;
}

}  // namespace cf::residual

#endif
