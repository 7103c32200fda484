// hb_decode_layers: whole decoder layers for new tokens in one call. Own.
//
// Between the products of one token a framework spends more time on calling than on computing: thirty operations and as many
// modules a layer. Here they are seven kernels in a row; the parts are those that also exist as single operations. Prompts are
// computed in parts of kPartRows tokens, whose intermediate results stay near the processor; there the gate belongs to a product.
#include "decode.h"
#include "hf_bitnet_decode.h"
#include "product.h"

namespace hb {
namespace {

constexpr int64_t kThreadPositions = 128;  // keys times heads below which a second thread does not pay
constexpr int64_t kPartRows = 512;         // tokens that are computed together; the weights are unpacked once for them

// Where the intermediate results of some tokens lie, in one piece of scratch.
struct Space {
    char *normed, *q, *k, *v, *attended, *gates, *ups, *sum;
};

bool lay_out(const hb_decoder_layer& l, int64_t rows, Space* space) {
    const int64_t size = int64_t(size_of(int(l.dtype))), wide = l.heads * l.head_dim, narrow = l.kv_heads * l.head_dim;
    const int64_t parts[8] = {l.hidden, wide, narrow, narrow, wide > l.hidden ? wide : l.hidden, l.ffn, l.ffn, l.hidden};
    char** places[8] = {&space->normed, &space->q, &space->k, &space->v, &space->attended, &space->gates, &space->ups, &space->sum};
    int64_t begins[9] = {};
    for (int i = 0; i < 8; ++i) begins[i + 1] = begins[i] + round_up(parts[i] * rows * size, 64);
    auto* all = static_cast<char*>(scratch(SLOT_LAYER, size_t(begins[8])));
    for (int i = 0; i < 8 && all; ++i) *places[i] = all + begins[i];
    return all != nullptr;
}

hb_input input_of(const hb_decoder_layer& l, const void* x, int64_t k) {
    hb_input input = {};
    input.x = x, input.x_stride = k, input.x_dtype = int32_t(l.dtype);
    input.qmin = l.qmin, input.qmax = l.qmax, input.eps = l.eps;
    return input;
}

int product(const hb_decoder_layer& l, int64_t rows, const void* x, int64_t k, const hb_weight* weights, int64_t count,
            char* const* outs) {
    const hb_input input = input_of(l, x, k);
    hb_weight placed[3];
    for (int64_t i = 0; i < count; ++i) placed[i] = weights[i], placed[i].out = outs[i], placed[i].out_stride = weights[i].n;
    return hb_linear(&input, rows, k, &l.grid, placed, count, int(l.dtype));
}

// A norm that may not be there, in place.
int norm_in_place(const hb_decoder_layer& l, const hb_norm& norm, int64_t rows, int64_t k, void* x) {
    return norm.weight ? norm_rows(x, int(l.dtype), rows, k, k, norm, x) : int(HB_OK);
}

// Tokens that are computed together: `tokens` of each of `sequences`, which have `length` positions before them. Cosines and sines
// are (sequences, tokens, head_dim), `angle_stride` between sequences; keys and values begin with the first of the sequences.
struct Part {
    int64_t sequences, tokens, length, angle_stride;
    const char *cos, *sin;
    char *keys, *values;
    int64_t batch_stride, head_stride, position_stride;

    int64_t rows() const { return sequences * tokens; }
};

void rotate_and_store(const hb_decoder_layer& l, const Part& part, const Space& space) {
    const int64_t d = l.head_dim, size = int64_t(size_of(int(l.dtype)));
    const DecodeBodies& body = decode();
    for_range(part.rows(), grain((l.heads + l.kv_heads) * d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / part.tokens, t = row % part.tokens, angles = (b * part.angle_stride + t * d) * size;
            const char *cos = part.cos + angles, *sin = part.sin + angles;
            for (int64_t h = 0; h < l.heads; ++h) {
                char* head = space.q + (row * l.heads + h) * d * size;
                body.rotate(head, int(l.dtype), d, cos, sin, head);
            }
            for (int64_t h = 0; h < l.kv_heads; ++h) {
                const int64_t from = (row * l.kv_heads + h) * d * size;
                const int64_t to = (b * part.batch_stride + h * part.head_stride + (part.length + t) * part.position_stride) * size;
                body.rotate(space.k + from, int(l.dtype), d, cos, sin, part.keys + to);
                memcpy(part.values + to, space.v + from, size_t(d * size));
            }
        }
    });
}

// One token of each sequence.
int attend_one(const hb_decoder_layer& l, const Part& part, const Space& space) {
    const int64_t d = l.head_dim, size = int64_t(size_of(int(l.dtype))), group = l.heads / l.kv_heads, length = part.length + 1;
    const DecodeBodies& body = decode();
    std::atomic<int> failed{HB_OK};
    for_range(part.sequences * l.kv_heads, kThreadPositions / (length * group) + 1, [&](int64_t begin, int64_t end) {
        auto* floats = static_cast<float*>(scratch(SLOT_ROW, size_t(group * (length + 2 * d) + 32) * 4));
        if (!floats) {
            failed = HB_ERROR_MEMORY;
            return;
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t from = (i / l.kv_heads * part.batch_stride + i % l.kv_heads * part.head_stride) * size;
            body.attend(space.q + i * group * d * size, int(l.dtype), group, d, part.keys + from, part.values + from,
                        part.position_stride, length, l.scaling, floats, space.attended + i * group * d * size);
        }
    });
    return failed;
}

// Several tokens: keys and values are laid out for the products, then blocks of queries meet them.
int attend_many(const hb_decoder_layer& l, const Part& part, const Space& space) {
    const int64_t d = l.head_dim, size = int64_t(size_of(int(l.dtype))), group = l.heads / l.kv_heads, row = l.heads * d;
    const int64_t heads = part.sequences * l.kv_heads, blocks = ceil_div(part.length + part.tokens, kAttendKeys);
    const AttendBodies& body = attention(int(l.dtype));
    const int64_t bytes = body.block_bytes(d);
    auto* laid_out = static_cast<char*>(scratch(SLOT_KEYS, size_t(heads * blocks * bytes)));
    if (!laid_out) return HB_ERROR_MEMORY;
    const auto of = [&](int64_t head) {
        const int64_t b = head / l.kv_heads, h = head % l.kv_heads, from = (b * part.batch_stride + h * part.head_stride) * size;
        const int64_t first = (b * part.tokens * row + h * group * d) * size;
        return Attention{int(l.dtype), group, d, l.scaling, part.keys + from, part.values + from, part.position_stride, part.length,
                         part.tokens, space.q + first, space.attended + first, row};
    };
    for_range(heads * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body.lay_out(of(i / blocks), i % blocks * kAttendKeys, laid_out + i * bytes);
    });
    std::atomic<int> failed{HB_OK};
    const int64_t pieces = ceil_div(part.tokens, kAttendRows), tasks = heads * pieces;
    take_in_order(tasks, [&](bool begins) { begins ? body.begin() : body.end(); }, [&](int64_t task) {
        void* own = scratch(SLOT_ROW, size_t(body.space_bytes(d)));
        const int64_t head = task % heads, piece = pieces - 1 - task / heads;  // the last ones, which see most, first
        if (own)
            body.attend(of(head), laid_out + head * blocks * bytes, piece * kAttendRows, own);
        else
            failed = HB_ERROR_MEMORY;
    });
    return failed;
}

void add(const hb_decoder_layer& l, int64_t rows, const char* a, const char* b, char* out) {
    const int dtype = int(l.dtype);
    for_range(rows * l.hidden, kThreadElements, [&](int64_t begin, int64_t end) {
        decode().add(at(a, dtype, begin), at(b, dtype, begin), dtype, end - begin, at(out, dtype, begin));
    });
}

// The first half of the MLP, from space.normed to space.gates.
int gate(const hb_decoder_layer& l, int64_t rows, const Space& space) {
    const int dtype = int(l.dtype);
    const Gate meet = {decode().gate, int(l.activation), space.gates, l.ffn};
    int error = linear_gate(input_of(l, space.normed, l.hidden), rows, l.hidden, l.grid, l.gate_up, dtype, meet);
    if (error != HB_ERROR_UNSUPPORTED) return error;
    char* const outs[2] = {space.gates, space.ups};
    error = product(l, rows, space.normed, l.hidden, l.gate_up, 2, outs);
    if (error) return error;
    for_range(rows * l.ffn, kThreadElements, [&](int64_t begin, int64_t end) {
        char* from = at(space.gates, dtype, begin);
        decode().gate(from, at(space.ups, dtype, begin), dtype, int(l.activation), end - begin, from);
    });
    return HB_OK;
}

bool sound(const hb_decoder_layer& l, int64_t batch, int64_t tokens, int64_t length) {
    return is_float(l.dtype) && batch >= 1 && tokens >= 1 && length >= 0 && l.hidden >= 1 && l.kv_heads >= 1 &&
           l.heads % l.kv_heads == 0 && l.head_dim >= 2 && l.head_dim % 2 == 0 && l.head_dim <= l.hidden && l.ffn >= 1 &&
           l.input_norm.weight && l.post_norm.weight && (l.activation == HB_SILU || l.activation == HB_RELU2);
}

int decode_part(const hb_decoder_layer& l, const Part& part, const char* x, char* out) {
    const int dtype = int(l.dtype);
    const int64_t rows = part.rows();
    Space space;
    if (!lay_out(l, rows, &space)) return HB_ERROR_MEMORY;
    int error = norm_rows(x, dtype, rows, l.hidden, l.hidden, l.input_norm, space.normed);
    char* const qkv[3] = {space.q, space.k, space.v};
    if (!error) error = product(l, rows, space.normed, l.hidden, l.qkv, 3, qkv);
    if (!error) error = norm_in_place(l, l.q_norm, rows * l.heads, l.head_dim, space.q);
    if (!error) error = norm_in_place(l, l.k_norm, rows * l.kv_heads, l.head_dim, space.k);
    if (error) return error;
    rotate_and_store(l, part, space);
    error = part.tokens == 1 ? attend_one(l, part, space) : attend_many(l, part, space);
    if (!error) error = norm_in_place(l, l.out_norm, rows, l.heads * l.head_dim, space.attended);
    if (!error) error = product(l, rows, space.attended, l.heads * l.head_dim, &l.attention_out, 1, &space.normed);
    if (error) return error;
    add(l, rows, x, space.normed, space.sum);

    error = norm_rows(space.sum, dtype, rows, l.hidden, l.hidden, l.post_norm, space.normed);
    if (!error) error = gate(l, rows, space);
    if (!error) error = norm_in_place(l, l.down_norm, rows, l.ffn, space.gates);
    if (!error) error = product(l, rows, space.gates, l.ffn, &l.down, 1, &space.attended);
    if (!error) add(l, rows, space.sum, space.attended, out);
    return error;
}

int decode_one(const hb_decode_step& step, int64_t batch, int64_t tokens, const char* x, const char* cos, const char* sin,
               int64_t angle_stride) {
    const hb_decoder_layer& l = *step.layer;
    if (!sound(l, batch, tokens, step.length)) return HB_ERROR_ARGUMENT;
    const int64_t size = int64_t(size_of(int(l.dtype))), together = tokens < kPartRows ? kPartRows / tokens : 1;
    for (int64_t b = 0; b < batch; b += together)
        for (int64_t t = 0; t < tokens; t += kPartRows) {
            const int64_t angles = (b * angle_stride + t * l.head_dim) * size, row = (b * tokens + t) * l.hidden * size;
            const int64_t first = b * step.batch_stride * size;
            const Part part = {smaller(together, batch - b), smaller(kPartRows, tokens - t), step.length + t, angle_stride,
                               cos + angles, sin + angles, static_cast<char*>(step.keys) + first,
                               static_cast<char*>(step.values) + first, step.batch_stride, step.head_stride, step.position_stride};
            if (const int error = decode_part(l, part, x + row, static_cast<char*>(step.out) + row)) return error;
        }
    return HB_OK;
}

}  // namespace
}  // namespace hb

extern "C" int hb_decode_layers(const hb_decode_step* steps, int64_t count, int64_t batch, int64_t tokens, const void* x,
                                const void* cos, const void* sin, int64_t angle_stride) {
    for (int64_t i = 0; i < count; ++i) {
        const bool fits = steps[i].layer->hidden == steps[0].layer->hidden && steps[i].layer->dtype == steps[0].layer->dtype &&
                          steps[i].layer->head_dim == steps[0].layer->head_dim;
        const auto* from = static_cast<const char*>(i ? steps[i - 1].out : x);
        const int error = fits ? hb::decode_one(steps[i], batch, tokens, from, static_cast<const char*>(cos),
                                                static_cast<const char*>(sin), angle_stride)
                               : int(HB_ERROR_ARGUMENT);
        if (error) return error;
    }
    return HB_OK;
}
