// Random calls of hf_bitnet_decode.h (RMS norm, rotary embedding), and calls of everything with arguments without sense. Own.
#include "hf_bitnet_decode.h"
#include "fuzz.h"

namespace fuzz {

void fuzz_rms_norm(Random& random) {
    const int64_t rows = random.size(40), k = random.size(700), stride = k + random.between(0, 1) * random.between(0, 9);
    const int dtype = random_float_dtype(random);
    Array x(random, dtype, rows ? (rows - 1) * stride + k : 0), weight(random, dtype, k), out(random, dtype, rows * k);
    describe("hb_rms_norm rows=%lld k=%lld, dtype %d", ll(rows), ll(k), dtype);
    for (int64_t i = 0; i < rows; ++i) fill_floats(random, x, i * stride, i * stride + k);
    for (int64_t l = 0; l < k; ++l) weight.set(l, random.uniform(-2, 2));
    expect_ok(hb_rms_norm(x.data(), dtype, rows, k, stride, weight.data(), 1e-6f, out.data()));
    for (int64_t i = 0; i < rows; ++i) {
        double squares = 0;
        for (int64_t l = 0; l < k; ++l) squares += x.get(i * stride + l) * x.get(i * stride + l);
        const double inverse = 1 / sqrt(squares / double(k) + double(1e-6f));
        for (int64_t l = 0; l < k; ++l) {
            // the norm is rounded before the gain: where a tie is near, to either neighbour
            const double normed = x.get(i * stride + l) * inverse, off = fabs(normed) * 1e-5, gain = weight.get(l);
            const double a = nearest(dtype, normed - off) * gain, b = nearest(dtype, normed + off) * gain;
            out.expect_near(i * k + l, (a + b) / 2, fabs(a - b) / 2 + fabs(a) * 1e-6);
        }
    }
}

namespace {

// x or out of one tensor of heads: (batch, heads, tokens, d) in one of two orders, with gaps.
struct Strides {
    int64_t batch, head, token, count;

    Strides(Random& random, int64_t b, int64_t h, int64_t t, int64_t d) {
        const int64_t gap = random.between(0, 1) * random.between(0, 5);
        if (random.one_in(2))
            token = d + gap, head = t * token;
        else
            head = d, token = h * head + gap;
        batch = (h - 1) * head + (t - 1) * token + d + gap;
        count = b && h && t && d ? (b - 1) * batch + (h - 1) * head + (t - 1) * token + d : 0;
    }
    int64_t at(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * token; }
};

// One element, every product and sum rounded.
double rotated(int dtype, double x, double turned, double cos, double sin) {
    return nearest(dtype, nearest(dtype, float(x) * float(cos)) + nearest(dtype, float(turned) * float(sin)));
}

}  // namespace

void fuzz_rotate(Random& random) {
    const int64_t batch = random.between(1, 3), tokens = random.size(9), d = 2 * random.size(70), heads = random.between(1, 5);
    const int dtype = random_float_dtype(random);
    const bool shared = random.one_in(2);
    describe("hb_rotate batch=%lld tokens=%lld d=%lld heads=%lld, dtype %d", ll(batch), ll(tokens), ll(d), ll(heads), dtype);
    const Strides from(random, batch, heads, tokens, d), to(random, batch, heads, tokens, d),
        angles(random, shared ? 1 : batch, 1, tokens, d);
    Array x(random, dtype, from.count), out(random, dtype, to.count), cos(random, dtype, angles.count),
        sin(random, dtype, angles.count);
    for (int64_t i = 0; i < from.count; ++i) x.set(i, random.uniform(-3, 3));
    for (int64_t i = 0; i < angles.count; ++i) cos.set(i, random.uniform(-1, 1)), sin.set(i, random.uniform(-1, 1));
    const hb_heads given = {x.data(), out.data(), heads, from.batch, from.head, from.token, to.batch, to.head, to.token};
    const int64_t angle_batch = shared ? 0 : angles.batch;
    expect_ok(hb_rotate(&given, 1, dtype, batch, tokens, d, cos.data(), sin.data(), angle_batch, angles.token));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t i = 0; i < d; ++i) {
                    const int64_t angle = b * angle_batch + t * angles.token + i, other = from.at(b, h, t) + (i + d / 2) % d;
                    const double turned = i < d / 2 ? -x.get(other) : x.get(other);
                    out.expect(to.at(b, h, t) + i,
                               rotated(dtype, x.get(from.at(b, h, t) + i), turned, cos.get(angle), sin.get(angle)));
                }
}

void fuzz_errors(Random& random) {
    describe("arguments without sense");
    float one = 1;
    int8_t code = 0;
    const hb_input input = {&code, 1, nullptr, nullptr, nullptr, HB_I8, 0, 0, 0, 0, 0};
    const hb_weight weight = {&code, 1, 1, &one, 1, 1, nullptr, 0, &one, 1};
    hb_input wrong_input = input;
    hb_grid grid = {8, 0, 0, 1, 0};
    hb_weight wrong = weight;
    int64_t m = 1, k = 1, count = 1;
    int out_dtype = HB_F32;
    switch (random.between(0, 11)) {
        case 0: m = -1; break;
        case 1: k = -1; break;
        case 2: count = 0; break;
        case 3: grid.bits = 3; break;
        case 4: grid.bits = 2; break;  // unpacked codes have 8
        case 5: wrong.groups = 2; break;
        case 6: wrong.scale_rows = 2; break;
        case 7: wrong.n = -1; break;
        case 8: wrong_input.x_dtype = 9; break;
        case 9: out_dtype = HB_I8; break;
        case 10: wrong.bias = &one, wrong.bias_dtype = 7; break;
        default: wrong_input.x_dtype = HB_F32, wrong_input.scale = &one;
    }
    if (hb_linear(&wrong_input, m, k, &grid, &wrong, count, out_dtype) != HB_ERROR_ARGUMENT) fail("hb_linear took them");
    const auto fixed = [&](int a_dtype, int64_t columns, int dtype) {
        return hb_fixed_matmul(&one, a_dtype, 1, 1, nullptr, 1, 1, &code, 1, columns, 0, 1, &one, dtype, 1);
    };
    if (!fixed(HB_I8, 1, HB_F32) || !fixed(HB_F32, -1, HB_F32) || !fixed(HB_F32, 1, 8)) fail("hb_fixed_matmul took them");
    uint8_t byte = 0;
    if (!hb_pack(&code, 1, 1, 3, 0, 1, &byte) || !hb_unpack(&byte, -1, 1, 2, 0, 1, &code)) fail("hb_pack took them");
    if (!hb_quantize_rows(&code, HB_I8, 1, 1, 1, -128, 127, 1e-5f, &code, &one)) fail("hb_quantize_rows took int8");
    if (!hb_rotate(nullptr, 0, HB_F32, 1, 1, 3, &one, &one, 0, 0)) fail("hb_rotate took an odd size");
    if (hb_set_level(HB_LEVELS) != HB_ERROR_UNSUPPORTED || hb_level_name(HB_LEVELS)) fail("there is a level beyond the last");
}

}  // namespace fuzz
