// share.h for test_share.py.
#include "../../csrc/cpu/share.h"

// loads[t]: units of thread t; rectangles[t]: how many rectangles they are; covered[tile * blocks + block]: how many
// threads have it. Returns the number of bands.
extern "C" int64_t share(int64_t tiles, int64_t vectors, int64_t most, int64_t x_bytes, int64_t w_bytes,
                         int64_t threads, int64_t* loads, int64_t* covered, int64_t* rectangles) {
    const cf::EqualBlocks blocks(vectors, most);
    const cf::Sharing sharing(tiles, blocks, x_bytes, w_bytes, threads);
    for (int64_t thread = 0; thread < threads; ++thread) {
        loads[thread] = 0;
        rectangles[thread] = 0;
        sharing.each(thread, [&](const cf::Rectangle& r) {
            ++rectangles[thread];
            for (int64_t tile = r.first_tile; tile < r.last_tile; ++tile)
                for (int64_t block = r.first_block; block < r.last_block; ++block) {
                    ++covered[tile * blocks.count + block];
                    loads[thread] += blocks.size(block);
                }
        });
    }
    return sharing.bands;
}
