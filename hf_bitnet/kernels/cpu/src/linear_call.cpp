// hb_linear with all its arguments in one block of memory: a foreign function call costs by the argument. Own.
//
// Python makes the block of a weight once and replaces two addresses in it for each token.
#include "hf_bitnet_cpu.h"

extern "C" {

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
