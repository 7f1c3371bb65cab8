// How group_norm_silu is cut into blocks: plain C++, a pure function of sizes, dtype, layout and device.
//
// A block works on a slab of `rows` rows of `columns` contiguous elements. Channels innermost: rows are positions of
// one sample, columns the channels of a tile, which holds whole groups (or, of a group wider than a tile, a piece).
// Contiguous: rows are the channels of one group, columns its positions, or a piece of them. A thread keeps to one
// vector of columns and goes down the rows.
//
// (a) two launches: the slab of a tile is split by rows between blocks; each leaves the moments of its part of each
// group in a slot of
//     its own of the workspace; the second launch, in the same blocks, merges the slots and applies.
// (b) one launch: the slab stays in shared memory, of one block, or split by rows between the blocks of a cluster,
// which exchange moments.
#ifndef COALESCER_FAST_CUDA_GROUP_NORM_H
#define COALESCER_FAST_CUDA_GROUP_NORM_H

#include <cstdint>
#include <initializer_list>
#include <numeric>

#include "device.h"

namespace cf::group_norm {

constexpr int THREADS = 256;
constexpr int LEAST_THREADS = 128;  // those that have no rows share the channels and groups
constexpr int MOST_VECTORS = 256;   // of a row of a tile
static_assert(MOST_VECTORS <= THREADS, "every vector of a row needs a thread");
constexpr int MOST_SPLITS = 64;              // more would make the merge as long as the work
constexpr int MOST_ROWS_OF_CHANNELS = 1024;  // contiguous: their coefficients lie in shared memory
constexpr int64_t SMALL_SLAB = 16 << 10;     // bytes that are not worth another block

// Blocks of `THREADS` that a multiprocessor has registers for: the launch bounds of the kernels.
constexpr int blocks_held(bool fused, bool channels_last, int vector) {
    return !channels_last || vector == 1 ? 2 : fused && vector > 4 ? 4 : 3;
}
template <bool FUSED, bool CL, int V>
constexpr int HELD = blocks_held(FUSED, CL, V);

struct Plan {
    bool fused;          // (b)
    bool channels_last;  // a single position is both layouts at once, and this one serves better
    int vector;          // elements
    int64_t n;
    int c1, c2, channels, per_group, spatial;
    int columns, vectors;                  // of a full tile's row, in elements and in vectors
    int tiles;                             // of a sample
    int groups_per_tile, tiles_per_group;  // one of them is 1
    int rows, splits, rows_per_split;      // splits: the cluster's size if fused
    int lanes, threads;                    // threads that share a column, and all
    int entries;                           // groups that a vector of columns can reach into
    int64_t blocks, shared_memory, workspace;
    Divisor by_splits, by_tiles, by_tiles_per_group, by_per_group, by_vectors,
        by_lanes;  // of the numbers of these names
};

// What a block keeps in shared memory, in this order: the slab (fused), moments of every thread, coefficients of every
// channel, of every group its statistics and, fused, the block's own moments.
struct Shared {
    int64_t moments, coefficients, groups, total;  // where each begins, in bytes

    __host__ __device__ Shared(const Plan& p, int64_t element) {
        const int64_t slab = p.fused ? round_up(p.rows_per_split * static_cast<int64_t>(p.columns) * element, 16) : 0;
        const int64_t channels = p.channels_last ? p.columns : p.rows_per_split;
        moments = slab;
        coefficients = moments + int64_t{8} * p.entries * p.threads;
        groups = coefficients + round_up(12 * channels, 16);
        total = groups + int64_t{16} * p.groups_per_tile;
    }
};

inline void prepare_divisors(Plan& p) {
    p.by_splits = Divisor(p.splits), p.by_tiles = Divisor(p.tiles), p.by_tiles_per_group = Divisor(p.tiles_per_group);
    p.by_per_group = Divisor(p.per_group), p.by_vectors = Divisor(p.vectors), p.by_lanes = Divisor(p.lanes);
}

// Cut the rows between `splits` blocks at most, none of them empty.
inline void split(Plan& p, int64_t splits) {
    p.rows_per_split = static_cast<int>(cdiv(p.rows, splits < 1 ? 1 : splits));
    p.splits = static_cast<int>(cdiv(p.rows, p.rows_per_split));
    p.lanes = THREADS / p.vectors < p.rows_per_split ? THREADS / p.vectors : p.rows_per_split;
    p.threads = static_cast<int>(round_up(int64_t{p.lanes} * p.vectors, WARP));
    if (p.threads < LEAST_THREADS) p.threads = LEAST_THREADS;
    p.blocks = p.n * p.tiles * p.splits;
}

// Channels innermost: tiles of whole groups whose rows are multiples of `run` bytes; false if there is none such.
inline bool tile(Plan& p, int64_t run, int64_t element) {
    const int64_t most = int64_t{MOST_VECTORS} * p.vector, groups = p.channels / p.per_group;
    if (p.per_group > most) {
        p.columns = static_cast<int>(round_up(cdiv(p.per_group, cdiv(p.per_group, most)), p.vector));
        p.groups_per_tile = 1;
    } else {
        int64_t columns = std::lcm<int64_t>(p.per_group, run / element > p.vector ? run / element : p.vector);
        if (columns > p.channels) columns = p.channels;
        if (columns > most || columns % p.vector) return false;
        p.columns = static_cast<int>(columns);
        p.groups_per_tile = p.columns / p.per_group;
    }
    p.tiles_per_group = static_cast<int>(cdiv(p.per_group, p.columns));
    p.tiles = static_cast<int>(p.tiles_per_group > 1 ? groups * p.tiles_per_group : cdiv(groups, p.groups_per_tile));
    p.vectors = p.columns / p.vector;
    return true;
}

inline bool is_power_of_two(int64_t x) { return (x & (x - 1)) == 0; }

// What the plan should take, in microseconds, to compare plans of one call by. Blocks come in waves of as many as the
// device holds at a time; of clusters it holds fewer. A block takes a time of its own, and longer the more its
// multiprocessor has to move meanwhile, the more rows a thread has, and, in two launches, the more parts there are to
// merge. Rows that are no multiple of 32 bytes waste what memory gives. The factors were fitted to the times of 9,028
// plans of 212 calls on an H100, in bfloat16 with channels innermost: launch_plans.csv of the results, a test compares.
struct Costs {
    double block, kilobyte, cluster, row, clusters_held;  // one launch
    double two_blocks, two_kilobyte, two_part, odd_row;   // two launches
};
constexpr Costs COSTS = {3.812, 0.06127, 2.617, 0.02881, 0.8045, 6.865, 0.1393, 0.02278, 0.09538};

inline double microseconds(const Plan& p, const cf_cuda_device& device, int64_t element) {
    int64_t resident = int64_t{blocks_held(p.fused, p.channels_last, p.vector)} * THREADS / p.threads;
    for (const int64_t limit : {int64_t{2048} / p.threads, (device.shared_memory + 1024) / (p.shared_memory + 1024)}) {
        if (limit < resident) resident = limit;
    }
    if (resident < 1) resident = 1;
    const bool cluster = p.fused && p.splits > 1;
    const double blocks = static_cast<double>(p.blocks) / static_cast<double>(device.multiprocessors);
    double waves = blocks / (static_cast<double>(resident) * (cluster ? COSTS.clusters_held : 1));
    waves = waves <= 3 ? static_cast<double>(static_cast<int64_t>(waves - 1e-9)) + 1 : waves + 0.5;
    double neighbours = blocks < static_cast<double>(resident) ? blocks : static_cast<double>(resident);
    if (neighbours < 1) neighbours = 1;
    const double slab = 1e-3 * static_cast<double>(int64_t{p.rows_per_split} * p.columns * element);
    const double kilobytes = neighbours * slab * (1 + (p.columns * element % 32 ? COSTS.odd_row : 0));
    const double rows = static_cast<double>(p.rows_per_split) / p.lanes;
    if (!p.fused) return waves * (COSTS.two_blocks + COSTS.two_kilobyte * kilobytes + COSTS.two_part * p.splits);
    return waves * (COSTS.block + COSTS.kilobyte * kilobytes + COSTS.row * rows + (cluster ? COSTS.cluster : 0));
}

inline int make_plan(const cf_group_norm_silu_args& a, const cf_cuda_device& device, Plan& p) {
    constexpr int64_t LARGEST = 0x7fffffff;
    const int64_t channels = a.c1 + a.c2;
    if (!is_dtype(a.dtype) || a.n < 0 || a.c1 < 1 || a.c2 < 0 || channels > LARGEST) return CF_INVALID_ARGUMENT;
    if (a.spatial < 0 || a.spatial > LARGEST || a.groups < 1 || channels % a.groups) return CF_INVALID_ARGUMENT;
    if (a.n > 0 && a.spatial > 0 && (a.c2 > 0) != (a.skip != nullptr)) return CF_INVALID_ARGUMENT;
    for (const cf_vector& v : {a.weight, a.bias, a.pre_bias, a.scale, a.shift}) {
        if (!is_vector(v)) return CF_INVALID_ARGUMENT;
    }
    p = {};
    p.n = a.spatial ? a.n : 0;
    p.c1 = static_cast<int>(a.c1), p.c2 = static_cast<int>(a.c2), p.channels = static_cast<int>(channels);
    p.per_group = static_cast<int>(channels / a.groups);
    p.spatial = static_cast<int>(a.spatial);
    p.vector = 1, p.entries = 1;
    p.channels_last = a.channels_last || a.spatial == 1;
    if (!p.n) return CF_OK;

    const int64_t element = size_of(a.dtype), wide = 16 / element;
    if (p.channels_last) {
        const int64_t most = MOST_VECTORS * wide;
        const bool cut = p.per_group > most ? p.per_group % wide == 0 : std::lcm<int64_t>(p.per_group, wide) <= most;
        if (a.c1 % wide == 0 && a.c2 % wide == 0 && cut) p.vector = static_cast<int>(wide);
        p.rows = p.spatial;
        if (p.per_group % p.vector)
            p.entries = p.per_group > p.vector ? 2 : p.vector / p.per_group + (p.vector % p.per_group ? 2 : 0);
    } else {
        if (a.spatial % wide == 0) p.vector = static_cast<int>(wide);
        p.rows = p.per_group;
        const int64_t pieces = cdiv(a.spatial, int64_t{MOST_VECTORS} * p.vector);
        p.columns = static_cast<int>(round_up(cdiv(a.spatial, pieces), p.vector));
        p.tiles_per_group = static_cast<int>(cdiv(a.spatial, p.columns));
        p.groups_per_tile = 1;
        if (a.groups * p.tiles_per_group > LARGEST) return CF_INVALID_ARGUMENT;
        p.tiles = static_cast<int>(a.groups) * p.tiles_per_group;
        p.vectors = p.columns / p.vector;
    }

    // Every tiling, with its rows in every number of parts: the one that should take least time.
    constexpr int64_t RUNS[] = {256, 128, 64, 32, 16, 1};              // bytes of a tile's rows
    const int64_t* const runs_end = RUNS + (p.channels_last ? 6 : 1);  // contiguous, there is one tiling
    // a part of a GPU with fewer multiprocessors has no clusters of eight
    const int64_t most_clustered = device.capability < 90 ? 1 : device.multiprocessors < 8 ? device.multiprocessors : 8;
    const int64_t stride = p.channels_last ? channels : a.spatial;  // of rows, in elements
    const int64_t least = p.channels_last ? 1 : cdiv(p.rows, MOST_ROWS_OF_CHANNELS);
    Plan best = {};
    double best_time = 0;
    for (const int64_t* run = RUNS; run < runs_end; ++run) {
        if (p.channels_last && !tile(p, *run, element)) continue;
        for (int64_t parts = least; parts <= (least > MOST_SPLITS ? least : MOST_SPLITS); parts *= 2) {
            split(p, parts);
            if (parts > least && p.splits != parts) break;
            if (p.rows_per_split * stride > LARGEST * p.vector) continue;  // kernels count vectors in 32 bits
            for (const bool fused : {true, false}) {
                const bool whole_groups = p.tiles_per_group == 1 && p.splits <= most_clustered;
                if (fused && (!whole_groups || (p.channels_last && *run < 16) || !is_power_of_two(p.splits))) continue;
                p.fused = fused;
                p.shared_memory = Shared(p, element).total;
                if (p.shared_memory > device.shared_memory) continue;
                // two launches of fewer than four parts have not been measured: for what nothing else fits
                const double time = microseconds(p, device, element) * (!fused && p.splits < 4 ? 100 : 1);
                if (!best.blocks || time < best_time) best = p, best_time = time;
            }
        }
    }
    if (!best.blocks) return CF_INVALID_ARGUMENT;
    p = best;
    prepare_divisors(p);
    if (p.fused) return CF_OK;
    p.workspace = int64_t{8} * p.n * p.splits * (p.channels / p.per_group) * p.tiles_per_group;
    return CF_OK;
}

}  // namespace cf::group_norm

#endif
