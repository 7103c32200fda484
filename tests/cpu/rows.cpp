// Random calls of what works on rows of activations and weights: quantizing, scaling, magnitudes, packing. Own.
#include "fuzz.h"

namespace fuzz {
namespace {

// rows and their length; now and then longer than the pieces that threads get
struct Shape {
    int64_t rows, k;
};
Shape random_shape(Random& random) {
    if (random.one_in(40)) return {random.between(1, 2), random.between(32760, 70000)};
    return {random.size(40), random.size(random.one_in(4) ? 5000 : 300)};
}

float clamp(float value, float lowest, float highest) { return value < lowest ? lowest : value > highest ? highest : value; }

// hb_quantize_weight of one number; NaN stays NaN
float code_of(double value, float scale, float zero_point, float qmin, float qmax) {
    float position = float(value) * (1.0f / scale);
    if (zero_point != 0) position += zero_point;
    return isnan(position) ? position : clamp(nearbyintf(position), qmin, qmax);
}

void fill_scales(Random& random, Array& scales) {
    for (int64_t i = 0; i < scales.count(); ++i) scales.set(i, random.one_in(30) ? 0.0 : random.uniform(0.02, 1));
}

}  // namespace

void fuzz_quantize_rows(Random& random) {
    const auto [rows, k] = random_shape(random);
    const int64_t stride = k + random.between(0, 1) * random.between(0, 9);
    const bool normed = random.one_in(2);
    Array x(random, random_float_dtype(random), rows ? (rows - 1) * stride + k : 0),
        norm(random, random_float_dtype(random), k);
    Array codes(random, HB_I8, rows * k), scale(random, HB_F32, rows);
    const Limits& limits = random.pick(kRowLimits);
    describe("hb_%squantize_rows rows=%lld k=%lld, dtype %d norm %d", normed ? "norm_" : "", ll(rows), ll(k), x.dtype(),
             norm.dtype());
    for (int64_t i = 0; i < rows; ++i) fill_floats(random, x, i * stride, i * stride + k);
    for (int64_t l = 0; l < k; ++l) norm.set(l, random.uniform(0.5, 2));
    if (normed)
        expect_ok(hb_norm_quantize_rows(x.data(), x.dtype(), rows, k, stride, norm.data(), norm.dtype(), 1e-6f, limits.qmin,
                                        limits.qmax, 1e-5f, codes.as<int8_t>(), scale.as<float>()));
    else
        expect_ok(hb_quantize_rows(x.data(), x.dtype(), rows, k, stride, limits.qmin, limits.qmax, 1e-5f, codes.as<int8_t>(),
                                   scale.as<float>()));
    for (int64_t i = 0; i < rows; ++i) {
        const Row row = quantized_row(x, i * stride, k, normed ? &norm : nullptr, 1e-6f, limits.qmin, limits.qmax, 1e-5f);
        scale.expect(i, row.scale);
        for (int64_t l = 0; l < k; ++l) codes.expect(i * k + l, double(row.codes[size_t(l)]));
    }
}

void fuzz_scale_rows(Random& random) {
    const auto [rows, k] = random_shape(random);
    const int64_t stride = k + random.between(0, 1) * random.between(0, 9);
    Array x(random, random.one_in(3) ? int(HB_I8) : random_float_dtype(random), rows ? (rows - 1) * stride + k : 0);
    Array scale(random, HB_F32, rows), out(random, random_float_dtype(random), rows * k);
    describe("hb_scale_rows rows=%lld k=%lld, %d to %d", ll(rows), ll(k), x.dtype(), out.dtype());
    for (int64_t i = 0; i < rows; ++i)
        x.dtype() == HB_I8 ? fill_codes(random, x, i * stride, i * stride + k)
                           : fill_floats(random, x, i * stride, i * stride + k);
    fill_scales(random, scale);
    expect_ok(hb_scale_rows(x.data(), x.dtype(), rows, k, stride, scale.as<float>(), out.data(), out.dtype()));
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t l = 0; l < k; ++l)
            out.expect(i * k + l, nearest(out.dtype(), float(x.get(i * stride + l)) * float(scale.get(i))));
}

void fuzz_magnitudes(Random& random) {
    const auto [rows, n] = random_shape(random);
    Array w(random, random.one_in(4) ? int(HB_I8) : random_float_dtype(random), rows * n);
    Array sums(random, kFloat64, rows), maxima(random, HB_F32, rows);
    describe("hb_abs_sums, hb_abs_maxima rows=%lld n=%lld, dtype %d", ll(rows), ll(n), w.dtype());
    for (int64_t i = 0; i < rows; ++i)
        w.dtype() == HB_I8 ? fill_codes(random, w, i * n, i * n + n) : fill_floats(random, w, i * n, i * n + n);
    expect_ok(hb_abs_sums(w.data(), w.dtype(), rows, n, sums.as<double>()));
    expect_ok(hb_abs_maxima(w.data(), w.dtype(), rows, n, maxima.as<float>()));
    for (int64_t i = 0; i < rows; ++i) {
        double sum = 0, largest = 0;
        for (int64_t l = 0; l < n; ++l) {
            const double magnitude = fabs(w.get(i * n + l));
            sum += magnitude;
            if (!(magnitude <= largest)) largest = isnan(largest) ? largest : magnitude;
        }
        sums.expect_near(i, sum, isfinite(sum) ? sum * 1e-12 : 0);
        maxima.expect(i, largest);
    }
}

void fuzz_quantize_weight(Random& random) {
    const auto [rows, n] = random_shape(random);
    Array w(random, random_float_dtype(random), rows * n), scale(random, HB_F32, rows);
    Array out(random, random.one_in(2) ? int(HB_I8) : random_float_dtype(random), rows * n);
    const bool sign = random.one_in(3);
    const float zero_point = random.one_in(2) ? 0.0f : random.one_in(2) ? -0.5f : 2.0f, qmin = float(-random.between(0, 128));
    const float qmax = float(random.between(0, 127));
    describe("hb_quantize_%s rows=%lld n=%lld, %d to %d", sign ? "sign" : "weight", ll(rows), ll(n), w.dtype(), out.dtype());
    for (int64_t i = 0; i < rows; ++i) fill_floats(random, w, i * n, i * n + n);
    fill_scales(random, scale);
    if (sign)
        expect_ok(hb_quantize_sign(w.data(), w.dtype(), rows, n, scale.as<float>(), out.data(), out.dtype()));
    else
        expect_ok(hb_quantize_weight(w.data(), w.dtype(), rows, n, scale.as<float>(), zero_point, qmin, qmax, out.data(),
                                     out.dtype()));
    for (int64_t i = 0; i < rows * n; ++i) {
        const float of_row = float(scale.get(i / n)), code = code_of(w.get(i), of_row, zero_point, qmin, qmax);
        if (sign)
            out.expect(i, w.get(i) >= of_row ? 1 : -1);
        else
            out.expect(i, out.dtype() == HB_I8 && isnan(code) ? 0 : double(code));
    }
}

void fuzz_quantize_pack(Random& random) {
    const auto [n, k] = random_shape(random);
    const bool sign = random.one_in(3);
    const Layout layout = sign ? Layout{1, -1, 2} : random_layout(random);
    int64_t groups = random.between(1, 6);
    while (k % groups) --groups;
    const int64_t scale_rows = random.one_in(2) ? 1 : n, bytes = (k * layout.bits + 7) / 8;
    Array w(random, random_float_dtype(random), n * k), scale(random, HB_F32, scale_rows * groups),
        packed(random, HB_I8, n * bytes);
    const float highest = float(layout.lowest + ((1 << layout.bits) - 1) * layout.step),
                zero_point = random.one_in(2) ? 0.0f : -0.5f;
    const float qmin = float(layout.lowest), qmax = highest > 127 ? 127 : highest;
    describe("hb_%s_pack n=%lld k=%lld groups %lld, dtype %d, %d bits from %d by %d", sign ? "sign" : "quantize", ll(n), ll(k),
             ll(groups), w.dtype(), layout.bits, layout.lowest, layout.step);
    for (int64_t i = 0; i < n; ++i) fill_floats(random, w, i * k, i * k + k);
    fill_scales(random, scale);
    auto* to = packed.as<uint8_t>();
    if (sign)
        expect_ok(hb_sign_pack(w.data(), w.dtype(), n, k, scale.as<float>(), scale_rows, groups, to));
    else
        expect_ok(hb_quantize_pack(w.data(), w.dtype(), n, k, scale.as<float>(), scale_rows, groups, zero_point, qmin, qmax,
                                   layout.bits, layout.lowest, layout.step, to));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t l = 0; l < bytes * 8 / layout.bits; ++l) {
            const float of_group = l < k ? float(scale.get((scale_rows == 1 ? 0 : i * groups) + l / (k / groups))) : 0;
            float code = l >= k ? qmin
                         : sign ? (w.get(i * k + l) >= of_group ? 1 : -1)
                                : code_of(w.get(i * k + l), of_group, zero_point, qmin, qmax);
            const int expected = (int(isnan(code) ? 0 : code) - layout.lowest) / layout.step,
                      found = level_at(to + i * bytes, l, layout.bits);
            if (found != expected) fail("level (%lld, %lld) is %d, not %d", ll(i), ll(l), found, expected);
        }
}

void fuzz_pack(Random& random) {
    const auto [n, k] = random_shape(random);
    const Layout layout = random_layout(random);
    const int64_t bytes = (k * layout.bits + 7) / 8, levels = 1 << layout.bits;
    Array codes(random, HB_I8, n * k), packed(random, HB_I8, n * bytes), back(random, HB_I8, n * k);
    describe("hb_pack, hb_unpack n=%lld k=%lld, %d bits from %d by %d", ll(n), ll(k), layout.bits, layout.lowest, layout.step);
    const int64_t most = layout.lowest + (levels - 1) * layout.step > 127 ? (127 - layout.lowest) / layout.step : levels - 1;
    for (int64_t i = 0; i < n * k; ++i) codes.set(i, double(random.between(0, most) * layout.step + layout.lowest));
    expect_ok(hb_pack(codes.as<int8_t>(), n, k, layout.bits, layout.lowest, layout.step, packed.as<uint8_t>()));
    expect_ok(hb_unpack(packed.as<uint8_t>(), n, k, layout.bits, layout.lowest, layout.step, back.as<int8_t>()));
    for (int64_t i = 0; i < n * k; ++i) {
        const int level = level_at(packed.as<uint8_t>() + i / k * bytes, i % k, layout.bits);
        if (level * layout.step + layout.lowest != int(codes.get(i))) fail("code %lld became level %d", ll(i), level);
        back.expect(i, codes.get(i));
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t l = k; l < bytes * 8 / layout.bits; ++l)
            if (level_at(packed.as<uint8_t>() + i * bytes, l, layout.bits)) fail("padding of row %lld is not 0", ll(i));
}

void fuzz_trits(Random& random) {
    const auto [n, k] = random_shape(random);
    const int64_t bytes = (k + 4) / 5;
    Array codes(random, HB_I8, n * k), packed(random, HB_I8, n * bytes), strange(random, HB_I8, n * bytes),
        back(random, HB_I8, n * k);
    describe("hb_pack_trits, hb_unpack_trits n=%lld k=%lld", ll(n), ll(k));
    for (int64_t i = 0; i < n * k; ++i) codes.set(i, double(random.between(-1, 1)));
    expect_ok(hb_pack_trits(codes.as<int8_t>(), n, k, packed.as<uint8_t>()));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t b = 0; b < bytes; ++b) {
            int byte = 0;
            for (int64_t l = 5 * b + 4; l >= 5 * b; --l) byte = 3 * byte + (l < k ? int(codes.get(i * k + l)) + 1 : 0);
            packed.expect(i * bytes + b, double(int8_t(byte)));
        }
    fill_codes(random, strange, 0, n * bytes);  // any byte can be read
    expect_ok(hb_unpack_trits(strange.as<uint8_t>(), n, k, back.as<int8_t>()));
    static const int powers[] = {1, 3, 9, 27, 81};
    for (int64_t i = 0; i < n * k; ++i)
        back.expect(i, strange.as<uint8_t>()[i / k * bytes + i % k / 5] / powers[i % k % 5] % 3 - 1);
}

}  // namespace fuzz
