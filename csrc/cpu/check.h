// What the checks of arguments have in common. Each kernel's header has a function valid(args), which is called before
// every run: a wrong size or a null pointer becomes a status instead of a write to somebody else's memory.
#pragma once

#include "../abi.h"

namespace cf {
namespace {

inline bool valid_dtype(int64_t dtype) { return dtype == CF_FLOAT32 || dtype == CF_FLOAT16 || dtype == CF_BFLOAT16; }

// The dtypes of what steps hand to each other.
inline bool valid_activation(int64_t dtype) { return dtype == CF_FLOAT32 || dtype == CF_BFLOAT16; }

// An argument that was not given has no dtype.
inline bool valid(const cf_vector& v) { return valid_dtype(v.dtype) || !v.data; }
inline bool valid(const cf_tensor4& t) { return valid_dtype(t.dtype) || !t.data; }

// An image of no samples may have any address, null too.
inline bool valid(const cf_image& image, int64_t n) {
    return (image.data || n == 0) && (image.border == 0 || image.border == 1);
}

// Both arrays of it are given, or neither is; both for what is `quantised`.
inline bool valid(const cf_quantisation& q) { return !q.inverse == !q.zero; }
inline bool valid(const cf_quantisation& q, bool quantised) { return valid(q) && quantised == !!q.inverse; }

}  // namespace
}  // namespace cf
