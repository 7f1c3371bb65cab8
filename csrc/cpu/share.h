// How a matrix product is shared between threads, as a function of sizes alone.
//
// A product has `tiles` of positions (rows of the image) by `blocks` of vectors of outputs (columns of weights).
// Whoever has `r` tiles and `c` vectors does r * c units of work, and reads r tiles of the image and c vectors of the
// weights. A block at one tile is never divided: it is what the inner loop computes at a time.
//
// The threads form `bands`, equally large groups of them. A band has its tiles, as many as every other, and its threads
// share all vectors at those tiles. So with one band for each thread, threads share positions, and each reads all
// weights; with one band in all, threads share the weights, and each reads the whole image; in between lies a grid of
// rows and columns, of which a thread reads x / bands + w * bands / threads bytes:
//
//     4 bands of 1    4 bands, 16 threads    1 band of 4         one thread's share of a band
//     0 0 0 0         0  1  2  3             0 1 2 3             . . # #
//     1 1 1 1         4  5  6  7             0 1 2 3             . # # #     its blocks from left to right, and the
//     2 2 2 2         8  9 10 11             0 1 2 3             . # # .     tiles of each from top to bottom
//     3 3 3 3        12 13 14 15             0 1 2 3             . # # .
//
// Within a band, each thread has equally many of the units, counted block by block and tile by tile. Where a share
// begins or ends within a block, two threads have its tiles: that way also 5 blocks are shared by 4 threads. A share is
// therefore up to three rectangles: the last tiles of a block, whole blocks, and the first tiles of another.
//
// Of the numbers of bands that divide the threads, the one is taken that reads least, among those whose largest share
// is at most a twentieth above the least possible. Two threads have positions of their own if the image is larger than
// the weights, else weights.
//
// No thread has more than 1.1 times the mean wherever there are 16 blocks at a tile or more for each thread
// (tests/csrc/test_share.py, at 1 to 64 threads, for all layers of the networks that benchmarks run).
#pragma once

#include <stdint.h>

namespace cf {
namespace {

// How `items` are divided into blocks of at most `most`, as equal as can be: the first `larger` blocks have an item
// more than the others, which have `least`.
struct EqualBlocks {
    int64_t count, least, larger;
    EqualBlocks(int64_t items, int64_t most)
        : count((items + most - 1) / most), least(items / count), larger(items % count) {}
    int64_t size(int64_t block) const { return least + (block < larger); }
    int64_t first(int64_t block) const { return block * least + (block < larger ? block : larger); }  // item
    int64_t items() const { return first(count); }
    // The block that the item is in.
    int64_t of(int64_t item) const {
        const int64_t in_larger = larger * (least + 1);
        return item < in_larger ? item / (least + 1) : larger + (item - in_larger) / least;
    }
};

// The blocks [first_block, last_block) at the tiles [first_tile, last_tile).
struct Rectangle {
    int64_t first_tile, last_tile, first_block, last_block;
};

struct Sharing {
    int64_t tiles;
    EqualBlocks blocks;
    int64_t threads, bands = 1;

    // x_bytes: of the whole image; w_bytes: of all weights.
    Sharing(int64_t tiles, EqualBlocks blocks, int64_t x_bytes, int64_t w_bytes, int64_t threads)
        : tiles(tiles), blocks(blocks), threads(threads) {
        if (threads <= 1) return;
        // twice, so that nothing is kept of each number of bands
        int64_t least = INT64_MAX, best = 1;
        double fewest = 0;
        for (bands = 1; bands <= threads; ++bands)
            if (threads % bands == 0 && largest() < least) least = largest();
        for (bands = 1; bands <= threads; ++bands) {
            if (threads % bands || largest() > least + least / 20) continue;
            const double bytes = static_cast<double>(x_bytes) / static_cast<double>(bands) +
                                 static_cast<double>(w_bytes) * static_cast<double>(bands) / threads;
            if (fewest == 0 || bytes < fewest) fewest = bytes, best = bands;
        }
        bands = best;
    }

    // f(rectangle) for every rectangle of the share of a thread, none of them empty.
    template <class F>
    void each(int64_t thread, const F& f) const {
        const int64_t members = threads / bands, band = thread / members, member = thread % members;
        const int64_t top = tiles * band / bands, height = tiles * (band + 1) / bands - top;
        const int64_t work = blocks.items() * height;
        if (!work) return;
        Point begin = split(work * member / members, height);
        const Point end = split(work * (member + 1) / members, height);
        if (begin.tile && begin.block < end.block) {
            f(Rectangle{top + begin.tile, top + height, begin.block, begin.block + 1});
            begin = {begin.block + 1, 0};
        }
        if (begin.block < end.block) {
            f(Rectangle{top, top + height, begin.block, end.block});
            begin = {end.block, 0};
        }
        if (begin.tile < end.tile) f(Rectangle{top + begin.tile, top + end.tile, end.block, end.block + 1});
    }

    // The units of a thread: vectors at one tile.
    int64_t load(int64_t thread) const {
        int64_t sum = 0;
        each(thread, [&](const Rectangle& r) {
            sum += (r.last_tile - r.first_tile) * (blocks.first(r.last_block) - blocks.first(r.first_block));
        });
        return sum;
    }

  private:
    struct Point {
        int64_t block, tile;
    };

    // The block at a tile that begins nearest to a unit of a band's work.
    Point split(int64_t unit, int64_t height) const {
        if (unit >= blocks.items() * height) return {blocks.count, 0};
        const int64_t block = blocks.of(unit / height), size = blocks.size(block);
        const int64_t tile = (unit - blocks.first(block) * height + size / 2) / size;
        return tile < height ? Point{block, tile} : Point{block + 1, 0};
    }

    // The units of the thread that has most: those of the band with most tiles, in whole blocks.
    int64_t largest() const {
        const int64_t height = up(tiles, bands), units = up(blocks.items() * height * bands, threads);
        return up(units, blocks.size(0)) * blocks.size(0);
    }

    static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

}  // namespace
}  // namespace cf
