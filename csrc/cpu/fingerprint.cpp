// cf_cpu_fingerprint: whether weights have changed, asked before every call of an accelerated pipeline, so it has to be
// cheap. Small tensors, where an adapter or a schedule may have changed single elements, are read whole; of large ones,
// a sample of places.
#include <string.h>

#include "../abi.h"

namespace {

// Four hashes side by side, so that a multiplication need not wait for the one before it.
struct Hash {
    uint64_t lanes[4] = {1, 2, 3, 4};
    void add(int lane, const char* from, size_t bytes) {
        uint64_t word = 0;
        memcpy(&word, from, bytes);
        lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15u;
        lanes[lane] ^= lanes[lane] >> 29;  // a product alone never brings high bits down to low ones
    }
    uint64_t all() const {
        uint64_t hash = 0;
        for (uint64_t lane : lanes) hash = ((hash ^ lane) * 0x9e3779b97f4a7c15u) ^ (lane >> 32);
        return hash;
    }
};

}  // namespace

int cf_cpu_fingerprint(const cf_fingerprint_args* a) {
    constexpr int64_t WORD = sizeof(uint64_t);
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
        if (rest) hash.add(0, data + words * WORD, static_cast<size_t>(rest));
    }
    *a->hash = hash.all();
    return CF_OK;
}
