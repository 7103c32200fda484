// Random calls of hb_decode_layers, against the same layer made of the library's single operations and a plain attention. Own.
#include "hf_bitnet_decode.h"
#include "fuzz.h"

namespace fuzz {
namespace {

// A packed ternary matrix of a layer, with bytes at random, one scale or one a channel.
struct Matrix {
    Array bytes, scale, bias;
    hb_weight weight;

    Matrix(Random& random, int64_t n, int64_t k, bool biased, int dtype)
        : bytes(random, HB_I8, n * ((k + 3) / 4)), scale(random, HB_F32, random.one_in(3) ? n : 1), bias(random, dtype, biased ? n : 0) {
        for (int64_t i = 0; i < bytes.count(); ++i) bytes.set(i, double(random.between(-128, 127)));
        for (int64_t i = 0; i < bias.count(); ++i) bias.set(i, random.uniform(-1, 1));
        for (int64_t i = 0; i < scale.count(); ++i) scale.set(i, random.uniform(0.5, 1.5) / sqrt(double(k)));
        weight = {bytes.data(), n, (k + 3) / 4, scale.as<float>(), scale.count(), 1, biased ? bias.data() : nullptr, dtype, nullptr, 0};
    }
};

void multiply(const hb_decoder_layer& l, const Array& x, int64_t k, const hb_weight& weight, Array& out, int64_t batch) {
    const hb_input input = {x.data(), k, nullptr, nullptr, nullptr, int32_t(l.dtype), 0, 0, l.qmin, l.qmax, l.eps};
    hb_weight placed = weight;
    placed.out = out.data(), placed.out_stride = weight.n;
    expect_ok(hb_linear(&input, batch, k, &l.grid, &placed, 1, int(l.dtype)));
}

}  // namespace

void fuzz_decode_layer(Random& random) {
    // float32 only: in the others a rounding that goes the other way moves a code of the next product
    const int dtype = HB_F32;
    const int64_t batch = random.between(1, 10), d = 2 * random.between(1, 20), kv = random.between(1, 3);
    const int64_t heads = kv * random.between(1, 4), hidden = d + random.between(0, 90), ffn = random.between(1, 150);
    const int64_t length = random.between(0, 40), places = length + 1 + random.between(0, 3), wide = heads * d, narrow = kv * d;
    describe("hb_decode_layers batch=%lld hidden=%lld heads=%lld/%lld of %lld ffn=%lld length=%lld", ll(batch), ll(hidden), ll(heads),
             ll(kv), ll(d), ll(ffn), ll(length));
    const bool biased = random.one_in(2);
    Matrix q(random, wide, hidden, biased, dtype), k(random, narrow, hidden, biased, dtype), v(random, narrow, hidden, biased, dtype);
    Matrix o(random, hidden, wide, biased, dtype), gate(random, ffn, hidden, biased, dtype), up(random, ffn, hidden, biased, dtype);
    Matrix down(random, hidden, ffn, biased, dtype);
    Array norm(random, dtype, hidden), post(random, dtype, hidden), x(random, dtype, batch * hidden), out(random, dtype, batch * hidden);
    Array cos(random, dtype, d), sin(random, dtype, d);
    Array keys(random, dtype, batch * kv * places * d), values(random, dtype, batch * kv * places * d);
    for (Array* each : {&norm, &post, &x, &cos, &sin, &keys, &values})
        for (int64_t i = 0; i < each->count(); ++i) each->set(i, random.uniform(-1, 1));
    const bool more = random.one_in(2), relu2 = random.one_in(2);
    Array of_q(random, dtype, d), of_k(random, dtype, d), of_out(random, dtype, wide), of_down(random, dtype, ffn);
    for (Array* each : {&of_q, &of_k, &of_out, &of_down})
        for (int64_t i = 0; i < each->count(); ++i) each->set(i, random.uniform(-1, 1));
    const auto norm_of = [&](Array& weight, int32_t once) { return more ? hb_norm{weight.data(), 1e-3f, once} : hb_norm{}; };
    const auto apply = [&](Array& weight, int64_t rows, int64_t size, Array& values) {
        if (more) expect_ok(hb_rms_norm(values.data(), dtype, rows, size, size, weight.data(), 1e-3f, values.data()));
    };
    hb_decoder_layer l = {dtype, hidden, heads, kv, d, ffn, {norm.data(), 1e-5f, 0}, {post.data(), 1e-6f, 0},
                          norm_of(of_q, 0), norm_of(of_k, 1), norm_of(of_out, 0), norm_of(of_down, 1),
                          float(1 / sqrt(double(d))), -128, 127, 1e-5f, {2, 1, -1, 1, 0},
                          relu2 ? HB_RELU2 : HB_SILU, {q.weight, k.weight, v.weight}, o.weight, {gate.weight, up.weight}, down.weight};
    const int64_t head_stride = places * d, batch_stride = kv * head_stride;
    const hb_decode_step step = {&l, keys.data(), values.data(), batch_stride, head_stride, d, length, out.data()};
    expect_ok(hb_decode_layers(&step, 1, batch, 1, x.data(), cos.data(), sin.data(), 0));

    Array normed(random, dtype, batch * hidden), queries(random, dtype, batch * wide), turned(random, dtype, batch * wide);
    Array attended(random, dtype, batch * wide), sum(random, dtype, batch * hidden), part(random, dtype, batch * hidden);
    Array gates(random, dtype, batch * ffn), ups(random, dtype, batch * ffn);
    expect_ok(hb_rms_norm(x.data(), dtype, batch, hidden, hidden, norm.data(), 1e-5f, normed.data()));
    multiply(l, normed, hidden, q.weight, queries, batch);
    apply(of_q, batch * heads, d, queries);
    const hb_heads given = {queries.data(), turned.data(), heads, wide, d, wide, wide, d, wide};
    expect_ok(hb_rotate(&given, 1, dtype, batch, 1, d, cos.data(), sin.data(), 0, d));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t from = b * batch_stride + h / (heads / kv) * head_stride, at = b * wide + h * d;
            std::vector<double> weights(size_t(length) + 1), sums(size_t(d), 0.0);
            double most = -INFINITY, total = 0;
            for (int64_t s = 0; s <= length; ++s) {
                double score = 0;
                for (int64_t i = 0; i < d; ++i) score += turned.get(at + i) * keys.get(from + s * d + i);
                weights[size_t(s)] = score * double(l.scaling), most = fmax(most, weights[size_t(s)]);
            }
            for (double& weight : weights) weight = exp(weight - most), total += weight;
            for (int64_t s = 0; s <= length; ++s)
                for (int64_t i = 0; i < d; ++i) sums[size_t(i)] += weights[size_t(s)] / total * values.get(from + s * d + i);
            for (int64_t i = 0; i < d; ++i) attended.set(at + i, sums[size_t(i)]);
        }
    apply(of_out, batch, wide, attended);
    multiply(l, attended, wide, o.weight, part, batch);
    for (int64_t i = 0; i < sum.count(); ++i) sum.set(i, x.get(i) + part.get(i));
    expect_ok(hb_rms_norm(sum.data(), dtype, batch, hidden, hidden, post.data(), 1e-6f, normed.data()));
    multiply(l, normed, hidden, gate.weight, gates, batch);
    multiply(l, normed, hidden, up.weight, ups, batch);
    for (int64_t i = 0; i < gates.count(); ++i) {
        const double gate_of = gates.get(i), positive = fmax(gate_of, 0);
        gates.set(i, (relu2 ? positive * positive : gate_of / (1 + exp(-gate_of))) * ups.get(i));
    }
    apply(of_down, batch, ffn, gates);
    multiply(l, gates, ffn, down.weight, part, batch);
    // a tie of the quantizers may fall to either side: one step of a code of each of two products
    double largest = 0;
    for (int64_t i = 0; i < out.count(); ++i) largest = fmax(largest, fabs(sum.get(i) + part.get(i)));
    for (int64_t i = 0; i < out.count(); ++i) out.expect_near(i, sum.get(i) + part.get(i), 0.03 * largest);
}

// Several tokens at once against one after another: what they write to the buffers is the same, what they see nearly.
void fuzz_decode_tokens(Random& random) {
    const int dtype = random.one_in(3) ? HB_F16 : random.one_in(2) ? HB_BF16 : HB_F32;
    const int64_t size = dtype == HB_F32 ? 4 : 2, d = 2 * random.between(1, 40), kv = random.between(1, 3);
    // several panels of a gate, and its results in whole lines of the cache
    const int64_t heads = kv * random.between(1, 3), ffn = random.one_in(4) ? 32 * random.between(4, 12) : random.between(1, 60);
    const int64_t hidden = d + (random.one_in(12) ? random.between(500, 4500) : random.between(0, 40));  // sums in several parts
    const int64_t tokens = random.one_in(40) ? random.between(500, 600) : random.between(2, 70), batch = random.between(1, 3);
    const int64_t length = random.one_in(3) ? 0 : random.between(0, 300), places = length + tokens + random.between(0, 3);
    describe("hb_decode_layers batch=%lld tokens=%lld hidden=%lld heads=%lld/%lld of %lld ffn=%lld length=%lld dtype=%d", ll(batch),
             ll(tokens), ll(hidden), ll(heads), ll(kv), ll(d), ll(ffn), ll(length), dtype);
    const int64_t wide = heads * d, narrow = kv * d;
    Matrix q(random, wide, hidden, false, dtype), k(random, narrow, hidden, false, dtype), v(random, narrow, hidden, false, dtype);
    Matrix o(random, hidden, wide, false, dtype), gate(random, ffn, hidden, false, dtype), up(random, ffn, hidden, false, dtype);
    Matrix down(random, hidden, ffn, false, dtype);
    const int64_t angles = random.one_in(2) ? 1 : batch;
    Array norm(random, dtype, hidden), post(random, dtype, hidden), x(random, dtype, batch * tokens * hidden);
    Array cos(random, dtype, angles * tokens * d), sin(random, dtype, angles * tokens * d), out(random, dtype, batch * tokens * hidden);
    Array keys(random, dtype, batch * kv * places * d), values(random, dtype, batch * kv * places * d);
    for (Array* each : {&norm, &post, &x, &cos, &sin, &keys, &values})
        for (int64_t i = 0; i < each->count(); ++i) each->set(i, random.uniform(-1, 1));
    Array other_keys(random, dtype, keys.count()), other_values(random, dtype, keys.count());
    for (int64_t i = 0; i < keys.count(); ++i) other_keys.set(i, keys.get(i)), other_values.set(i, values.get(i));
    hb_decoder_layer l = {dtype, hidden, heads, kv, d, ffn, {norm.data(), 1e-5f, 0}, {post.data(), 1e-6f, 0}, {}, {}, {}, {},
                          float(1 / sqrt(double(d))), -128, 127, 1e-5f, {2, 1, -1, 1, 0}, HB_SILU,
                          {q.weight, k.weight, v.weight}, o.weight, {gate.weight, up.weight}, down.weight};
    const int64_t head_stride = places * d, batch_stride = kv * head_stride;
    const hb_decode_step step = {&l, keys.data(), values.data(), batch_stride, head_stride, d, length, out.data()};
    expect_ok(hb_decode_layers(&step, 1, batch, tokens, x.data(), cos.data(), sin.data(), angles == 1 ? 0 : tokens * d));

    Array one(random, dtype, hidden);
    double largest = 0, error = 0;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t t = 0; t < tokens; ++t) {
            const auto of = [&](Array& array, int64_t element) { return static_cast<char*>(array.data()) + element * size; };
            const int64_t row = (b * tokens + t) * hidden, angle = (angles == 1 ? t : b * tokens + t) * d;
            const hb_decode_step next = {&l, of(other_keys, b * batch_stride), of(other_values, b * batch_stride), batch_stride,
                                         head_stride, d, length + t, one.data()};
            expect_ok(hb_decode_layers(&next, 1, 1, 1, of(x, row), of(cos, angle), of(sin, angle), 0));
            for (int64_t i = 0; i < hidden; ++i) {
                largest = fmax(largest, fabs(one.get(i)));
                error = fmax(error, fabs(one.get(i) - out.get(row + i)));
            }
        }
    for (int64_t i = 0; i < keys.count(); ++i) keys.expect_near(i, other_keys.get(i), 0), values.expect_near(i, other_values.get(i), 0);
    Array furthest(random, HB_F32, 1);
    furthest.set(0, error / largest);
    furthest.expect_near(0, 0, dtype == HB_F32 ? 0.04 : 0.1);
}

}  // namespace fuzz
