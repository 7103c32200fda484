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

// A pre-norm decoder layer with rotary embedding, grouped attention and a gated SiLU, as packed weights: of Llama, Mistral, ...
// All activations are of `dtype`; `out` and `out_stride` of the weights mean nothing here.
typedef struct {
    int64_t dtype, hidden, heads, kv_heads, head_dim, ffn;
    const void* input_norm;  // (hidden)
    const void* post_norm;   // (hidden)
    float input_eps, post_eps, scaling, qmin, qmax, eps;
    hb_grid grid;
    int32_t unused;
    hb_weight qkv[3], attention_out, gate_up[2], down;
} hb_decoder_layer;

// The layer for one new token of each of `batch` sequences: x and out (batch, hidden); cos and sin (batch, head_dim) with
// `angle_stride` between sequences. Keys and values of the token are written to position `length` of the buffers (batch, kv_heads,
// positions, head_dim), whose strides are in elements, and it attends to positions 0 .. length. Roundings are those of eager
// code; attention rounds once, at its end.
HB_API int hb_decode_layer(const hb_decoder_layer* layer, int64_t batch, const void* x, const void* cos, const void* sin,
                           int64_t angle_stride, void* keys, void* values, int64_t batch_stride, int64_t head_stride,
                           int64_t position_stride, int64_t length, void* out);

#ifdef __cplusplus
}
#endif
