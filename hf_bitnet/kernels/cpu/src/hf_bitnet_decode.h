// The C ABI of the steps between the products of a decoder layer; conventions as in hf_bitnet_cpu.h. Own.
#pragma once

#include "hf_bitnet_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// out (rows, k) contiguous = round(x * rsqrt(mean(x^2) + eps)) * weight (k), everything of `dtype`, rounded as eager code does.
HB_API int hb_rms_norm(const void* x, int64_t dtype, int64_t rows, int64_t k, int64_t x_stride, const void* weight, float eps,
                       void* out);

// Heads to rotate: x and out (batch, heads, tokens, d) with these strides in elements, each head contiguous.
typedef struct {
    const void* x;
    void* out;
    int64_t heads, batch_stride, head_stride, token_stride;
    int64_t out_batch_stride, out_head_stride, out_token_stride;
} hb_heads;

// out = x * cos + rotate_half(x) * sin, cos and sin (batch, tokens, d) with these strides (a batch stride of 0: one for all).
HB_API int hb_rotate(const hb_heads* tensors, int64_t count, int64_t dtype, int64_t batch, int64_t tokens, int64_t d, const void* cos,
                     const void* sin, int64_t batch_stride, int64_t token_stride);

#ifdef __cplusplus
}
#endif
