// One call of `linear`, and what its forms share. Own.
#pragma once

#include "product.h"

namespace hb {

constexpr int64_t kBlockMost = 32 * 32;  // results of a block whose gate is computed with it

// One call, with all that both forms need.
struct Call {
    const ProductBodies& body;
    const hb_input& x;
    int64_t m, k;
    hb_grid grid;  // with `lowest` for the levels that the bodies see
    uint8_t flip;
    const hb_weight* weights;
    int64_t count;
    int out_dtype;
    bool ordered;  // K is taken in panel order; not where groups are no multiples of its unit
    const Gate* gate;  // of the matrix form: what both of two weights of equal size become; NULL: their own results

    Packed packed(const hb_weight& w) const {
        return {static_cast<const uint8_t*>(w.weight), w.weight_stride, k, grid.bits, flip};
    }
};

// The outputs of all weights, cut into pieces of `size` none of which spans two weights: how many there are, and the weight
// that piece *i of them belongs to, with *i then counted within it.
static inline int64_t pieces_of_weights(const Call& call, int64_t size) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < call.count; ++i) pieces += ceil_div(call.weights[i].n, size);
    return pieces;
}
static inline const hb_weight& weight_of(const Call& call, int64_t size, int64_t* i) {
    const hb_weight* weight = call.weights;
    while (*i >= ceil_div(weight->n, size)) *i -= ceil_div(weight++->n, size);
    return *weight;
}

// Row m of x as int8 codes (in `buffer`, or where they lie), its scale and the sum of its codes.
static inline const int8_t* codes_of_row(const Call& call, int64_t m, int8_t* buffer, float* row_scratch, float* scale, int32_t* sum) {
    const hb_input& x = call.x;
    if (x.x_dtype == HB_I8) {
        const int8_t* row = static_cast<const int8_t*>(x.x) + m * x.x_stride;
        *sum = call.body.sum(row, call.k);
        const AnyFloat* scales = x.scale;
        *scale = scales ? scales[m] : 1.0f;
        return row;
    }
    const void* row = static_cast<const char*>(x.x) + m * x.x_stride * int64_t(size_of(x.x_dtype));
    if (x.norm_weight)
        *scale = rows().norm_quantize(row, x.x_dtype, call.k, x.norm_weight, x.norm_dtype, x.norm_eps, x.qmin, x.qmax, x.eps,
                                      row_scratch, buffer, sum);
    else
        *scale = rows().quantize(row, x.x_dtype, call.k, x.qmin, x.qmax, x.eps, buffer, sum);
    return buffer;
}

static inline Epilogue epilogue(const Call& call, const hb_weight* weight, const float* scales, const int32_t* sums) {
    return {weight, scales, call.x.zero, sums, nullptr, call.k, call.grid.lowest, call.grid.step, call.grid.zero_point, call.out_dtype, false};
}

// The matrix form, product_matrix.cpp.
int linear_blocks(const Call& call);

}  // namespace hb
