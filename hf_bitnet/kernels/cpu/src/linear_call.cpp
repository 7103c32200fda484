// Products of the C ABI over `linear`; and hb_linear with all its arguments in one block. Own.
//
// A foreign function call costs by the argument: Python makes the block of a weight once and replaces two addresses in it for
// each token.
#include "product.h"

extern "C" {

int hb_linear(const hb_input* input, int64_t m, int64_t k, const hb_grid* grid, const hb_weight* weights, int64_t count,
              int out_dtype) {
    return hb::linear(*input, m, k, *grid, weights, count, out_dtype, nullptr);
}

int hb_int_matmul(const int8_t* a, int64_t a_stride, const int8_t* b, int64_t b_stride, int64_t m, int64_t n, int64_t k,
                  int32_t* out) {
    if (k == 0 && m > 0 && n > 0) memset(out, 0, size_t(m * n) * 4);
    if (k == 0) return m < 0 || n < 0 ? HB_ERROR_ARGUMENT : HB_OK;
    const hb_input input = {a, a_stride, nullptr, nullptr, nullptr, HB_I8, 0, 0.0f, 0.0f, 0.0f, 0.0f};
    const hb_grid grid = {8, 0, 0, 1, 0.0f};
    const hb_weight weight = {b, n, b_stride, nullptr, 1, 1, nullptr, 0, out, n};
    return hb_linear(&input, m, k, &grid, &weight, 1, HB_F32);
}

typedef struct {
    hb_input input;
    int64_t m, k, count;
    int32_t out_dtype;
    hb_grid grid;
    // hb_weight weights[count] follow
} hb_linear_block;

static_assert(sizeof(hb_linear_block) % alignof(hb_weight) == 0, "the weights follow without a gap");

HB_API int hb_linear_call(const hb_linear_block* call) {
    const auto* weights = reinterpret_cast<const hb_weight*>(call + 1);
    return hb_linear(&call->input, call->m, call->k, &call->grid, weights, call->count, call->out_dtype);
}

}  // extern "C"
