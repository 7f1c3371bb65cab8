#pragma once
#include "emulation.h"

namespace cooperative_groups {

struct thread_block {
    void sync(EMULATION_HERE) const { emulation::sync_block({"thread_block.sync", file, line}); }
    unsigned thread_rank() const { return emulation::thread_rank(); }
    unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
    unsigned size() const { return num_threads(); }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
    void sync(EMULATION_HERE) const { emulation::sync_cluster({"cluster_group.sync", file, line}); }
    // Stricter than CUDA's: who waits waits until all wait, not only until all have arrived.
    void barrier_arrive() const {}
    void barrier_wait(EMULATION_HERE) const { emulation::sync_cluster({"cluster_group.barrier_wait", file, line}); }
    unsigned block_rank() const { return emulation::block_rank(); }
    unsigned num_blocks() const { return emulation::cluster_size(); }
    unsigned num_threads() const { return num_blocks() * this_thread_block().num_threads(); }
    unsigned thread_rank() const { return block_rank() * this_thread_block().num_threads() + emulation::thread_rank(); }
    template <class T>
    T* map_shared_rank(T* pointer, int rank) const {
        return static_cast<T*>(emulation::map_shared(pointer, static_cast<unsigned>(rank)));
    }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
