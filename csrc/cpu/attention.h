// The step `attention`: y = softmax(q k^T * scale + bias) v for every sample and head, with a mask or without, in float32 or
// bfloat16.
//
// Both products run in the inner loop of convolution.h. For that, keys and values of each head are packed as weights
// are: keys so that an output is a key and the sum runs over the head's width; values so that an output is an element
// of the head and the sum runs over the keys. This is the only packing that a program does while it runs.
//
// Then an item of work is one tile of queries of one head, up to MAX_POSITIONS of them: it makes their scores for all
// keys, the softmax of each row, and the product with the values. The scores of a tile (6 rows of k_length floats) stay
// in a cache, so they are not cut along the keys as in flash attention, whose point is to keep tiles of them in memory
// that is far smaller; the largest networks here have 4096 keys, 96 KiB of scores a thread.
//
// The weights of the softmax are multiplied before they are divided by their sum, which is done to the `width` results
// instead of to the k_length weights. In bfloat16 the weights are rounded for the second product, and their sum is that
// of the unrounded ones.
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

// The keys or the values of a head as the weights of a product: `columns` outputs in vectors, each the sum of `units`
// times four bytes.
struct PackedHead {
    int64_t columns, units, vectors = ceil_div(columns, W), block_bytes = units * 4 * W;  // of one vector
    int64_t bytes = vectors * block_bytes;
    Blocks blocks{vectors};
};

inline float largest(const float* row, int64_t count) {
    float most = row[0];
    for (int64_t i = 1; i < count; ++i) most = row[i] > most ? row[i] : most;
    return most;
}

template <class T>
struct Attention {
    static constexpr int64_t LANES = Products<T>::LANES;
    static constexpr float MINUS_INFINITY = -__builtin_inff();

    const cf_attention_args& a;
    const PackedHead k{a.k_length, a.width / LANES}, v{a.width, ceil_div(a.k_length, LANES)};
    const int64_t heads = a.n * a.heads, tiles = ceil_div(a.length, MAX_POSITIONS);
    const int64_t keys = k.vectors * W, weights_row = v.units * LANES;  // lengths of rows of scores and of weights

    int run(int64_t threads) const {
        char* packed = static_cast<char*>(scratch(CALL_SCRATCH, static_cast<size_t>(heads * (k.bytes + v.bytes))));
        if (!packed) return CF_OUT_OF_MEMORY;
        // all heads are packed before any is multiplied: threads wait for each other here, once
        const int64_t blocks = k.blocks.count + v.blocks.count;
        parallel_for(heads * blocks, threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t head = item / blocks, block = item % blocks;
                char* to = packed + head * (k.bytes + v.bytes);
                if (block < k.blocks.count)
                    pack_keys(head, block, to);
                else
                    pack_values(head, block - k.blocks.count, to + k.bytes);
            }
        });
        const size_t row_bytes = static_cast<size_t>(keys) * sizeof(float) + (weights_row + W) * sizeof(T);
        return parallel_for_with_scratch(
            heads * tiles, threads, MAX_POSITIONS * row_bytes, [&](void* memory, int64_t begin, int64_t end) {
                float* scores = static_cast<float*>(memory);
                T* weights = reinterpret_cast<T*>(scores + MAX_POSITIONS * keys);
                for (int64_t item = begin; item < end; ++item) {
                    const int64_t head = item / tiles;
                    run_tile(head, item % tiles * MAX_POSITIONS, packed + head * (k.bytes + v.bytes), scores, weights);
                }
            });
    }

    const T* head_of(const cf_heads& heads, int64_t head) const {
        return static_cast<const T*>(heads.data) + head / a.heads * heads.sample + head % a.heads * heads.head_stride;
    }

    // A block of keys: four bytes of each of W keys form a vector.
    void pack_keys(int64_t head, int64_t block, char* packed) const {
        const T* from = head_of(a.k, head);
        T* to = reinterpret_cast<T*>(packed + k.blocks.first(block) * k.block_bytes);
        for (int64_t q = 0; q < k.units; ++q)
            for (int64_t i = 0; i < k.blocks.size(block); ++i, to += W * LANES) {
                const int64_t column = (k.blocks.first(block) + i) * W, count = min(k.columns - column, W);
                for (int64_t c = 0; c < count; ++c)
                    memcpy(to + c * LANES, from + (column + c) * a.k.row + q * LANES, 4);
                memset(to + count * LANES, 0, static_cast<size_t>((W - count) * LANES) * sizeof(T));
            }
    }

    // A block of values: LANES rows of W elements, interleaved, form a vector. Rows after the last are zero.
    void pack_values(int64_t head, int64_t block, char* packed) const {
        const T* from = head_of(a.v, head);
        T* to = reinterpret_cast<T*>(packed + v.blocks.first(block) * v.block_bytes);
        for (int64_t q = 0; q < v.units; ++q)
            for (int64_t i = 0; i < v.blocks.size(block); ++i, to += W * LANES) {
                const int64_t column = (v.blocks.first(block) + i) * W, count = min(v.columns - column, W);
                for (int64_t lane = 0; lane < LANES; ++lane) {
                    const int64_t row = q * LANES + lane;
                    const T* value = from + row * a.v.row + column;
                    if (row < a.k_length)
                        for (int64_t c = 0; c < count; ++c) to[c * LANES + lane] = value[c];
                    else
                        for (int64_t c = 0; c < count; ++c) to[c * LANES + lane] = T{};
                }
                memset(to + count * LANES, 0, static_cast<size_t>((W - count) * LANES) * sizeof(T));
            }
    }

    // The queries [i, i + MAX_POSITIONS) of a head.
    void run_tile(int64_t head, int64_t i, const char* packed, float* scores, T* weights) const {
        const int64_t none[1] = {0}, count = min(a.length - i, MAX_POSITIONS), n = head / a.heads, h = head % a.heads;
        const char* x[MAX_POSITIONS];
        Tile<T> sums;
        for (int64_t m = 0; m < count; ++m)
            x[m] = reinterpret_cast<const char*>(head_of(a.q, head) + (i + m) * a.q.row);
        for (int64_t block = 0; block < k.blocks.count; ++block) {
            const int64_t V = k.blocks.size(block), first = k.blocks.first(block);
            multiply<T>(V, count, x, none, 1, k.units, packed + first * k.block_bytes, sums);
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < V; ++j)
                    store(scores + m * keys + (first + j) * W, sums[m][j] * static_cast<float>(a.scale));
        }
        // the weights take the place of the queries as the left side of the second product
        float inverse[MAX_POSITIONS];
        for (int64_t m = 0; m < count; ++m) {
            if (a.bias.data) add_bias(n, h, i + m, scores + m * keys);
            inverse[m] = exponentials(n, scores + m * keys, weights + m * weights_row);
            x[m] = reinterpret_cast<const char*>(weights + m * weights_row);
        }
        for (int64_t block = 0; block < v.blocks.count; ++block) {
            const int64_t V = v.blocks.size(block), first = v.blocks.first(block);
            multiply<T>(V, count, x, none, 1, v.units, packed + k.bytes + first * v.block_bytes, sums);
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < V; ++j) {
                    const int64_t d = (first + j) * W, part = min(a.width - d, W);
                    const int64_t row = (n * a.length + i + m) * a.heads * a.width, c = h * a.width + d;
                    const vf value = sums[m][j] * inverse[m];
                    if (a.quantisation.inverse)
                        Row<uint8_t>{static_cast<uint8_t*>(a.y) + row, a.quantisation}.some(c, value, part);
                    else
                        store_some(static_cast<T*>(a.y) + row + c, value, part);
                }
        }
    }

    void add_bias(int64_t n, int64_t h, int64_t i, float* scores) const {
        const float* bias =
            static_cast<const float*>(a.bias.data) + n * a.bias.sample + h * a.bias.head_stride + i * a.bias.row;
        each_vector(bias, a.k_length, [&](int64_t k, vf value, int64_t count) {
            store_some(scores + k, load(scores + k) + value, count);
        });
    }

    // weights = exp(scores - the largest of them), 0 for keys that are masked. Returns 1 / their sum, or 0 if all keys
    // are masked.
    float exponentials(int64_t n, float* scores, T* weights) const {
        for (int64_t i = 0; i < a.k_length && a.mask; ++i)
            if (!a.mask[n * a.k_length + i]) scores[i] = MINUS_INFINITY;
        const float found = largest(scores, a.k_length);
        const float most = found == MINUS_INFINITY ? 0 : found;                  // -inf - -inf would be NaN
        for (int64_t i = a.k_length; i < keys; ++i) scores[i] = MINUS_INFINITY;  // the rest of the last vector
        vf total = {};
        for (int64_t i = 0; i < keys; i += W) {
            const vf e = exponential(load(scores + i) - most);
            total += e;
            store(scores + i, e);
        }
        int64_t i = 0;
        for (; i + W <= weights_row; i += W) store(weights + i, load(scores + i));
        if (i < weights_row) store_part(weights + i, load(scores + i), weights_row - i);
        const float all = sum(total);
        return all == 0 ? 0 : 1 / all;
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
