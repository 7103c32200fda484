// Random products: hb_int_matmul and hb_fixed_matmul. Own; hb_linear is in linear.cpp.
#include "fuzz.h"

namespace fuzz {
namespace {

// a (m, k) b (n, k)^T modulo 2^32
void check_int_matmul(Random& random, int64_t m, int64_t n, int64_t k) {
    const int64_t a_stride = k + random.between(0, 5) * random.between(0, 1), b_stride = k + random.between(0, 1) * 7;
    describe("hb_int_matmul m=%lld n=%lld k=%lld strides %lld %lld", ll(m), ll(n), ll(k), ll(a_stride), ll(b_stride));
    Array a(random, HB_I8, m ? (m - 1) * a_stride + k : 0), b(random, HB_I8, n ? (n - 1) * b_stride + k : 0),
        out(random, kInt32, m * n);
    for (int64_t i = 0; i < m; ++i) fill_codes(random, a, i * a_stride, i * a_stride + k);
    for (int64_t i = 0; i < n; ++i) fill_codes(random, b, i * b_stride, i * b_stride + k);
    expect_ok(hb_int_matmul(a.as<int8_t>(), a_stride, b.as<int8_t>(), b_stride, m, n, k, out.as<int32_t>()));
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            int64_t sum = 0;
            for (int64_t l = 0; l < k; ++l) sum += int64_t(a.as<int8_t>()[i * a_stride + l]) * b.as<int8_t>()[j * b_stride + l];
            out.expect(i * n + j, double(sum));
        }
}

// The float operand of hb_fixed_matmul.
struct Operand {
    int64_t m, k, stride, step, count;
};

Operand random_operand(Random& random, int64_t m, int64_t k) {
    const int64_t gap = random.between(0, 1) * random.between(0, 9);
    Operand operand = {m, k, k + gap, 1, 0};
    if (random.one_in(2)) operand = {m, k, 1, m + gap, 0};                         // transposed
    if (random.one_in(5)) operand = {m, k, 3 * k + gap, random.between(2, 3), 0};  // every second or third
    operand.count = m && k ? (m - 1) * operand.stride + (k - 1) * operand.step + 1 : 0;
    return operand;
}

// Integers whose largest is 32512, so that nothing is rounded and the sums are exact; else floats.
void fill_operand(Random& random, const Operand& operand, bool exact, Array& a) {
    for (int64_t i = 0; i < operand.m; ++i) {
        Array row(random, a.dtype(), operand.k);
        fill_floats(random, row, 0, operand.k);
        for (int64_t l = 0; l < operand.k; ++l)
            a.set(i * operand.stride + l * operand.step, exact ? double(random.between(-32512, 32512)) : row.get(l));
        if (exact)
            a.set(i * operand.stride + random.between(0, operand.k - 1) * operand.step, random.one_in(2) ? 32512 : -32512);
    }
}

struct FixedCase {
    Operand operand;
    int64_t n, b_stride, out_stride;
    bool exact, scaled;
    float zero_point, scale;
};

void expect_fixed_row(const FixedCase& c, const Array& a, const Array& a_scale, const Array& b, const Array& out, int64_t i) {
    std::vector<double> row(static_cast<size_t>(c.operand.k));
    double largest = 0;
    for (int64_t l = 0; l < c.operand.k; ++l) {
        const float value = float(a.get(i * c.operand.stride + l * c.operand.step));
        row[size_t(l)] = double(c.scaled ? value * float(a_scale.get(l)) : value);
        largest = fabs(row[size_t(l)]) > largest ? fabs(row[size_t(l)]) : largest;
    }
    // AMX multiplies bfloat16 itself, where it is read in one direction or the other: what is not finite stays as it is
    const bool tiles = hb_level() == HB_AMX && a.dtype() == HB_BF16 && (c.operand.stride == 1 || c.operand.step == 1);
    for (double value : row)
        if (!isfinite(value) && !tiles) largest = NAN;
    const bool rounded = c.scaled || c.zero_point != 0.0f;  // operand or levels, to bfloat16
    for (int64_t j = 0; j < c.n; ++j) {
        double sum = 0, weights = 0, bound = 0, all = 0;  // bound: of all that floats round
        for (int64_t l = 0; l < c.operand.k; ++l) {
            const double code = double(b.as<int8_t>()[l * c.b_stride + j]);
            sum += row[size_t(l)] * (code - c.zero_point);
            weights += fabs(code - c.zero_point);
            all += fabs(row[size_t(l)] * (code - c.zero_point));
            bound += fabs(code) + fabs(c.zero_point);
        }
        const double of_form = tiles ? (rounded ? all * 0x1p-8 : 0) : largest * weights / 65024 * 1.001;
        const double tolerance = (of_form + largest * bound * 0x1p-21) * fabs(c.scale);
        out.expect_near(i * c.out_stride + j, isnan(largest) ? NAN : sum * c.scale, c.exact || !isfinite(sum) ? 0 : tolerance);
    }
    if (i + 1 < c.operand.m) out.expect_untouched(i * c.out_stride + c.n, (i + 1) * c.out_stride);
}

void check_fixed_matmul(Random& random, int64_t m, int64_t n, int64_t k) {
    FixedCase c = {};
    c.operand = random_operand(random, m, k);
    const bool aligned = random.one_in(4);  // results in whole lines of the cache, and several panels
    if (aligned) n = n / 32 * 32 + 32 * random.between(1, 3);
    c.n = n, c.b_stride = n + random.between(0, 1) * 5, c.out_stride = n + random.between(0, 1) * (aligned ? 32 : 3);
    c.exact = k > 0 && k <= 500 && random.one_in(3);
    c.scaled = !c.exact && random.one_in(2);
    c.zero_point = c.exact ? 0.0f : random.one_in(2) ? -0.5f : float(random.between(-2, 2));
    c.scale = c.exact ? 1.0f : float(random.uniform(-0.1, 2));
    Array a(random, c.exact ? int(HB_F32) : random_float_dtype(random), c.operand.count), a_scale(random, HB_F32, k);
    Array b(random, HB_I8, k ? (k - 1) * c.b_stride + n : 0);
    Array out(random, c.exact ? int(HB_F32) : random_float_dtype(random), m ? (m - 1) * c.out_stride + n : 0, aligned);
    describe("hb_fixed_matmul m=%lld n=%lld k=%lld stride %lld step %lld, %d to %d, %s", ll(m), ll(n), ll(k),
             ll(c.operand.stride), ll(c.operand.step), a.dtype(), out.dtype(), c.exact ? "exact" : "rounded");
    fill_operand(random, c.operand, c.exact, a);
    for (int64_t l = 0; l < k; ++l) a_scale.set(l, random.uniform(0.1, 2));
    for (int64_t l = 0; l < k; ++l)
        for (int64_t j = 0; j < n; ++j)
            b.set(l * c.b_stride + j, double(c.exact ? random.between(-1, 1) : random.between(-128, 127)));
    out.mark();
    expect_ok(hb_fixed_matmul(a.data(), a.dtype(), c.operand.stride, c.operand.step, c.scaled ? a_scale.as<float>() : nullptr,
                              m, k, b.as<int8_t>(), c.b_stride, n, c.zero_point, c.scale, out.data(), out.dtype(),
                              c.out_stride));
    for (int64_t i = 0; i < m; ++i) expect_fixed_row(c, a, a_scale, b, out, i);
}

// an n for which the plain model takes a moment only
int64_t outputs(Random& random, int64_t m, int64_t k) {
    const int64_t most = 300000 / ((m + 1) * (k + 1));
    return random.size(most > 300 ? 300 : most < 4 ? 4 : most);
}

}  // namespace

void fuzz_int_matmul(Random& random) {
    const int64_t m = random.size(random.one_in(2) ? 10 : 70), k = random.size(random.one_in(4) ? 2300 : 500);
    check_int_matmul(random, m, outputs(random, m, k), k);
}

void fuzz_fixed_matmul(Random& random) {
    const bool whole = random.one_in(4);  // tiles, which AMX then reads where they are
    const int64_t m = whole ? 32 * random.size(3) : random.size(40);
    const int64_t k = whole ? 32 * random.size(70) : random.size(random.one_in(4) ? 2300 : 300);
    check_fixed_matmul(random, m, outputs(random, m, k), k);
}

void many_rows(Random& random) {
    check_int_matmul(random, 6100, 3, 690);
    check_int_matmul(random, 230, 3, 40001);
    check_fixed_matmul(random, 6100, 3, 690);
    check_fixed_matmul(random, 230, 3, 40001);
}

}  // namespace fuzz
