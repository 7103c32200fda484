// Random calls of hb_linear: every way to store weights and to give the input, several weights at once. Own.
#include "fuzz.h"

// linear_call.cpp: the same call with all its arguments in one block; experts_call.cpp
extern "C" HB_API int hb_linear_call(const void* block);
extern "C" HB_API int hb_experts_call(const void* block);

namespace fuzz {
namespace {

struct Case {
    bool wide;  // many panels of weights meet rows of x that are longer than a cache holds
    int64_t m, k, groups, x_stride;
    hb_grid grid;
    bool exact;  // nothing is rounded: no scales, no zero points, float32 sums below 2^24
    bool floats, normed, with_scale, with_zero;
    int out_dtype;
    float qmin, qmax, eps;
};

Case random_case(Random& random) {
    Case c = {};
    c.m = random.one_in(3) ? random.size(70) : random.between(0, 9);
    c.k = random.size(random.one_in(5) ? 2300 : 300);
    c.groups = 1;
    c.wide = random.one_in(16);
    if (c.wide) {
        c.m = random.between(9, 14), c.k = random.between(2049, 2400);
    } else if (random.one_in(2) && c.k) {
        const int64_t unit = random.one_in(2) ? 1 : random.one_in(2) ? 32 : 64;  // a random divisor, often with groups that fit
        if (c.k >= unit) c.k = c.k / unit * unit;
        do c.groups = random.between(1, c.k > 40 ? 40 : c.k);
        while (c.k % c.groups || (unit > 1 && c.k % unit == 0 && c.k / c.groups % unit));
    }
    const Layout layout = random_layout(random);
    const bool packed = !random.one_in(4);
    c.grid = {packed ? layout.bits : 8, packed, packed ? layout.lowest : 12345, packed ? layout.step : 678, 0.0f};
    c.exact = random.one_in(3);
    if (!c.exact && random.one_in(2)) c.grid.zero_point = random.one_in(2) ? -0.5f : float(random.uniform(-3, 3));
    c.floats = !c.exact && random.one_in(2), c.normed = c.floats && random.one_in(3);
    c.with_scale = !c.exact && !c.floats && !random.one_in(4), c.with_zero = !c.exact && !c.floats && random.one_in(3);
    c.out_dtype = c.exact ? int(HB_F32) : random_float_dtype(random);
    const Limits& limits = random.pick(kRowLimits);
    c.qmin = limits.qmin, c.qmax = limits.qmax, c.eps = 1e-5f;
    c.x_stride = c.k + random.between(0, 1) * random.between(0, 9);
    return c;
}

// x as it is given, and as codes with scales and zero points.
struct Input {
    Array x, scale, zero, norm;
    std::vector<Row> rows;
    hb_input given;

    Input(Random& random, const Case& c)
        : x(random, c.floats ? random_float_dtype(random) : int(HB_I8), c.m ? (c.m - 1) * c.x_stride + c.k : 0),
          scale(random, HB_F32, c.m),
          zero(random, HB_F32, c.m),
          norm(random, random_float_dtype(random), c.k) {
        for (int64_t l = 0; l < c.k; ++l) norm.set(l, random.uniform(0.5, 2));
        for (int64_t i = 0; i < c.m; ++i) {
            const int64_t begin = i * c.x_stride;
            scale.set(i, random.uniform(0.001, 1)), zero.set(i, double(random.between(-128, 127)));
            if (c.floats) {
                fill_floats(random, x, begin, begin + c.k);
                rows.push_back(quantized_row(x, begin, c.k, c.normed ? &norm : nullptr, 1e-6f, c.qmin, c.qmax, c.eps));
                continue;
            }
            fill_codes(random, x, begin, begin + c.k);
            const int8_t* codes = x.as<int8_t>() + begin;
            rows.push_back({std::vector<int64_t>(codes, codes + c.k), c.with_scale ? float(scale.get(i)) : 1.0f});
        }
        given = {x.data(),
                 c.x_stride,
                 c.with_scale ? scale.as<float>() : nullptr,
                 c.with_zero ? zero.as<float>() : nullptr,
                 c.normed ? norm.data() : nullptr,
                 x.dtype(),
                 norm.dtype(),
                 1e-6f,
                 c.qmin,
                 c.qmax,
                 c.eps};
    }
};

struct Weight {
    int64_t n, stride, scale_rows, out_stride;
    bool with_bias;
    Array bytes, scale, bias, out;
    std::vector<int> levels;  // (n, k), of unpacked weights codes

    // aligned: rows of results begin with lines of the cache, if n is a multiple of 32
    Weight(Random& random, const Case& c, int64_t n, bool aligned = false)
        : n(n),
          stride((c.k * c.grid.bits + 7) / 8 + random.between(0, 1) * random.between(0, 9)),
          scale_rows(random.one_in(2) ? 1 : n),
          out_stride(n + random.between(0, 1) * (aligned ? 32 : random.between(0, 5))),
          with_bias(!c.exact && random.one_in(2)),
          bytes(random, HB_I8, n ? (n - 1) * stride + (c.k * c.grid.bits + 7) / 8 : 0),
          scale(random, HB_F32, scale_rows * c.groups),
          bias(random, random_float_dtype(random), n),
          out(random, c.out_dtype, c.m ? (c.m - 1) * out_stride + n : 0, aligned) {
        for (int64_t i = 0; i < scale.count(); ++i) scale.set(i, c.exact ? 1.0 : random.uniform(-0.5, 1));
        for (int64_t i = 0; i < n; ++i) bias.set(i, random.uniform(-2, 2));
        for (int64_t i = 0; i < n; ++i) {
            fill_codes(random, bytes, i * stride, i * stride + (c.k * c.grid.bits + 7) / 8);
            const auto* row = bytes.as<uint8_t>() + i * stride;
            for (int64_t l = 0; l < c.k; ++l) levels.push_back(c.grid.packed ? level_at(row, l, c.grid.bits) : int8_t(row[l]));
        }
        out.mark();
    }
    hb_weight given(const Case& c) const {
        return {bytes.data(), n,          stride,    scale.as<float>(), scale_rows, c.groups, with_bias ? bias.data() : nullptr,
                bias.dtype(), out.data(), out_stride};
    }
};

// What row i and output j of a weight should be, which is at `at` of `out`, and by how much rounding may change it.
void expect_output(const Case& c, const Input& input, const Weight& w, int64_t i, int64_t j, const Array& out, int64_t at) {
    const std::vector<int64_t>& x = input.rows[size_t(i)].codes;
    const double x_scale = input.rows[size_t(i)].scale, zero = c.with_zero ? input.zero.get(i) : 0, w_zero = c.grid.zero_point;
    const int64_t size = c.k / c.groups, step = c.grid.packed ? c.grid.step : 1, lowest = c.grid.packed ? c.grid.lowest : 0;
    double y = 0, bound = 0;
    for (int64_t g = 0; g < c.groups; ++g) {
        int64_t sum = 0, of_x = 0, of_codes = 0;
        double magnitude = 0;  // of the terms of group scales, which are summed in float32
        for (int64_t l = g * size; l < (g + 1) * size; ++l) {
            const int64_t level = w.levels[size_t(j * c.k + l)], code = level * step + lowest;
            sum += x[size_t(l)] * code, of_x += x[size_t(l)], of_codes += code;
            // unpacked codes are levels from -128 on
            magnitude += double(llabs(x[size_t(l)])) *
                         (double((c.grid.packed ? level : level + 128) * step) + fabs(double(lowest)) + 128);
        }
        const double scale = w.scale.get((w.scale_rows == 1 ? 0 : j * c.groups) + g);
        y += scale * (double(sum) - w_zero * double(of_x) - zero * (double(of_codes) - w_zero * double(size)));
        const double shift = fabs(w_zero * double(of_x)) + fabs(zero) * (fabs(double(of_codes)) + fabs(w_zero) * double(size));
        bound += fabs(scale) * (shift + (c.groups > 1 ? magnitude : fabs(double(sum))));
    }
    const double bias = w.with_bias ? w.bias.get(j) : 0, roundings = c.groups > 1 ? 32 + double(c.k) / 16 : 8;
    const double tolerance = (bound * x_scale * roundings + fabs(bias) + fabs(y * x_scale)) * 0x1p-24;
    const bool rounded = !c.exact || (c.groups > 1 && bound >= 0x1p24);
    out.expect_near(at, y * x_scale + bias, rounded ? tolerance : 0);
}

int call(Random& random, const Case& c, const Input& input, const std::vector<hb_weight>& weights) {
    const auto count = int64_t(weights.size());
    if (random.one_in(2)) return hb_linear(&input.given, c.m, c.k, &c.grid, weights.data(), count, c.out_dtype);
    struct Head {
        hb_input input;
        int64_t m, k, count;
        int32_t out_dtype;
        hb_grid grid;
    } const head = {input.given, c.m, c.k, count, c.out_dtype, c.grid};
    std::vector<char> block(sizeof(head) + weights.size() * sizeof(hb_weight));
    memcpy(block.data(), &head, sizeof(head));
    memcpy(block.data() + sizeof(head), weights.data(), weights.size() * sizeof(hb_weight));
    return hb_linear_call(block.data());
}

void check_linear(Random& random, const Case& c, const std::vector<int64_t>& outputs) {
    describe(
        "hb_linear m=%lld k=%lld, %d bits packed %d lowest %d step %d zero %g, groups %lld, floats %d normed %d scale %d zero "
        "%d"
        ", out %d, exact %d",
        ll(c.m), ll(c.k), c.grid.bits, c.grid.packed, c.grid.lowest, c.grid.step, double(c.grid.zero_point), ll(c.groups),
        c.floats, c.normed, c.with_scale, c.with_zero, c.out_dtype, c.exact);
    const Input input(random, c);
    std::vector<Weight*> weights;
    std::vector<hb_weight> given;
    for (int64_t n : outputs) {
        const bool aligned = random.one_in(4);  // several panels, too, where K is so long that they share its parts
        weights.push_back(aligned ? new Weight(random, c, n / 32 * 32 + 32 * random.between(1, 3), true) : new Weight(random, c, n));
        given.push_back(weights.back()->given(c));
    }
    expect_ok(call(random, c, input, given));
    for (Weight* w : weights) {
        for (int64_t i = 0; i < c.m; ++i) {
            for (int64_t j = 0; j < w->n; ++j) expect_output(c, input, *w, i, j, w->out, i * w->out_stride + j);
            if (i + 1 < c.m) w->out.expect_untouched(i * w->out_stride + w->n, (i + 1) * w->out_stride);
        }
        delete w;
    }
}

}  // namespace

void fuzz_linear(Random& random) {
    const Case c = random_case(random);
    const int64_t count = !c.wide && random.one_in(3) ? random.between(2, 3) : 1, most = 300000 / ((c.m + 1) * (c.k + 1) * count);
    std::vector<int64_t> outputs;
    for (int64_t i = 0; i < count; ++i)
        outputs.push_back(c.wide ? random.between(200, 360) : random.size(most > 600 ? 600 : most < 4 ? 4 : most));
    check_linear(random, c, outputs);
}

void linear_of_many_rows(Random& random) {
    for (int bits : {2, 4, 8}) {
        Case c = {};
        c.m = 230, c.k = 20001, c.groups = 1, c.x_stride = c.k + 3, c.floats = true;
        c.grid = {bits, 1, -1, 1, 0.0f};
        c.out_dtype = random_float_dtype(random), c.qmin = -128, c.qmax = 127, c.eps = 1e-5f;
        check_linear(random, c, {70});
    }
}

// Every row with the weights of the experts that it chose, some of which do not exist.
void fuzz_experts(Random& random) {
    Case c = random_case(random);
    if (!c.k) return;  // Python's part
    c.grid.packed = 1, c.exact = false, c.floats = true, c.normed = c.with_scale = c.with_zero = false;
    if (c.grid.lowest == 12345) c.grid.lowest = -128, c.grid.step = 1;
    const int64_t experts = random.between(1, 6), maps = random.between(1, 3), chosen = random.between(0, 4);
    describe("hb_experts_call tokens=%lld k=%lld, %lld of %lld experts, %lld maps, %d bits, groups %lld, out %d", ll(c.m), ll(c.k),
             ll(chosen), ll(experts), ll(maps), c.grid.bits, ll(c.groups), c.out_dtype);
    const Input input(random, c);
    std::vector<int64_t> index;
    for (int64_t i = 0; i < c.m * chosen; ++i) index.push_back(random.one_in(8) ? -1 : random.between(0, experts));
    const int64_t most = 100000 / ((c.m + 1) * (c.k + 1) * maps);
    std::vector<Weight*> weights;
    std::vector<Array*> outs;
    struct Head {
        hb_input input;
        int64_t tokens, k;
        const int64_t* index;
        int64_t chosen, experts, maps;
        int32_t out_dtype;
        hb_grid grid;
    } const head = {input.given, c.m, c.k, index.data(), chosen, experts, maps, c.out_dtype, c.grid};
    std::vector<char> block(sizeof(head));
    memcpy(block.data(), &head, sizeof(head));
    for (int64_t map = 0; map < maps; ++map) {
        const int64_t n = random.size(most > 90 ? 90 : most < 4 ? 4 : most);
        outs.push_back(new Array(random, c.out_dtype, c.m * chosen * n));
        outs.back()->mark();
        for (int64_t e = 0; e < experts; ++e) {
            weights.push_back(new Weight(random, c, n));
            hb_weight given = weights.back()->given(c);
            given.out = e ? nullptr : outs.back()->data(), given.out_stride = 0;
            block.insert(block.end(), reinterpret_cast<char*>(&given), reinterpret_cast<char*>(&given + 1));
        }
    }
    expect_ok(hb_experts_call(block.data()));
    for (int64_t map = 0; map < maps; ++map) {
        const int64_t n = weights[size_t(map * experts)]->n;
        for (int64_t place = 0; place < c.m * chosen; ++place) {
            const int64_t expert = index[size_t(place)];
            for (int64_t j = 0; j < n; ++j) {
                const Array& out = *outs[size_t(map)];
                if (expert < 0 || expert >= experts)
                    out.expect(place * n + j, 0);
                else
                    expect_output(c, input, *weights[size_t(map * experts + expert)], place / chosen, j, out, place * n + j);
            }
        }
        delete outs[size_t(map)];
    }
    for (Weight* w : weights) delete w;
}

}  // namespace fuzz
