// Hashes of what tensors hold.
//
// cf_cpu_fingerprint: whether weights have changed, asked before every call of an accelerated pipeline, so it has to be
// cheap. Small tensors, where an adapter or a schedule may have changed single elements, are read whole; of large ones,
// a sample of places.
//
// cf_cpu_content_hash: of all bytes, in chunks that threads share. A hash of the chunks' hashes is the result, so that
// it does not depend on who computed them.
#include <string.h>

#include "../abi.h"
#include "memory.h"
#include "threads.h"

namespace {

constexpr int64_t WORD = sizeof(uint64_t), CHUNK = 1 << 20;

// The hash with one more word in it. For a given hash it is another one for every word, and the other way round: a
// change of one word is always seen.
inline uint64_t joined(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;  // a product alone never brings high bits down to low ones
}

// Four hashes side by side, so that a multiplication need not wait for the one before it.
struct Hash {
    uint64_t lanes[4] = {1, 2, 3, 4};
    void add(int lane, const char* from, int64_t bytes) {
        uint64_t word = 0;
        memcpy(&word, from, static_cast<size_t>(bytes));
        lanes[lane] = joined(lanes[lane], word);
    }
    uint64_t all() const {
        uint64_t hash = 0;
        for (uint64_t lane : lanes) hash = joined(hash, lane);
        return hash;
    }
};

uint64_t hash_of(const char* data, int64_t bytes) {
    Hash hash;
    int64_t i = 0;
    for (; i + 4 * WORD <= bytes; i += 4 * WORD)
        for (int lane = 0; lane < 4; ++lane) hash.add(lane, data + i + lane * WORD, WORD);
    for (int lane = 0; i < bytes; i += WORD, ++lane) hash.add(lane, data + i, bytes - i < WORD ? bytes - i : WORD);
    return hash.all();
}

}  // namespace

int cf_cpu_fingerprint(const cf_fingerprint_args* a) {
    if (a->count < 0 || a->whole < 0 || a->samples < 2 || !a->hash || (a->count > 0 && !a->spans))
        return CF_INVALID_ARGUMENT;
    Hash hash;
    for (int64_t i = 0; i < a->count; ++i) {
        const cf_span& span = a->spans[i];
        const char* data = static_cast<const char*>(span.data);
        if (span.bytes < 0 || (span.bytes > 0 && !data)) return CF_INVALID_ARGUMENT;
        const int64_t words = span.bytes / WORD, rest = span.bytes % WORD;
        const bool whole = span.bytes <= a->whole || words < a->samples;
        const int64_t places = whole ? words : a->samples;
        for (int64_t k = 0; k < places; ++k) {
            const int64_t word = whole ? k : k * (words - 1) / (places - 1);
            hash.add(static_cast<int>(k & 3), data + word * WORD, WORD);
        }
        if (rest) hash.add(0, data + words * WORD, rest);
    }
    *a->hash = hash.all();
    return CF_OK;
}

int cf_cpu_content_hash(const cf_content_hash_args* a) {
    if (a->bytes < 0 || (a->bytes > 0 && !a->data) || !a->hash) return CF_INVALID_ARGUMENT;
    const char* data = static_cast<const char*>(a->data);
    const int64_t chunks = (a->bytes + CHUNK - 1) / CHUNK;
    auto* hashes = static_cast<uint64_t*>(cf::scratch(cf::CALL_SCRATCH, static_cast<size_t>(chunks + 1) * WORD));
    if (!hashes) return CF_OUT_OF_MEMORY;
    cf::parallel_for(chunks, a->threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t left = a->bytes - i * CHUNK;
            hashes[i] = hash_of(data + i * CHUNK, left < CHUNK ? left : CHUNK);
        }
    });
    uint64_t hash = joined(static_cast<uint64_t>(a->seed), static_cast<uint64_t>(a->bytes));
    for (int64_t i = 0; i < chunks; ++i) hash = joined(hash, hashes[i]);
    *a->hash = hash;
    return CF_OK;
}
