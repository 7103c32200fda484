// The matrix form of `linear`: slabs of x, laid out as bytes, meet panels of weights. Own.
#include "product_call.h"

namespace hb {
namespace {

constexpr int64_t kSlabBytes = 4 << 20;  // int8 bytes of x laid out at a time
constexpr int64_t kPartBytes = 1 << 20;  // int8 bytes of x that meet one panel: half of a second-level cache
constexpr int64_t kPartWidth = 2048;     // codes of a row of x that are counted for that

bool lay_out(const Call& call, const Slab& slab) {
    const int mr = call.body.mr;
    std::atomic<bool> complete{true};
    for_range(ceil_div(slab.rows, mr), ceil_div(16384, mr * slab.kpad), [&](int64_t begin, int64_t end) {
        // one strip of codes per block
        auto* strip = static_cast<int8_t*>(scratch(SLOT_PANEL, size_t(mr * slab.kpad)));
        auto* row = static_cast<float*>(scratch(SLOT_ROW, size_t(call.k + 16) * 4));
        if (!strip || !row) return complete.store(false);
        for (int64_t b = begin; b < end; ++b) {
            const int rows = int(smaller(mr, slab.rows - b * mr));
            for (int r = 0; r < rows; ++r) {
                const int64_t m = b * mr + r;
                const int8_t* x = codes_of_row(call, slab.m0 + m, strip + r * slab.kpad, row, &slab.scales[m], &slab.sums[m]);
                if (x != strip + r * slab.kpad) memcpy(strip + r * slab.kpad, x, size_t(call.k));
                memset(strip + r * slab.kpad + call.k, 0, size_t(slab.kpad - call.k));
                if (call.ordered) call.body.order(strip + r * slab.kpad, slab.kpad, call.grid.bits);
            }
            for (int64_t k0 = 0; k0 < call.k; k0 += slab.kc)
                call.body.pack_rows(strip + k0, slab.kpad, rows, slab.size(k0), slab.block(b * mr, k0));
        }
    });
    return complete;
}

// c_float[i] += scale of (output, group) * (step * c[i] + offset * sum of x over the group)
void add_group(const Call& call, const hb_weight& weight, int64_t n0, int64_t columns, int64_t group, const int32_t* c, float* total,
               int64_t rows, const float* group_sums) {
    const int nr = call.body.nr;
    const AnyFloat* scales = weight.scale + group;
    const float step = float(call.grid.step), offset = float(call.grid.lowest) - call.grid.zero_point;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < columns; ++j) {
            const float scale = scales[weight.scale_rows == 1 ? 0 : (n0 + j) * weight.groups];
            total[r * nr + j] += scale * (step * float(c[r * nr + j]) + offset * group_sums[r]);
        }
    }
}

// The sums of each group of codes of a block row, read back from the body's layout through the kernel itself: a panel of
// ones has the sum of x in every column.
void sums_of_group(const Call& call, const int8_t* block, int64_t size, int rows, uint8_t* ones, int32_t* c, float* sums) {
    memset(ones, 1, size_t(size) * size_t(call.body.nr));
    call.body.kernel(block, size, rows, ones, 1, c, false, {});
    for (int r = 0; r < rows; ++r) sums[r] = float(c[r * call.body.nr]);
}

// What `ProductBodies::panel` makes, with K in its own order, code by code.
void panel_in_order(const Packed& w, int64_t row, int rows, int64_t k0, int64_t size, uint8_t* out) {
    memset(out, 0, size_t(size) * 16);
    for (int r = 0; r < rows; ++r)
        for (int64_t i = 0; i < size && k0 + i < w.k; ++i) out[i / 4 * 64 + r * 4 + i % 4] = level_at(w, row + r, k0 + i);
}

// Codes [k0, k0 + size) of outputs [n0, n0 + columns) as the kernel wants them, in panels of 16 outputs.
void lay_out_weights(const Call& call, const hb_weight& weight, int64_t n0, int64_t columns, int64_t k0, int64_t size, uint8_t* panels) {
    const Packed packed = call.packed(weight);
    const auto panel = call.ordered ? call.body.panel : panel_in_order;
    for (int p = 0; p < call.body.nr / 16; ++p)
        panel(packed, n0 + 16 * p, int(columns > 16 * p ? smaller(16, columns - 16 * p) : 0), k0, size, panels + p * size * 16);
}

// Rows [from, to) of the slab times outputs [n0, n0 + nr) of one weight.
bool part_of_outputs(const Call& call, const Slab& slab, const hb_weight& weight, int64_t from, int64_t to, int64_t n0) {
    const ProductBodies& body = call.body;
    const int nr = body.nr, mr = body.mr;
    const bool grouped = weight.groups > 1;
    const int64_t kc = slab.kc, columns = smaller(nr, weight.n - n0);
    const int64_t span = round_up(to - from, mr);
    auto* panels = static_cast<uint8_t*>(scratch(SLOT_PANEL, size_t(round_up(kc, 64) * nr * 2)));
    auto* c = static_cast<int32_t*>(scratch(SLOT_SUMS, size_t(span * nr + (grouped ? span * nr + 2 * mr * nr : nr)) * 4));
    if (!panels || !c) return false;
    auto* total = reinterpret_cast<float*>(c + span * nr);
    if (grouped) memset(total, 0, size_t(span * nr) * 4);
    auto* ones = c + span * nr;  // sums of u alone, for zero points of x
    if (call.x.zero) memset(ones, 0, size_t(nr) * 4);
    Epilogue e = epilogue(call, &weight, slab.scales - slab.m0, slab.sums - slab.m0);
    e.ones = ones;
    for (int64_t k0 = 0, group = 0; k0 < call.k; k0 += kc, ++group) {
        const int64_t size = slab.size(k0);
        lay_out_weights(call, weight, n0, columns, k0, size, panels);
        if (call.x.zero)
            for (int64_t p = 0; p < nr / 16; ++p)
                for (int64_t i = 0; i < size; ++i)
                    for (int64_t j = 0; j < 16 && in_panel_order(k0 + i, call.grid.bits) < call.k; ++j) {
                        const uint8_t u = panels[p * size * 16 + (i / 4) * 64 + j * 4 + i % 4];
                        ones[p * 16 + j] += body.is_signed ? int8_t(u) : u;
                    }
        const bool last = k0 + kc >= call.k;
        for (int64_t r = from; r < to; r += mr) {
            const int rows = int(smaller(mr, slab.rows - r));
            const int8_t* block = slab.block(r, k0);
            // sums of a single part of K stay in the first-level cache: the next rows write over them
            int32_t* sums = c + (last && k0 == 0 ? 0 : (r - from) * nr);
            float* of_groups = grouped ? total + (r - from) * nr : nullptr;
            const Lines results = lines_of(weight.out, call.out_dtype, weight.out_stride, slab.m0 + r, rows, n0);
            body.kernel(block, size, rows, panels, call.grid.bits, sums, !grouped && k0 > 0, last ? results : Lines{});
            if (grouped) {
                float group_sums[64];
                sums_of_group(call, block, size, rows, panels + round_up(kc, 64) * nr, c + 2 * span * nr, group_sums);
                add_group(call, weight, n0, columns, group, sums, of_groups, rows, group_sums);
            }
            // right behind their last sums: what is written goes to memory while the next rows are multiplied
            if (last) body.finish(e, slab.m0 + r, rows, n0, columns, sums, of_groups, nr);
        }
    }
    return true;
}

// Rows of one block of sums of both weights through the gate to where results belong; they are near the processor throughout.
void finish_gate(const Call& call, const Slab& slab, int64_t r, int rows, int64_t n0, int64_t columns, const int32_t* const* sums) {
    const int nr = call.body.nr, dtype = call.out_dtype;
    alignas(64) char results[2][kBlockMost * 4];
    for (int i = 0; i < 2; ++i) {
        hb_weight weight = call.weights[i];
        if (weight.scale_rows > 1) weight.scale += n0;
        if (weight.bias) weight.bias = at(weight.bias, int(weight.bias_dtype), n0);
        weight.out = results[i], weight.out_stride = nr;
        call.body.finish(epilogue(call, &weight, slab.scales + r, slab.sums + r), 0, rows, 0, columns, sums[i], nullptr, nr);
    }
    const Gate& gate = *call.gate;
    char* out = at(gate.out, dtype, (slab.m0 + r) * gate.out_stride + n0);
    const int64_t apart = gate.out_stride * int64_t(size_of(dtype)), bytes = columns * int64_t(size_of(dtype));
    const bool whole = columns == nr;
    if (whole) gate.meet(results[0], results[1], dtype, gate.activation, int64_t(rows) * nr, results[0]);
    for (int i = 0; i < rows; ++i, out += apart) {
        char *of_gate = at(results[0], dtype, i * nr), *of_up = at(results[1], dtype, i * nr);
        if (!whole) gate.meet(of_gate, of_up, dtype, gate.activation, columns, of_gate);
        memcpy(out, of_gate, size_t(bytes));
    }
}

// part_of_outputs of two weights that meet in the call's gate.
bool part_of_gate(const Call& call, const Slab& slab, int64_t from, int64_t to, int64_t n0) {
    const ProductBodies& body = call.body;
    const int nr = body.nr, mr = body.mr;
    const int64_t kc = slab.kc, columns = smaller(nr, call.weights[0].n - n0), span = round_up(to - from, mr);
    auto* panels = static_cast<uint8_t*>(scratch(SLOT_PANEL, size_t(kc * nr * 2)));
    auto* c = static_cast<int32_t*>(scratch(SLOT_SUMS, size_t(span * nr * 2) * 4));
    if (!panels || !c) return false;
    for (int64_t k0 = 0; k0 < call.k; k0 += kc) {
        const int64_t size = slab.size(k0);
        for (int i = 0; i < 2; ++i) lay_out_weights(call, call.weights[i], n0, columns, k0, size, panels + i * size * nr);
        const bool last = k0 + kc >= call.k;
        for (int64_t r = from; r < to; r += mr) {
            const int rows = int(smaller(mr, slab.rows - r));
            const int8_t* block = slab.block(r, k0);
            int32_t* first = c + (last && k0 == 0 ? 0 : 2 * (r - from) * nr);
            int32_t* const sums[2] = {first, first + mr * nr};
            const Lines results = lines_of(call.gate->out, call.out_dtype, call.gate->out_stride, slab.m0 + r, rows, n0);
            body.kernel(block, size, rows, panels, call.grid.bits, sums[0], k0 > 0, last ? results : Lines{});
            body.kernel(block, size, rows, panels + size * nr, call.grid.bits, sums[1], k0 > 0, {});
            if (last) finish_gate(call, slab, r, rows, n0, columns, sums);
        }
    }
    return true;
}

}  // namespace

int linear_blocks(const Call& call) {
    const ProductBodies& body = call.body;
    Slab slab;
    slab.kpad = round_up(call.k, 64);
    slab.kc = call.weights[0].groups > 1 ? call.k / call.weights[0].groups : body.kc;
    const int64_t most = round_up(smaller(call.m, kSlabBytes / slab.kpad + 1), body.mr);
    slab.blocks = static_cast<int8_t*>(scratch(SLOT_CODES, size_t(most * slab.kpad + most * 8)));
    if (!slab.blocks) return HB_ERROR_MEMORY;
    slab.scales = reinterpret_cast<float*>(slab.blocks + most * slab.kpad);
    slab.sums = reinterpret_cast<int32_t*>(slab.scales + most);
    const int64_t panels = call.gate ? ceil_div(call.weights[0].n, body.nr) : pieces_of_weights(call, body.nr);
    // each thread should have four parts at least
    const int64_t fair = most * panels / (4 * threads()) + 1, fit = kPartBytes / smaller(slab.kpad, kPartWidth) + 1;
    const int64_t part = round_up(smaller(smaller(most, fair), fit), body.mr);
    std::atomic<bool> complete{true};
    for (slab.m0 = 0; slab.m0 < call.m; slab.m0 += most) {
        slab.rows = smaller(most, call.m - slab.m0), slab.span = round_up(slab.rows, body.mr);
        if (!lay_out(call, slab)) return HB_ERROR_MEMORY;
        const int64_t tasks = ceil_div(slab.rows, part) * panels;
        take_tasks(tasks, tasks, [&](bool first) { first ? body.begin() : body.end(); }, [&](int64_t task) {
            const int64_t from = task / panels * part, to = smaller(from + part, slab.rows);
            int64_t panel = task % panels;
            const hb_weight& weight = weight_of(call, body.nr, &panel);
            const bool done = call.gate ? part_of_gate(call, slab, from, to, panel * body.nr)
                                        : part_of_outputs(call, slab, weight, from, to, panel * body.nr);
            if (!done) complete = false;
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

}  // namespace hb
