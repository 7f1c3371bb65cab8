// cf_cpu_pack: a convolution's weights in the order in which its kernel reads them (cf_convolution_args in abi.h).
//
// It is a transposition: in memory a row of weights belongs to one output, and in the packed order the numbers of all
// outputs of a block lie side by side. What moves is four bytes, `lanes` channels of one output and one tap, called a
// word here. A piece of work is a block's outputs and a few channels, so that it fits a first- or second-level cache.
// First each output's row is read from memory, converted, and left as words in (tap, channels) order; then the words
// are written as columns. So weights and result are read and written once, and each in runs of a kilobyte or so.
#pragma once

#include "check.h"
#include "convolution.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"
#include "winograd.h"

namespace cf {
namespace {

inline bool valid(const cf_pack_args& a) {
    const bool integers = a.dtype == CF_UINT8;
    return a.weight.data && valid(a.weight) && a.packed && (integers || valid_activation(a.dtype)) && a.outputs >= 1 &&
           a.channels >= 1 && a.height >= 1 && a.width >= 1 && (!integers || (a.step && a.scale && a.zero && a.sums)) &&
           (a.form == CF_DIRECT ||
            ((a.form == CF_WINOGRAD_2 || a.form == CF_WINOGRAD_4) && !integers && a.height == 3 && a.width == 3));
}

// to[i] = from[i], rounded to the elements of packed weights.
template <class T>
inline void convert(const T* from, float* to, int64_t count) {
    widen(from, to, count);
}
template <class T>
inline void convert(const T* from, bfloat* to, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const int64_t part = min(count - i, W);
        const vh rounded = round_to_bfloat(load_some(from + i, part));
        memcpy(to + i, &rounded, static_cast<size_t>(part) * sizeof(bfloat));
    }
}
inline void convert(const bfloat* from, bfloat* to, int64_t count) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(bfloat));
}

// round(from * step / scale); returns the sum of these times zero. A product is below 2^15, and `count` of a piece of
// work below 2^16.
template <class T>
inline int64_t quantise(const T* from, const float* step, vf scale, const float* zero, int8_t* to, int64_t count) {
    typedef int8_t vb __attribute__((vector_size(W)));
    vi sums{};
    const vf largest = broadcast(LARGEST_WEIGHT);
    for (int64_t i = 0; i < count; i += W) {
        const int64_t part = min(count - i, W);
        vf v = load_some(from + i, part) * load_some(step + i, part) / scale;
        v = v < largest ? v : largest;
        v = v > -largest ? v : -largest;
        // the addition rounds, ties to even, and leaves the integer in the low bits: see power_of_two
        const vi whole = (vi)(v + 12582912.0f) - 0x4b400000;
        sums += whole * __builtin_convertvector(load_some(zero + i, part), vi);
        const vb bytes = __builtin_convertvector(whole, vb);
        memcpy(to + i, &bytes, static_cast<size_t>(part));
    }
    int64_t sum = 0;
    for (int i = 0; i < W; ++i) sum += sums[i];
    return sum;
}

template <class T, class E>
struct Packing {
    static constexpr int64_t LANES = 4 / static_cast<int64_t>(sizeof(E));
    static constexpr int64_t WORDS_IN_CACHE = 12 << 10;

    const cf_pack_args& a;
    const int64_t taps = a.height * a.width, units = ceil_div(a.channels, LANES);
    const Blocks blocks{ceil_div(a.outputs, W)};
    // Units of a piece of work, and words from one output's row to the next. With an odd number of cache lines, the
    // rows' words of one column do not compete for the same places in a cache.
    const int64_t most = min(units, WORDS_IN_CACHE / (MAX_VECTORS * W * taps) + 1);
    const int64_t row = round_up(taps * most, 16) | 16;

    int run(int64_t threads) const {
        const int64_t pieces = ceil_div(units, most), words = blocks.count * MAX_VECTORS * W * taps * units;
        if (words < 32 << 10) threads = 1;  // starting a second one costs as much as it saves
        prepare_output(a.packed, ceil_div(a.outputs, W) * W * taps * units * 4);
        if (a.sums) memset(a.sums, 0, static_cast<size_t>(a.outputs) * sizeof(int64_t));
        const size_t bytes = static_cast<size_t>(MAX_VECTORS * W * row) * 4,
                     gathered = static_cast<size_t>(most * LANES) * sizeof(T);
        return parallel_for_with_scratch(
            blocks.count * pieces, threads, bytes + gathered, [&](void* memory, int64_t begin, int64_t end) {
                for (int64_t piece = begin; piece < end; ++piece)
                    run_piece(piece / pieces, piece % pieces * most, static_cast<uint32_t*>(memory),
                              reinterpret_cast<T*>(static_cast<char*>(memory) + bytes));
            });
    }

    // A block's outputs and the units from `first` on.
    void run_piece(int64_t block, int64_t first, uint32_t* words, T* gathered) const {
        const int64_t outputs = blocks.size(block) * W, begin = blocks.first(block) * W;
        const int64_t count = min(units - first, most);
        for (int64_t o = 0; o < outputs; ++o) {
            E* to = reinterpret_cast<E*>(words + o * row);
            if (begin + o < a.outputs)
                read_row(begin + o, first * LANES, count * LANES, to, gathered);
            else
                memset(to, 0, static_cast<size_t>(taps * count) * 4);
        }
        uint32_t* packed = static_cast<uint32_t*>(a.packed) + begin * taps * units;
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t u = 0; u < count; ++u) {
                uint32_t* to = packed + (tap * units + first + u) * outputs;
                const uint32_t* from = words + tap * count + u;
                for (int64_t o = 0; o < outputs; ++o) to[o] = from[o * row];
            }
    }

    // `count` channels of an output, from channel c on, tap by tap; those that there are not are zeros.
    void read_row(int64_t output, int64_t c, int64_t count, E* to, T* gathered) const {
        const int64_t* strides = a.weight.strides;
        const int64_t there = min(a.channels - c, count);
        const T* from = static_cast<const T*>(a.weight.data) + output * strides[0] + c * strides[1];
        for (int64_t y = 0; y < a.height; ++y)
            for (int64_t x = 0; x < a.width; ++x, to += count) {
                const T* tap = from + y * strides[2] + x * strides[3];
                if (strides[1] != 1) {
                    for (int64_t i = 0; i < there; ++i) gathered[i] = tap[i * strides[1]];
                    tap = gathered;
                }
                write_row(output, c, tap, to, there);
                memset(static_cast<void*>(to + there), 0, static_cast<size_t>(count - there) * sizeof(E));
            }
    }

    template <class F>
    void write_row(int64_t, int64_t, const T* from, F* to, int64_t count) const {
        convert(from, to, count);
    }
    void write_row(int64_t output, int64_t c, const T* from, int8_t* to, int64_t count) const {
        const int64_t sum = quantise(from, a.step + c, broadcast(a.scale[output]), a.zero + c, to, count);
        __atomic_fetch_add(a.sums + output, sum, __ATOMIC_RELAXED);  // several threads may have parts of the output
    }
};

inline int pack(const cf_pack_args& a, int64_t threads) {
    if (a.form != CF_DIRECT) return winograd_pack(a, threads);
    return with_type(a.weight.dtype, [&](auto type) {
        typedef decltype(type) T;
        if (a.dtype == CF_FLOAT32) return Packing<T, float>{a}.run(threads);
        if (a.dtype == CF_BFLOAT16) return Packing<T, bfloat>{a}.run(threads);
        return Packing<T, int8_t>{a}.run(threads);
    });
}

}  // namespace
}  // namespace cf
