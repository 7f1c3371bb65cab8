// The step `attention`: y = softmax(q k^T * scale + bias) v for every sample and head, with a mask or without, in
// float32 or bfloat16.
//
// Both products run in the inner loop of convolution.h. For that, keys and values of each head are packed as weights
// are: keys so that an output is a key and the sum runs over the head's width; values so that an output is an element
// of the head and the sum runs over the keys. This is the only packing that a program does while it runs.
//
// Blocks. The keys are cut into blocks of some 384 (`Keys`), whose packed keys and values stay in a second-level cache
// (96 KiB in bfloat16 where heads are 64 wide), and the scores of a tile in a first-level one. An item of work is a
// tile of queries of one head, up to MAX_POSITIONS of them, and a thread takes up to TILES items of a head through a
// block before it goes on to the next, so that a block is read from memory once for TILES tiles.
//
// Softmax. The largest score of a row is known only after its last block, so each block's weights are 2^(score - the
// largest until now), scores being in powers of 2, and where a block has a larger one, the row's sums are multiplied by
// 2^(old - new) first. Results are divided by the sum of the weights at the end. In bfloat16 the weights are rounded
// for the second product, and their sum is that of the unrounded ones.
//
// What was tried, in bfloat16 on one thread of an AMD EPYC "Turin" (Zen 5), whose products reach some 515 GFLOP/s, for
// 4096 positions and heads 64 wide: each tile through all keys, as was done here before, 165 GFLOP/s; blocks of some
// 128 keys 378, of 256 395, of 512 399, of 384 within 2 % of these; products in a function that is not inlined 0.85
// times as fast.
//
// How keys are cut depends on their number alone, and no row depends on another, so neither the number of threads nor
// the batch changes a bit.
#pragma once

#include "check.h"
#include "convolution.h"
#include "rows.h"
#include "simd.h"
#include "threads.h"

namespace cf {
namespace {

inline bool valid(const cf_attention_args& a) {
    return valid_activation(a.dtype) && a.n >= 0 && a.heads >= 1 && a.length >= 1 && a.k_length >= 1 && a.width >= 1 &&
           (a.dtype == CF_FLOAT32 || a.width % 2 == 0) && valid(a.quantisation) &&
           ((a.q.data && a.k.data && a.v.data && a.y) || a.n == 0);
}

// How the keys of a head are cut into `count` blocks of `size`, a whole number of vectors; the last may be smaller. A
// block has some ABOUT keys, and none more than MOST.
struct Keys {
    static constexpr int64_t ABOUT = 384, MOST = ABOUT + ABOUT / 2;
    int64_t length, size, count;
    explicit Keys(int64_t length) : length(length) {
        const int64_t about = length < MOST ? 1 : (length + ABOUT / 2) / ABOUT;
        size = min(round_up(ceil_div(length, about), about > 1 ? MAX_VECTORS * W : W), MOST);
        count = ceil_div(length, size);
    }
    int64_t first(int64_t block) const { return block * size; }
    int64_t of(int64_t block) const { return min(length - first(block), size); }
};
static_assert(Keys::MOST % (MAX_VECTORS * W) == 0, "size is a whole number of vectors");

// 2^t for t <= 0, and 0 for -inf; NaN stays NaN. As precise as the numbers of type T that are made of it: to 7e-5 for
// bfloat16, whose own rounding is 2e-3.
template <class T>
inline vf weight_of(vf t) {
    const vi tiny = t < -126.0f;
    return tiny ? vf{} : power_of_two(tiny ? broadcast(-126.0f) : t);
}
#if CF_WIDTH == 16
template <>
inline vf weight_of<bfloat>(vf t) {
    const vf r = (vf)_mm512_reduce_ps((__m512)t, 1);  // t - floor(t); 0 for -inf
    vf p = fma(broadcast(7.80245226e-2f), r, 2.26067155e-1f);
    p = fma(p, r, 6.95833540e-1f);
    p = fma(p, r, 9.99925219e-1f);
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);  // p 2^floor(t)
}
#endif

template <class T>
struct Attention {
    static constexpr int64_t LANES = Products<T>::LANES, TILES = 16;
    static constexpr float MINUS_INFINITY = -__builtin_inff(), LOWEST = -__FLT_MAX__, LOG2_E = 1.44269504f;

    const cf_attention_args& a;
    const Keys keys{a.k_length};
    const int64_t k_units = a.width / LANES, v_units = ceil_div(keys.size, LANES), v_vectors = ceil_div(a.width, W);
    // bytes of a vector of keys and of values, and of a block of them
    const int64_t k_vector = k_units * 4 * W, k_bytes = ceil_div(keys.size, W) * k_vector;
    const int64_t block_bytes = k_bytes + v_vectors * v_units * 4 * W, head_bytes = keys.count * block_bytes;
    const Blocks v_blocks{v_vectors};
    const int64_t heads = a.n * a.heads, tiles = ceil_div(a.length, MAX_POSITIONS);
    const int64_t row = round_up(keys.size, W);  // of scores and of weights
    const float scale = static_cast<float>(a.scale * 1.4426950408889634);

    // What is known of a row of queries after some blocks of keys.
    struct Running {
        vf total;    // sums of its weights
        float most;  // its largest score
    };

    // A thread's memory.
    struct Scratch {
        Running* rows;
        float *sums, *scores;  // sums: of the weights times the values
        T* weights;
    };

    int run(int64_t threads) const {
        char* packed = static_cast<char*>(scratch(CALL_SCRATCH, static_cast<size_t>(heads * head_bytes)));
        if (!packed) return CF_OUT_OF_MEMORY;
        // all heads are packed before any is multiplied: threads wait for each other here, once
        parallel_for(heads * keys.count, threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item)
                pack(item / keys.count, item % keys.count, packed + item * block_bytes);
        });
        const int64_t sums_row = v_vectors * W;
        const size_t rows = TILES * MAX_POSITIONS,
                     row_bytes = sizeof(Running) + static_cast<size_t>(sums_row) * sizeof(float),
                     score_bytes = static_cast<size_t>(row) * (sizeof(float) + sizeof(T));
        return parallel_for_with_scratch(heads * tiles, threads, rows * row_bytes + MAX_POSITIONS * score_bytes,
                                         [&](void* memory, int64_t begin, int64_t end) {
                                             Scratch s;
                                             s.rows = static_cast<Running*>(memory);
                                             s.sums = reinterpret_cast<float*>(s.rows + rows);
                                             s.scores = s.sums + rows * sums_row;
                                             s.weights = reinterpret_cast<T*>(s.scores + MAX_POSITIONS * row);
                                             for (int64_t item = begin, count; item < end; item += count) {
                                                 const int64_t head = item / tiles, tile = item % tiles;
                                                 count = min(min(end - item, tiles - tile), TILES);
                                                 run_tiles(head, tile, count, packed + head * head_bytes, s);
                                             }
                                         });
    }

    const T* head_of(const cf_heads& heads, int64_t head) const {
        return static_cast<const T*>(heads.data) + head / a.heads * heads.sample + head % a.heads * heads.head_stride;
    }

    // A block of keys and values of a head.
    void pack(int64_t head, int64_t block, char* packed) const {
        const int64_t first = keys.first(block), count = keys.of(block);
        pack_keys(head_of(a.k, head) + first * a.k.row, count, packed);
        pack_values(head_of(a.v, head) + first * a.v.row, count, packed + k_bytes);
    }

    // Four bytes of each of W keys form a vector.
    void pack_keys(const T* from, int64_t count, char* packed) const {
        T* to = reinterpret_cast<T*>(packed);
        const Blocks blocks{ceil_div(count, W)};
        for (int64_t block = 0; block < blocks.count; ++block)
            for (int64_t q = 0; q < k_units; ++q)
                for (int64_t i = 0; i < blocks.size(block); ++i, to += W * LANES) {
                    const int64_t key = (blocks.first(block) + i) * W, part = min(count - key, W);
                    for (int64_t c = 0; c < part; ++c)
                        memcpy(to + c * LANES, from + (key + c) * a.k.row + q * LANES, 4);
                    memset(to + part * LANES, 0, static_cast<size_t>((W - part) * LANES) * sizeof(T));
                }
    }

    // LANES values of W elements, interleaved, form a vector. Those after the last are zero.
    void pack_values(const T* from, int64_t count, char* packed) const {
        T* to = reinterpret_cast<T*>(packed);
        for (int64_t block = 0; block < v_blocks.count; ++block)
            for (int64_t q = 0; q < ceil_div(count, LANES); ++q)
                for (int64_t i = 0; i < v_blocks.size(block); ++i, to += W * LANES) {
                    const int64_t column = (v_blocks.first(block) + i) * W, part = min(a.width - column, W);
                    T values[LANES][W] = {};
                    for (int64_t lane = 0; lane < min(count - q * LANES, LANES); ++lane)
                        memcpy(values[lane], from + (q * LANES + lane) * a.v.row + column,
                               static_cast<size_t>(part) * sizeof(T));
                    for (int64_t c = 0; c < W; ++c)
                        for (int64_t lane = 0; lane < LANES; ++lane) to[c * LANES + lane] = values[lane][c];
                }
    }

    // `count` tiles of queries of a head, from `tile` on, through all blocks of keys.
    void run_tiles(int64_t head, int64_t tile, int64_t count, const char* packed, const Scratch& s) const {
        for (int64_t i = 0; i < count * MAX_POSITIONS; ++i) s.rows[i] = {vf{}, MINUS_INFINITY};
        for (int64_t block = 0; block < keys.count; ++block, packed += block_bytes)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t r = i * MAX_POSITIONS;
                run_tile(head, (tile + i) * MAX_POSITIONS, block, packed,
                         {s.rows + r, s.sums + r * v_vectors * W, s.scores, s.weights});
            }
    }

    // The queries [i, i + MAX_POSITIONS) of a head and a block of keys.
    void run_tile(int64_t head, int64_t i, int64_t block, const char* packed, const Scratch& s) const {
        const int64_t none[1] = {0}, count = min(a.length - i, MAX_POSITIONS), n = head / a.heads, h = head % a.heads;
        const int64_t some = keys.of(block);
        const Blocks k_blocks{ceil_div(some, W)};
        const char* x[MAX_POSITIONS];
        Tile<T> products;
        for (int64_t m = 0; m < count; ++m)
            x[m] = reinterpret_cast<const char*>(head_of(a.q, head) + (i + m) * a.q.row);
        for (int64_t b = 0; b < k_blocks.count; ++b) {
            const int64_t V = k_blocks.size(b), first = k_blocks.first(b);
            multiply<T>(V, count, x, none, 1, k_units, packed + first * k_vector, products);
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < V; ++j) store(s.scores + m * row + (first + j) * W, products[m][j] * scale);
        }
        // the weights take the place of the queries as the left side of the second product
        float factor[MAX_POSITIONS];
        for (int64_t m = 0; m < count; ++m) {
            float* scores = s.scores + m * row;
            if (a.bias.data) add_bias(n, h, i + m, block, scores);
            if (a.mask) apply_mask(a.mask + n * a.k_length + keys.first(block), some, scores);
            for (int64_t k = some; k < round_up(some, W); ++k)
                scores[k] = MINUS_INFINITY;  // the rest of the last vector
            factor[m] = weigh(scores, ceil_div(some, W), s.weights + m * row, s.rows[m]);
            x[m] = reinterpret_cast<const char*>(s.weights + m * row);
        }
        const bool last = block == keys.count - 1;
        float inverse[MAX_POSITIONS];
        for (int64_t m = 0; m < count && last; ++m) {
            const float all = sum(s.rows[m].total);
            inverse[m] = all == 0 ? 0 : 1 / all;  // without keys, y is 0
        }
        const int64_t units = ceil_div(some, LANES);
        for (int64_t b = 0; b < v_blocks.count; ++b) {
            const int64_t V = v_blocks.size(b), first = v_blocks.first(b);
            multiply<T>(V, count, x, none, 1, units, packed + k_bytes + first * units * 4 * W, products);
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < V; ++j) {
                    float* sums = s.sums + (m * v_vectors + first + j) * W;
                    const vf value = block ? fma(load(sums), broadcast(factor[m]), products[m][j]) : products[m][j];
                    if (!last) {
                        store(sums, value);
                        continue;
                    }
                    const int64_t d = (first + j) * W, part = min(a.width - d, W);
                    const int64_t to = (n * a.length + i + m) * a.heads * a.width, c = h * a.width + d;
                    if (a.quantisation.inverse)
                        Row<uint8_t>{static_cast<uint8_t*>(a.y) + to, a.quantisation}.some(c, value * inverse[m], part);
                    else
                        store_some(static_cast<T*>(a.y) + to + c, value * inverse[m], part);
                }
        }
    }

    void add_bias(int64_t n, int64_t h, int64_t i, int64_t block, float* scores) const {
        const float* bias = static_cast<const float*>(a.bias.data) + n * a.bias.sample + h * a.bias.head_stride +
                            i * a.bias.row + keys.first(block);
        each_vector(bias, keys.of(block), [&](int64_t k, vf value, int64_t count) {
            const vf scaled = value * LOG2_E;
            // the lowest of all numbers stays one: a row that has it everywhere is not a row without keys
            const vf finite = scaled < LOWEST && value >= LOWEST ? broadcast(LOWEST) : scaled;
            store_some(scores + k, load(scores + k) + finite, count);
        });
    }

    static void apply_mask(const uint8_t* mask, int64_t count, float* scores) {
        for (int64_t k = 0; k < count; ++k) scores[k] = mask[k] ? scores[k] : MINUS_INFINITY;
    }

    // weights = 2^(scores - the row's largest score until now), 0 for keys that are masked. Returns what the row's sums
    // have to be multiplied by.
    static float weigh(const float* scores, int64_t vectors, T* weights, Running& known) {
        vf most = broadcast(known.most);
        for (int64_t i = 0; i < vectors; ++i) most = larger(load(scores + i * W), most);
        float factor = 1;
        const float found = largest(most);
        if (found > known.most) {
            factor = weight_of<T>(broadcast(known.most - found))[0];
            known.total *= factor;
            known.most = found;
        }
        const float base = known.most == MINUS_INFINITY ? 0 : known.most;  // -inf - -inf would be NaN
        vf total = known.total;
        for (int64_t i = 0; i < vectors; ++i) {
            const vf e = weight_of<T>(load(scores + i * W) - base);
            total += e;
            store(weights + i * W, e);
        }
        known.total = total;
        return factor;
    }
};

inline int attention(const cf_attention_args& a, int64_t threads) {
    if (a.n == 0) return CF_OK;
    if (a.dtype == CF_FLOAT32) return Attention<float>{a}.run(threads);
#if defined(__AVX512BF16__)
    if (a.dtype == CF_BFLOAT16) return Attention<bfloat>{a}.run(threads);
#endif
    return CF_INVALID_ARGUMENT;
}

}  // namespace
}  // namespace cf
