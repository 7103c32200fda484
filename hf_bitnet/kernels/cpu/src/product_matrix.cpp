// The matrix form of `linear`: slabs of x, laid out as bytes, meet panels of weights. Own.
#include "product_call.h"

namespace hb {
namespace {

constexpr int64_t kSlabBytes = 4 << 20;  // int8 bytes of x laid out at a time
constexpr int64_t kPartBytes = 1 << 20;  // int8 bytes of x that meet the panels of a task: half of a second-level cache
constexpr int64_t kPartWidth = 2048;     // codes of a row of x that are counted for that
constexpr int64_t kPieces = 16;          // panels that meet each part of K of a wider x, at most
constexpr int64_t kOwnRows = 512;        // of a thread; for fewer, unpacking the weights for each anew does not pay,
constexpr int64_t kOwnWideRows = 256;    // which it does sooner where rows are long, and read again for each panel

// Whether rows are rounded straight into their blocks.
bool rounds_into_blocks(const Call& call) {
    const hb_input& x = call.x;
    const bool symmetric = is_float(x.x_dtype) && is_symmetric(x.qmin, x.qmax);
    return call.body.round_row && symmetric && !x.norm_weight && call.grid.bits > 1;
}

// Block b of such rows. Each row is fetched while the one before is rounded.
void round_block(const Call& call, const Slab& slab, int64_t b) {
    const hb_input& x = call.x;
    const int bits = call.ordered ? call.grid.bits : 8, dtype = int(x.x_dtype);
    const int64_t mr = call.body.mr, stride = x.x_stride * int64_t(size_of(dtype));
    for (int64_t r = 0, m = b * mr; r < mr; ++r, ++m) {
        const bool there = m < slab.rows;
        const int64_t ahead = m + 1 < slab.rows ? stride : 0;
        const char* row = at(x.x, dtype, (slab.m0 + (there ? m : 0)) * x.x_stride);
        const float largest = there ? rows().abs_max(row, dtype, call.k) : 0.0f, inverse = inverse_scale(largest, x.qmax, x.eps);
        const bool empty = !there || leaves_nothing(largest, inverse);
        int32_t sum = 0;
        for (int64_t k0 = 0; k0 < call.k; k0 += slab.kc) {
            const int64_t size = slab.size(k0), count = empty ? 0 : smaller(size, call.k - k0);
            sum += call.body.round_row(at(row, dtype, k0), dtype, count, inverse, bits, int(r), size, ahead, slab.block(b * mr, k0));
        }
        if (there) slab.scales[m] = 1.0f / inverse, slab.sums[m] = sum;
    }
}

// Block b of any rows, whose codes are in a strip first. False: there is no memory.
bool pack_block(const Call& call, const Slab& slab, int64_t b) {
    const int64_t mr = call.body.mr, rows = smaller(mr, slab.rows - b * mr);
    auto* strip = static_cast<int8_t*>(scratch(SLOT_PANEL, size_t(mr * slab.kpad)));
    auto* row = static_cast<float*>(scratch(SLOT_ROW, size_t(call.k + 16) * 4));
    if (!strip || !row) return false;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t m = b * mr + r;
        int8_t* codes = strip + r * slab.kpad;
        const int8_t* x = codes_of_row(call, slab.m0 + m, codes, row, &slab.scales[m], &slab.sums[m]);
        if (x != codes) memcpy(codes, x, size_t(call.k));
        memset(codes + call.k, 0, size_t(slab.kpad - call.k));
        if (call.ordered) call.body.order(codes, slab.kpad, call.grid.bits);
    }
    for (int64_t k0 = 0; k0 < call.k; k0 += slab.kc)
        call.body.pack_rows(strip + k0, slab.kpad, int(rows), slab.size(k0), slab.block(b * mr, k0));
    return true;
}

bool lay_out(const Call& call, const Slab& slab) {
    const int mr = call.body.mr;
    const bool rounds = rounds_into_blocks(call);
    std::atomic<bool> complete{true};
    for_range(ceil_div(slab.rows, mr), ceil_div(16384, mr * slab.kpad), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            if (rounds)
                round_block(call, slab, b);
            else if (!pack_block(call, slab, b))
                complete = false;
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

// ones[j] += the levels of output j in a panel, for inputs with zero points.
void add_levels(const Call& call, const uint8_t* panels, int64_t k0, int64_t size, int32_t* ones) {
    for (int64_t p = 0; p < call.body.nr / 16; ++p)
        for (int64_t i = 0; i < size; ++i)
            for (int64_t j = 0; j < 16 && in_panel_order(k0 + i, call.grid.bits) < call.k; ++j) {
                const uint8_t u = panels[p * size * 16 + (i / 4) * 64 + j * 4 + i % 4];
                ones[p * 16 + j] += call.body.is_signed ? int8_t(u) : u;
            }
}

// Rows of one block of sums of both weights through the gate to where results belong; they are near the processor throughout.
void finish_gate(const Call& call, const Slab& slab, int64_t r, int rows, int64_t n0, int64_t columns, const int32_t* const* sums,
                 const Lines& to, bool streams) {
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
    const int64_t line = nr * int64_t(size_of(dtype)), bytes = columns * int64_t(size_of(dtype));
    const bool whole = columns == nr;
    if (whole) gate.meet(results[0], results[1], dtype, gate.activation, int64_t(rows) * nr, results[0]);
    for (int i = 0; i < rows; ++i) {
        char *of_gate = results[0] + i * line, *of_up = results[1] + i * line, *out = to.first + i * to.stride;
        if (!whole) gate.meet(of_gate, of_up, dtype, gate.activation, columns, of_gate);
        if (streams)
            for (int64_t byte = 0; byte < line; byte += 64) stream_line(out + byte, of_gate + byte);
        else
            memcpy(out, of_gate, size_t(bytes));
    }
}

// Outputs of one weight that a panel is made of.
struct Piece {
    const hb_weight* weight;
    int64_t n0, columns;
};

// Piece i of all weights; where two weights meet in a gate, theirs take turns.
Piece piece_of(const Call& call, int64_t i) {
    const int64_t nr = call.body.nr;
    const hb_weight* weight = call.weights;
    if (call.gate)
        weight += i % 2, i /= 2;
    else
        weight = &weight_of(call, nr, &i);
    return {weight, i * nr, smaller(nr, weight->n - i * nr)};
}

// Where the results of a piece begin in `rows` rows.
Lines lines_of(const Call& call, const Piece& piece, int64_t row, int rows) {
    void* out = call.gate ? call.gate->out : piece.weight->out;
    return hb::lines_of(out, call.out_dtype, call.gate ? call.gate->out_stride : piece.weight->out_stride, row, rows, piece.n0);
}

// Whether rows of x do not fit the second-level cache whole: they meet several panels in each part of K, then.
bool is_wide(const Call& call, const Slab& slab) { return slab.kpad > kPartWidth && call.weights[0].groups == 1; }

// The packed bytes of codes [k0, ..) of the piece that is unpacked next: a line of each of its rows while block b of `blocks` is
// multiplied, not all of them where there are fewer blocks than lines.
Lines weights_ahead(const Call& call, const Slab& slab, const Piece& next, int64_t k0, int64_t b, int64_t blocks) {
    const int64_t lines = ceil_div(slab.size(k0) * call.grid.bits, 512), line = b * lines / blocks;
    if (b > 0 && line == (b - 1) * lines / blocks) return {};
    const Packed w = call.packed(*next.weight);
    const uint8_t* first = w.data + next.n0 * w.stride + k0 * w.bits / 8 + 64 * line;
    return {const_cast<char*>(reinterpret_cast<const char*>(first)), w.stride, int(next.columns), true};
}

// Rows [from, to) of the slab times pieces [first, first + count). K is the outer loop: a part of x that the second-level cache holds
// meets all of them.
bool part_of_outputs(const Call& call, const Slab& slab, int64_t from, int64_t to, int64_t first, int64_t count) {
    const ProductBodies& body = call.body;
    const int nr = body.nr, mr = body.mr;
    const bool grouped = call.weights[0].groups > 1, wide = is_wide(call, slab);
    const int64_t kc = slab.kc, all = round_up(to - from, mr) * nr;
    auto* panels = static_cast<uint8_t*>(scratch(SLOT_PANEL, size_t(round_up(kc, 64) * nr * 2)));
    auto* c = static_cast<int32_t*>(scratch(SLOT_SUMS, size_t(count * all + (grouped ? count * all + mr * nr : count * nr)) * 4));
    if (!panels || !c) return false;
    auto* total = reinterpret_cast<float*>(c + count * all);
    if (grouped) memset(total, 0, size_t(count * all) * 4);
    auto* ones = c + count * all;  // sums of u alone, for zero points of x
    if (call.x.zero) memset(ones, 0, size_t(count * nr) * 4);
    for (int64_t k0 = 0, group = 0; k0 < call.k; k0 += kc, ++group) {
        const int64_t size = slab.size(k0);
        const bool last = k0 + kc >= call.k;
        for (int64_t i = 0; i < count; ++i) {
            const Piece piece = piece_of(call, first + i);
            lay_out_weights(call, *piece.weight, piece.n0, piece.columns, k0, size, panels);
            if (call.x.zero) add_levels(call, panels, k0, size, ones + i * nr);
            Piece next = {};
            int64_t next_k0 = k0;
            if (wide) {  // here, or in the task that is likely to follow
                const bool around = i + 1 == count && !last;
                next = piece_of(call, around ? first : smaller(first + i + 1, pieces_of_weights(call, nr) - 1));
                if (i + 1 == count) next_k0 = last ? 0 : k0 + kc;
            }
            Epilogue e = epilogue(call, piece.weight, slab.scales - slab.m0, slab.sums - slab.m0);
            e.ones = ones + i * nr;
            const bool meets = call.gate && i % 2, finishes = last && (meets || !call.gate);
            const Lines all_rows = lines_of(call, piece, slab.m0 + from, int(to - from));
            const int64_t bytes = call.m * piece.weight->n * int64_t(size_of(call.out_dtype));
            e.streams = finishes && piece.columns == nr && nr % 32 == 0 && go_past_caches(all_rows, bytes);
            // sums of a single part of K stay in the first-level cache: the next rows write over them
            const bool kept = k0 > 0 || !last || call.gate;
            for (int64_t r = from; r < to; r += mr) {
                const int rows = int(smaller(mr, slab.rows - r));
                const int8_t* block = slab.block(r, k0);
                int32_t* sums = c + (kept ? i * all + (r - from) * nr : 0);
                const Lines results = {all_rows.first + (r - from) * all_rows.stride, all_rows.stride, rows, false};
                Lines later = {};
                if (finishes && !e.streams)
                    later = results;
                else if (wide)  // the weights of narrow rows lie close together: the processor fetches them by itself
                    later = weights_ahead(call, slab, next, next_k0, (r - from) / mr, ceil_div(to - from, mr));
                body.kernel(block, size, rows, panels, call.grid.bits, sums, !grouped && k0 > 0, later);
                float* of_groups = grouped ? total + i * all + (r - from) * nr : nullptr;
                if (grouped) {
                    float group_sums[64];
                    sums_of_group(call, block, size, rows, panels + round_up(kc, 64) * nr, c + 2 * count * all, group_sums);
                    add_group(call, *piece.weight, piece.n0, piece.columns, group, sums, of_groups, rows, group_sums);
                }
                // right behind their last sums: what is written goes to memory while the next rows are multiplied
                if (!finishes) continue;
                if (meets) {
                    const int32_t* const both[2] = {sums - all, sums};
                    finish_gate(call, slab, r, rows, piece.n0, piece.columns, both, results, e.streams);
                } else {
                    body.finish(e, slab.m0 + r, rows, piece.n0, piece.columns, sums, of_groups, nr);
                }
            }
        }
    }
    finish_streams();
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
    const int64_t pieces = pieces_of_weights(call, body.nr), of_gate = call.gate ? 2 : 1;
    // each thread should have four parts at least, and rows of its own where they are many
    const int64_t fair = most * pieces / of_gate / (4 * threads()) + 1, fit = kPartBytes / smaller(slab.kpad, kPartWidth) + 1;
    const bool wide = is_wide(call, slab);
    const int64_t share = ceil_div(smaller(most, call.m), threads()), least = wide ? kOwnWideRows : kOwnRows;
    const int64_t own = share > least ? share : least;
    const int64_t part = round_up(smaller(smaller(most, own), smaller(fair, fit)), body.mr);
    // about as many panels in each task
    const int64_t panels = pieces / of_gate, even = 2 * threads() * ceil_div(panels, 2 * threads() * kPieces);
    const int64_t count = of_gate * (wide && pieces ? ceil_div(panels, even) : 1), counts = ceil_div(pieces, count);
    std::atomic<bool> complete{true};
    for (slab.m0 = 0; slab.m0 < call.m; slab.m0 += most) {
        slab.rows = smaller(most, call.m - slab.m0), slab.span = round_up(slab.rows, body.mr);
        if (!lay_out(call, slab)) return HB_ERROR_MEMORY;
        const int64_t tasks = ceil_div(slab.rows, part) * counts;
        take_tasks(tasks, tasks, [&](bool first) { first ? body.begin() : body.end(); }, [&](int64_t task) {
            const int64_t from = task / counts * part, to = smaller(from + part, slab.rows), first = task % counts * count;
            if (!part_of_outputs(call, slab, from, to, first, smaller(count, pieces - first))) complete = false;
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

}  // namespace hb
