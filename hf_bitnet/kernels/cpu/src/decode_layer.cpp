// hb_decode_layers: whole decoder layers for one token in one call. Own.
//
// Between the products of one token a framework spends more time on calling than on computing: thirty operations and as many
// modules a layer. Here they are seven kernels in a row; the parts are those that also exist as single operations.
#include <atomic>

#include "decode.h"
#include "hf_bitnet_decode.h"

namespace hb {
namespace {

constexpr int64_t kThreadPositions = 128;  // keys times heads below which a second thread does not pay

// Where the intermediate results of a token lie, in one piece of scratch.
struct Space {
    char *normed, *q, *k, *v, *attended, *gates, *ups, *sum;
};

bool lay_out(const hb_decoder_layer& l, int64_t batch, Space* space) {
    const int64_t size = int64_t(size_of(int(l.dtype))), wide = l.heads * l.head_dim, narrow = l.kv_heads * l.head_dim;
    const int64_t parts[8] = {l.hidden, wide, narrow, narrow, wide > l.hidden ? wide : l.hidden, l.ffn, l.ffn, l.hidden};
    char** places[8] = {&space->normed, &space->q, &space->k, &space->v, &space->attended, &space->gates, &space->ups, &space->sum};
    int64_t begins[9] = {};
    for (int i = 0; i < 8; ++i) begins[i + 1] = begins[i] + round_up(parts[i] * batch * size, 64);
    auto* all = static_cast<char*>(scratch(SLOT_LAYER, size_t(begins[8])));
    for (int i = 0; i < 8 && all; ++i) *places[i] = all + begins[i];
    return all != nullptr;
}

int product(const hb_decoder_layer& l, int64_t batch, const void* x, int64_t k, const hb_weight* weights, int64_t count,
            char* const* outs) {
    hb_input input = {};
    input.x = x, input.x_stride = k, input.x_dtype = int32_t(l.dtype);
    input.qmin = l.qmin, input.qmax = l.qmax, input.eps = l.eps;
    hb_weight placed[3];
    for (int64_t i = 0; i < count; ++i) placed[i] = weights[i], placed[i].out = outs[i], placed[i].out_stride = weights[i].n;
    return hb_linear(&input, batch, k, &l.grid, placed, count, int(l.dtype));
}

// A norm that may not be there, in place.
int norm_in_place(const hb_decoder_layer& l, const hb_norm& norm, int64_t rows, int64_t k, void* x) {
    return norm.weight ? norm_rows(x, int(l.dtype), rows, k, k, norm, x) : int(HB_OK);
}

// The buffers of keys and values.
struct Cache {
    char *keys, *values;
    int64_t batch_stride, head_stride, position_stride, length;
};

void rotate_and_store(const hb_decoder_layer& l, int64_t batch, const Space& space, const char* cos, const char* sin,
                      int64_t angle_stride, const Cache& cache) {
    const int64_t d = l.head_dim, size = int64_t(size_of(int(l.dtype)));
    const DecodeBodies& body = decode();
    for (int64_t b = 0; b < batch; ++b) {
        const char *of_cos = cos + b * angle_stride * size, *of_sin = sin + b * angle_stride * size;
        for (int64_t h = 0; h < l.heads; ++h) {
            char* head = space.q + (b * l.heads + h) * d * size;  // rotated onto itself by way of `sum`, which is free
            body.rotate(head, int(l.dtype), d, of_cos, of_sin, space.sum);
            memcpy(head, space.sum, size_t(d * size));
        }
        for (int64_t h = 0; h < l.kv_heads; ++h) {
            const int64_t from = (b * l.kv_heads + h) * d * size;
            const int64_t to = (b * cache.batch_stride + h * cache.head_stride + cache.length * cache.position_stride) * size;
            body.rotate(space.k + from, int(l.dtype), d, of_cos, of_sin, cache.keys + to);
            memcpy(cache.values + to, space.v + from, size_t(d * size));
        }
    }
}

int attend_all(const hb_decoder_layer& l, int64_t batch, const Space& space, const Cache& cache) {
    const int64_t d = l.head_dim, size = int64_t(size_of(int(l.dtype))), group = l.heads / l.kv_heads, length = cache.length + 1;
    const DecodeBodies& body = decode();
    std::atomic<int> failed{HB_OK};
    const int64_t grain = kThreadPositions / (length * group) + 1;
    for_range(batch * l.kv_heads, grain, [&](int64_t begin, int64_t end) {
        auto* floats = static_cast<float*>(scratch(SLOT_ROW, size_t(group * (length + 2 * d) + 32) * 4));
        if (!floats) {
            failed = HB_ERROR_MEMORY;
            return;
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t from = (i / l.kv_heads * cache.batch_stride + i % l.kv_heads * cache.head_stride) * size;
            body.attend(space.q + i * group * d * size, int(l.dtype), group, d, cache.keys + from, cache.values + from,
                        cache.position_stride, length, l.scaling, floats, space.attended + i * group * d * size);
        }
    });
    return failed;
}

bool sound(const hb_decoder_layer& l, int64_t batch, int64_t length) {
    return is_float(l.dtype) && batch >= 1 && length >= 0 && l.hidden >= 1 && l.kv_heads >= 1 && l.heads % l.kv_heads == 0 &&
           l.head_dim >= 2 && l.head_dim % 2 == 0 && l.head_dim <= l.hidden && l.ffn >= 1 && l.input_norm.weight && l.post_norm.weight &&
           (l.activation == HB_SILU || l.activation == HB_RELU2);
}

int decode_one(const hb_decode_step& step, int64_t batch, const void* x, const void* cos, const void* sin, int64_t angle_stride) {
    const hb_decoder_layer& l = *step.layer;
    Space space;
    if (!sound(l, batch, step.length)) return HB_ERROR_ARGUMENT;
    if (!lay_out(l, batch, &space)) return HB_ERROR_MEMORY;
    const int dtype = int(l.dtype);
    const int64_t hidden = batch * l.hidden, ffn = batch * l.ffn;
    const Cache cache = {static_cast<char*>(step.keys), static_cast<char*>(step.values), step.batch_stride,
                         step.head_stride, step.position_stride, step.length};

    int error = norm_rows(x, dtype, batch, l.hidden, l.hidden, l.input_norm, space.normed);
    char* const qkv[3] = {space.q, space.k, space.v};
    if (!error) error = product(l, batch, space.normed, l.hidden, l.qkv, 3, qkv);
    if (!error) error = norm_in_place(l, l.q_norm, batch * l.heads, l.head_dim, space.q);
    if (!error) error = norm_in_place(l, l.k_norm, batch * l.kv_heads, l.head_dim, space.k);
    if (error) return error;
    rotate_and_store(l, batch, space, static_cast<const char*>(cos), static_cast<const char*>(sin), angle_stride, cache);
    error = attend_all(l, batch, space, cache);
    if (!error) error = norm_in_place(l, l.out_norm, batch, l.heads * l.head_dim, space.attended);
    if (!error) error = product(l, batch, space.attended, l.heads * l.head_dim, &l.attention_out, 1, &space.normed);
    if (error) return error;
    decode().add(x, space.normed, dtype, hidden, space.sum);

    error = norm_rows(space.sum, dtype, batch, l.hidden, l.hidden, l.post_norm, space.normed);
    char* const gate_up[2] = {space.gates, space.ups};
    if (!error) error = product(l, batch, space.normed, l.hidden, l.gate_up, 2, gate_up);
    if (error) return error;
    decode().gate(space.gates, space.ups, dtype, int(l.activation), ffn, space.gates);
    error = norm_in_place(l, l.down_norm, batch, l.ffn, space.gates);
    if (!error) error = product(l, batch, space.gates, l.ffn, &l.down, 1, &space.attended);
    if (!error) decode().add(space.sum, space.attended, dtype, hidden, step.out);
    return error;
}

}  // namespace
}  // namespace hb

extern "C" int hb_decode_layers(const hb_decode_step* steps, int64_t count, int64_t batch, const void* x, const void* cos,
                                const void* sin, int64_t angle_stride) {
    for (int64_t i = 0; i < count; ++i) {
        const bool fits = steps[i].layer->hidden == steps[0].layer->hidden && steps[i].layer->dtype == steps[0].layer->dtype &&
                          steps[i].layer->head_dim == steps[0].layer->head_dim;
        const int error = fits ? hb::decode_one(steps[i], batch, i ? steps[i - 1].out : x, cos, sin, angle_stride) : int(HB_ERROR_ARGUMENT);
        if (error) return error;
    }
    return HB_OK;
}
