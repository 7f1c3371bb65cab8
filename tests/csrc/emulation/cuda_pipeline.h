// The copies are made when their thread waits for them, as late as a device may, so that a forgotten wait reads what
// was there before.
#pragma once
#include "emulation.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zfill = 0, EMULATION_HERE) {
    emulation::copy_async(to, from, size, zfill, {"__pipeline_memcpy_async", file, line});
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t prior) { emulation::wait_copies(prior); }
