// What a decoder layer does between its products: RMS norm, rotary embedding, attention, gate, sum. Own.
//
// Results have the roundings of transformers' eager code, where every intermediate tensor is rounded to the dtype of the
// model; only the order of the sum of squares is ours.
#pragma once

#include "attend_tokens.h"
#include "hf_bitnet_decode.h"

namespace hb {

// Serial work on one row or one head: decode.inc, compiled once per instruction set.
struct DecodeBodies {
    // out = round(x * rsqrt(mean(x^2) + eps)) * weight, all of `dtype`, `once`: without the inner rounding; x may be out. `row` is
    // scratch for k + 16 floats
    void (*rms_norm)(const void* x, int dtype, int64_t k, const void* weight, float eps, bool once, float* row, void* out);
    // out = round(x * cos) + round((-upper half of x, lower half of x) * sin) for one head of d; x may be out
    void (*rotate)(const void* x, int dtype, int64_t d, const void* cos, const void* sin, void* out);
    // see attend.inc
    void (*attend)(const void* q, int dtype, int64_t heads, int64_t d, const void* keys, const void* values, int64_t stride,
                   int64_t length, float scaling, float* space, void* out);
    // activation: of enum hb_activation
    void (*gate)(const void* gates, const void* ups, int dtype, int activation, int64_t n, void* out);
    void (*add)(const void* a, const void* b, int dtype, int64_t n, void* out);
    const AttendBodies* attention;  // of many tokens
};

const DecodeBodies& decode();  // of the level in use
const AttendBodies& attention(int dtype);

constexpr int64_t kThreadElements = 16 << 10;  // elements below which a second thread does not pay

// as many of something of this size as one thread should have
static inline int64_t grain(int64_t elements) {
    return elements >= kThreadElements ? 1 : kThreadElements / (elements > 0 ? elements : 1);
}

// Rows of k elements, `x_stride` apart, to rows without gaps; spread over the threads. x may be out where it has no gaps.
int norm_rows(const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const hb_norm& norm, void* out);

const DecodeBodies* decode_portable();
const DecodeBodies* decode_avx2();    // NULL where not compiled in
const DecodeBodies* decode_avx512();

}  // namespace hb
