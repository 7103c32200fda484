// hb_fixed_matmul: a float matrix times int8 codes in two exact integer products. Own.
//
// The matrix form of product_matrix.cpp, with two rows of bytes for every row of the float operand, and panels made from a matrix
// whose rows (not columns) are summed over: gradients by the input sum over outputs, gradients by the weight over tokens.
#include "product.h"

namespace hb {
namespace {

constexpr int64_t kSlabBytes = 8 << 20;  // int8 bytes of the float operand laid out at a time
constexpr int64_t kTransposedRows = 48;   // of a transposed operand that are brought into rows at a time
constexpr int64_t kPartBytes = 1 << 20;  // those that meet one panel: half of a second-level cache

struct Call : FixedCall {
    const ProductBodies& body;
    uint8_t flip;
    int32_t lowest;
};

bool lay_out(const Call& call, const Slab& slab) {
    const int mr = call.body.mr, pairs = mr / 2;
    if (call.a.stride == 1 && call.a.step != 1 && call.body.fixed_columns) {
        take_tasks(ceil_div(slab.rows, kColumnGroup), ceil_div(slab.rows * slab.kpad, 16384), [](bool) {}, [&](int64_t task) {
            const int64_t from = task * kColumnGroup;
            call.body.fixed_columns(call.a, slab.m0 + from, int(smaller(kColumnGroup, slab.rows - from)), slab, from, pairs);
        });
        return true;
    }
    // rows of a transposed operand are neighbours in memory: so many at a time use the cache lines that they touch
    const int group = int(call.a.step == 1 ? pairs : round_up(kTransposedRows, pairs));
    std::atomic<bool> complete{true};
    for_range(ceil_div(slab.rows, group), ceil_div(16384, 2 * group * slab.kpad), [&](int64_t begin, int64_t end) {
        auto* strips = static_cast<int8_t*>(scratch(SLOT_PANEL, size_t(2 * group * slab.kpad)));
        auto* values = static_cast<float*>(scratch(SLOT_ROW, size_t(group * call.a.k + 16) * 4));
        if (!strips || !values) {
            complete = false;
            return;
        }
        for (int64_t from = begin * group; from < smaller(end * group, slab.rows); from += group) {
            const int all = int(smaller(group, slab.rows - from));
            call.body.fixed_rows(call.a, slab.m0 + from, all, slab.kpad, values, strips, slab.scales + from, slab.sums + 2 * from);
            for (int row = 0; row < all; row += pairs) {
                const int8_t* strip = strips + 2 * row * slab.kpad;
                const int count = 2 * int(smaller(pairs, all - row));
                for (int64_t k0 = 0; k0 < slab.kpad; k0 += slab.kc) {
                    const int64_t size = slab.size(k0);
                    call.body.pack_rows(strip + k0, slab.kpad, count, size, slab.block(2 * (from + row), k0));
                }
            }
        }
    });
    return complete;
}

// Operand rows [from, to) of the slab times outputs [n0, n0 + nr).
bool part_of_outputs(const Call& call, const Slab& slab, int64_t from, int64_t to, int64_t n0) {
    const ProductBodies& body = call.body;
    const int nr = body.nr, pairs = body.mr / 2;
    const int64_t columns = smaller(nr, call.n - n0), span = round_up(to - from, pairs);
    auto* panels = static_cast<uint8_t*>(scratch(SLOT_PANEL, size_t(body.kc * nr)));
    auto* c = static_cast<int32_t*>(scratch(SLOT_SUMS, size_t(2 * span * nr) * 4));
    if (!panels || !c) return false;
    const auto finish_rows = [&](int64_t r, int rows, const int32_t* sums) {
        for (int i = 0; i < rows; ++i) {
            const int32_t* high = sums + 2 * i * nr;
            const int64_t first = (slab.m0 + r + i) * call.out_stride + n0;
            body.fixed_finish(high, high + nr, columns, slab.sums + 2 * (r + i), call.lowest, call.zero_point, slab.scales[r + i],
                              call.scale, at(call.out, call.out_dtype, first), call.out_dtype);
        }
    };
    for (int64_t k0 = 0; k0 < slab.kpad; k0 += body.kc) {
        const int64_t size = slab.size(k0);
        for (int p = 0; p < nr / 16; ++p)
            body.panel_columns(call.b, call.b_stride, call.a.k, call.flip, k0, size, n0 + 16 * p,
                               int(columns > 16 * p ? smaller(16, columns - 16 * p) : 0), panels + p * size * 16);
        const bool last = k0 + body.kc >= slab.kpad;
        for (int64_t r = from; r < to; r += pairs) {
            const int rows = int(smaller(pairs, slab.rows - r));
            int32_t* sums = c + (last && k0 == 0 ? 0 : 2 * (r - from) * nr);  // see part_of_outputs of product_matrix.cpp
            body.kernel(slab.block(2 * r, k0), size, 2 * rows, panels, 8, sums, k0 > 0, {});
            if (last) finish_rows(r, rows, sums);
        }
    }
    return true;
}

int multiply(const Call& call) {
    const ProductBodies& body = call.body;
    const int64_t pairs = body.mr / 2;
    Slab slab;
    slab.kpad = round_up(call.a.k, 64), slab.kc = body.kc;
    const int64_t most = round_up(smaller(call.m, kSlabBytes / (2 * slab.kpad) + 1), pairs);
    slab.blocks = static_cast<int8_t*>(scratch(SLOT_CODES, size_t(2 * most * slab.kpad + most * 12)));
    if (!slab.blocks) return HB_ERROR_MEMORY;
    slab.scales = reinterpret_cast<float*>(slab.blocks + 2 * most * slab.kpad);
    slab.sums = reinterpret_cast<int32_t*>(slab.scales + most);
    const int64_t part = round_up(smaller(most, kPartBytes / (2 * slab.kpad) + 1), pairs), panels = ceil_div(call.n, body.nr);
    std::atomic<bool> complete{true};
    for (slab.m0 = 0; slab.m0 < call.m; slab.m0 += most) {
        slab.rows = smaller(most, call.m - slab.m0), slab.span = round_up(2 * slab.rows, body.mr);
        if (!lay_out(call, slab)) return HB_ERROR_MEMORY;
        const int64_t tasks = ceil_div(slab.rows, part) * panels;
        take_tasks(tasks, tasks, [&](bool first) { first ? body.begin() : body.end(); }, [&](int64_t task) {
            const int64_t from = task / panels * part;
            if (!part_of_outputs(call, slab, from, smaller(from + part, slab.rows), task % panels * body.nr)) complete = false;
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

}  // namespace
}  // namespace hb

extern "C" int hb_fixed_matmul(const void* a, int a_dtype, int64_t a_stride, int64_t a_step, const float* a_scale, int64_t m, int64_t k,
                               const int8_t* b, int64_t b_stride, int64_t n, float zero_point, float scale, void* out, int out_dtype,
                               int64_t out_stride) {
    using namespace hb;
    if (m < 0 || n < 0 || k < 0 || !is_float(a_dtype) || !is_float(out_dtype)) return HB_ERROR_ARGUMENT;
    if (m == 0 || n == 0) return HB_OK;
    if (k == 0) {  // the sum of nothing
        const size_t width = size_of(out_dtype);
        for (int64_t i = 0; i < m; ++i) memset(static_cast<char*>(out) + size_t(i * out_stride) * width, 0, size_t(n) * width);
        return HB_OK;
    }
    const ProductBodies& body = product();
    const FixedOperand operand = {a, a_dtype, a_stride, a_step, k, a_scale};
    const FixedCall call = {operand, m, b, b_stride, n, zero_point, scale, out, out_dtype, out_stride};
    const int status = body.fixed_bf16 ? body.fixed_bf16(call) : HB_ERROR_UNSUPPORTED;
    if (status != HB_ERROR_UNSUPPORTED) return status;
    return multiply({call, body, uint8_t(body.is_signed ? 0 : 0x80), body.is_signed ? 0 : -128});
}
