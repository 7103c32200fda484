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

// An RMS norm: its weight (k), or NULL for none; what it adds to the mean square; whether it rounds once, after the weight, in
// place of before and after.
typedef struct {
    const void* weight;
    float eps;
    int32_t once;
} hb_norm;

enum hb_activation { HB_SILU = 0, HB_RELU2 = 1 };  // x / (1 + e^-x); max(x, 0)^2

// A pre-norm decoder layer with rotary embedding, grouped attention and a gated MLP, as packed weights: of Llama, Mistral, ... In
// front of both is a norm; there may be others on each head of queries and keys (head_dim), and in front of the projections out of
// attention (heads * head_dim) and MLP (ffn). All activations are of `dtype`; `out` and `out_stride` of the weights mean nothing here.
typedef struct {
    int64_t dtype, hidden, heads, kv_heads, head_dim, ffn;
    hb_norm input_norm, post_norm, q_norm, k_norm, out_norm, down_norm;
    float scaling, qmin, qmax, eps;
    hb_grid grid;
    int32_t activation;
    hb_weight qkv[3], attention_out, gate_up[2], down;
} hb_decoder_layer;

// One layer's part in computing new tokens: its description, the buffers (batch, kv_heads, positions, head_dim) of its keys and
// values with their strides in elements, the number of past positions they hold, and the result (batch, tokens, hidden).
typedef struct {
    const hb_decoder_layer* layer;
    void* keys;
    void* values;
    int64_t batch_stride, head_stride, position_stride, length;
    void* out;
} hb_decode_step;

// Layers that follow each other, for `tokens` new positions of each of `batch` sequences: x (batch, tokens, hidden) is the input of
// the first, `out` of each that of the next; cos and sin (batch, tokens, head_dim) with `angle_stride` between sequences. Keys and
// values of token t are written to position `length` + t of each layer's buffers, and it attends to positions 0 .. length + t.
// Roundings are those of eager code; attention rounds once, at its end, and of several tokens in bfloat16 also its weights where AMX
// serves. After an error the results are those of no layer from the one that failed on.
HB_API int hb_decode_layers(const hb_decode_step* steps, int64_t count, int64_t batch, int64_t tokens, const void* x, const void* cos,
                            const void* sin, int64_t angle_stride);

#ifdef __cplusplus
}
#endif
