// `linear`: cuts a product into pieces, spreads them over the threads, calls the bodies. Own.
//
// Up to kRowForm rows of x take the row form: x is quantized on the calling thread and one parallel region runs over the
// outputs of all weights. More rows take the matrix form in slabs of x: one region quantizes and lays out x, a second one
// runs over (part of the slab) x (panels), each thread unpacking its own panels.
#include "product.h"

namespace hb {
namespace {

constexpr int64_t kRowForm = 8;
constexpr int64_t kTile = 256;                   // outputs of the row form that are worked on together, at most
constexpr int64_t kThreadBytes = 64 << 10;       // weight bytes below which a second thread does not pay
constexpr int64_t kSlabBytes = 4 << 20;          // int8 bytes of x laid out at a time
constexpr int64_t kPartBytes = 1 << 20;          // int8 bytes of x that meet one panel: half of a second-level cache
constexpr int64_t kPartWidth = 2048;             // codes of a row of x that are counted for that

// One call, with all that both forms need.
struct Call {
    const ProductBodies& body;
    const hb_input& x;
    int64_t m, k;
    hb_grid grid;  // with `lowest` for the levels that the bodies see
    uint8_t flip;
    const hb_weight* weights;
    int64_t count;
    int out_dtype;
    bool ordered;  // K is taken in panel order; not where groups are no multiples of its unit

    Packed packed(const hb_weight& w) const {
        return {static_cast<const uint8_t*>(w.weight), w.weight_stride, k, grid.bits, flip};
    }
};

// The outputs of all weights, cut into pieces of `size` none of which spans two weights: how many there are, and the weight
// that piece *i of them belongs to, with *i then counted within it.
int64_t pieces_of_weights(const Call& call, int64_t size) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < call.count; ++i) pieces += ceil_div(call.weights[i].n, size);
    return pieces;
}
const hb_weight& weight_of(const Call& call, int64_t size, int64_t* i) {
    const hb_weight* weight = call.weights;
    while (*i >= ceil_div(weight->n, size)) *i -= ceil_div(weight++->n, size);
    return *weight;
}

// Row m of x as int8 codes (in `buffer`, or where they lie), its scale and the sum of its codes.
const int8_t* codes_of_row(const Call& call, int64_t m, int8_t* buffer, float* row_scratch, float* scale, int32_t* sum) {
    const hb_input& x = call.x;
    if (x.x_dtype == HB_I8) {
        const int8_t* row = static_cast<const int8_t*>(x.x) + m * x.x_stride;
        *sum = call.body.sum(row, call.k);
        const AnyFloat* scales = x.scale;
        *scale = scales ? scales[m] : 1.0f;
        return row;
    }
    const void* row = static_cast<const char*>(x.x) + m * x.x_stride * int64_t(size_of(x.x_dtype));
    if (x.norm_weight)
        *scale = rows().norm_quantize(row, x.x_dtype, call.k, x.norm_weight, x.norm_dtype, x.norm_eps, x.qmin, x.qmax, x.eps,
                                      row_scratch, buffer, sum);
    else
        *scale = rows().quantize(row, x.x_dtype, call.k, x.qmin, x.qmax, x.eps, buffer, sum);
    return buffer;
}

Epilogue epilogue(const Call& call, const hb_weight* weight, const float* scales, const int32_t* sums) {
    return {weight, scales, call.x.zero, sums, nullptr, call.k, call.grid.lowest, call.grid.step, call.grid.zero_point, call.out_dtype};
}

// ---- row form ----------------------------------------------------------------------------------------------------

// x in planes, and what scales need. Belongs to the calling thread; workers only read it.
struct RowInput {
    int8_t* planes;
    int64_t planes_stride, chunks;
    float scales[kRowForm];
    int32_t sums[kRowForm];
    float* lane_sums;     // (m, lanes), for group scales: (lowest - zero) * sum of x, what `dot_grouped` adds
    int32_t* lane_group;  // (lanes)
    int64_t lanes, m;
    int rows;             // of planes: m, and one of ones when the input has zero points

    // Row i alone, of an input without zero points.
    RowInput row(int64_t i) const {
        RowInput one = *this;
        one.planes += i * planes_stride, one.lane_sums += i * lanes;
        one.scales[0] = scales[i], one.sums[0] = sums[i];
        one.m = one.rows = 1;
        return one;
    }
};

bool prepare_rows(const Call& call, bool grouped, RowInput* input) {
    const ProductBodies& body = call.body;
    const int planes = 8 / call.grid.bits;
    input->chunks = ceil_div(call.k, int64_t(planes) * body.vector);
    input->planes_stride = input->chunks * planes * body.vector;
    input->m = call.m, input->rows = int(call.m) + (call.x.zero ? 1 : 0);
    const int64_t lanes = input->chunks * body.vector / 4, codes = round_up(call.k, 64) + 64;
    auto* codes_buffer = static_cast<int8_t*>(scratch(SLOT_CODES, size_t(codes)));
    input->planes = static_cast<int8_t*>(scratch(SLOT_PANEL, size_t(input->planes_stride * input->rows)));
    auto* row = static_cast<float*>(scratch(SLOT_ROW, size_t(call.x.norm_weight ? call.k + 16 : 16) * 4));
    auto* sums = static_cast<float*>(scratch(SLOT_SUMS, size_t(grouped ? lanes * (call.m + 1) : 16) * 4));
    if (!codes_buffer || !input->planes || !row || !sums) return false;
    input->lane_sums = sums, input->lanes = grouped ? lanes : 0;
    input->lane_group = reinterpret_cast<int32_t*>(sums + lanes * call.m);
    for (int64_t m = 0; m < call.m; ++m) {
        const int8_t* x = codes_of_row(call, m, codes_buffer, row, &input->scales[m], &input->sums[m]);
        body.permute(x, call.k, call.grid.bits, input->chunks, input->planes + m * input->planes_stride);
        if (!grouped) continue;
        const int64_t width = 4 * planes;  // codes under a lane
        const float offset = float(call.grid.lowest) - call.grid.zero_point;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            int32_t sum = 0;
            for (int64_t i = lane * width; i < smaller((lane + 1) * width, call.k); ++i) sum += x[i];
            input->lane_sums[m * lanes + lane] = float(sum) * offset;
        }
    }
    if (call.x.zero) {
        memset(codes_buffer, 1, size_t(call.k));
        body.permute(codes_buffer, call.k, call.grid.bits, input->chunks, input->planes + call.m * input->planes_stride);
    }
    if (grouped) {
        const int64_t groups = call.weights[0].groups, size = call.k / groups;
        for (int64_t lane = 0; lane < lanes; ++lane)
            input->lane_group[lane] = int32_t(smaller(lane * 4 * planes / size, groups - 1));
    }
    return true;
}

void rows_of_outputs(const Call& call, const RowInput& input, const hb_weight& weight, int64_t begin, int64_t count) {
    int32_t sums[(kRowForm + 1) * kTile];
    float grouped[kRowForm * kTile];
    const Packed packed = call.packed(weight);
    Epilogue e = epilogue(call, &weight, input.scales, input.sums);
    if (weight.groups > 1) {
        const float* scale = weight.scale + (weight.scale_rows == 1 ? 0 : begin * weight.groups);
        call.body.dot_grouped(packed, begin, count, input.planes, input.planes_stride, int(input.m), input.lane_sums, input.lane_group,
                              scale, weight.scale_rows == 1 ? 0 : weight.groups, float(call.grid.step),
                              grouped, kTile);
    } else {
        call.body.dot(packed, begin, count, input.planes, input.planes_stride, input.rows, sums, kTile);
    }
    e.ones = sums + input.m * kTile;
    call.body.finish(e, 0, input.m, begin, count, sums, weight.groups > 1 ? grouped : nullptr, kTile);
}

int linear_rows(const Call& call, const int64_t* row_of) {
    const bool grouped = call.weights[0].groups > 1;
    RowInput input;
    if (!prepare_rows(call, grouped, &input)) return HB_ERROR_MEMORY;
    int64_t outputs = 0;
    for (int64_t i = 0; i < call.count; ++i) outputs += call.weights[i].n;
    // long tiles are long streams from memory; each thread should have two at least
    const int64_t share = round_up(ceil_div(outputs, 2 * threads()), 16), tile = share > kTile ? kTile : share < 64 ? 64 : share;
    const int64_t tiles = pieces_of_weights(call, tile);
    const int64_t tile_bytes = tile * ceil_div(call.k * call.grid.bits, 8) * (row_of ? 1 : 1 + call.m / 4);
    take_tasks(tiles, ceil_div(tiles * tile_bytes, kThreadBytes), [](bool) {}, [&](int64_t t) {
        const hb_weight& weight = weight_of(call, tile, &t);
        const int64_t first = t * tile, outputs = smaller(tile, weight.n - first);
        if (row_of)
            rows_of_outputs(call, input.row(row_of[&weight - call.weights]), weight, first, outputs);
        else
            rows_of_outputs(call, input, weight, first, outputs);
    });
    return HB_OK;
}

// ---- matrix form -------------------------------------------------------------------------------------------------

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
    const Packed packed = call.packed(weight);
    const auto panel = call.ordered ? body.panel : panel_in_order;
    const int64_t apart = weight.out_stride * int64_t(size_of(call.out_dtype));
    for (int64_t k0 = 0, group = 0; k0 < call.k; k0 += kc, ++group) {
        const int64_t size = slab.size(k0);
        for (int p = 0; p < nr / 16; ++p)
            panel(packed, n0 + 16 * p, int(columns > 16 * p ? smaller(16, columns - 16 * p) : 0), k0, size,
                  panels + p * size * 16);
        if (call.x.zero)
            for (int64_t p = 0; p < nr / 16; ++p)
                for (int64_t i = 0; i < size; ++i)
                    for (int64_t j = 0; j < 16 && in_panel_order(k0 + i, packed.bits) < call.k; ++j) {
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
            const Lines results = {at(weight.out, call.out_dtype, (slab.m0 + r) * weight.out_stride + n0), apart, rows};
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
    const int64_t panels = pieces_of_weights(call, body.nr);
    // each thread should have four parts at least
    const int64_t fair = most * panels / (4 * threads()) + 1, fit = kPartBytes / smaller(slab.kpad, kPartWidth) + 1;
    const int64_t part = round_up(smaller(smaller(most, fair), fit), body.mr);
    std::atomic<bool> complete{true};
    for (slab.m0 = 0; slab.m0 < call.m; slab.m0 += most) {
        slab.rows = smaller(most, call.m - slab.m0), slab.span = round_up(slab.rows, body.mr);
        if (!lay_out(call, slab)) return HB_ERROR_MEMORY;
        const int64_t tasks = ceil_div(slab.rows, part) * panels;
        take_tasks(tasks, tasks, [&](bool first) { first ? body.begin() : body.end(); }, [&](int64_t task) {
            const int64_t from = task / panels * part;
            int64_t panel = task % panels;
            const hb_weight& weight = weight_of(call, body.nr, &panel);
            if (!part_of_outputs(call, slab, weight, from, smaller(from + part, slab.rows), panel * body.nr)) complete = false;
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

// ---- anything: zero points of x together with group scales, groups of odd size, no codes. Slow, and in double. ------

int linear_plain(const Call& call) {
    std::atomic<bool> complete{true};
    for (int64_t i = 0; i < call.count; ++i) {
        const hb_weight& w = call.weights[i];
        const Packed packed = call.packed(w);
        for_range(call.m, 1, [&](int64_t begin, int64_t end) {
            auto* codes = static_cast<int8_t*>(scratch(SLOT_PANEL, size_t(call.k + 64)));
            auto* row = static_cast<float*>(scratch(SLOT_ROW, size_t(call.k + 16) * 4));
            if (!codes || !row) return complete.store(false);
            for (int64_t m = begin; m < end; ++m) {
                float x_scale;
                int32_t sum;
                const int8_t* x = codes_of_row(call, m, codes, row, &x_scale, &sum);
                const double zero = call.x.zero ? load_float(call.x.zero, HB_F32, m) : 0.0, size = double(call.k) / double(w.groups);
                for (int64_t n = 0; n < w.n; ++n) {
                    const AnyFloat* scale = w.scale + (w.scale_rows == 1 ? 0 : n * w.groups);
                    double y = 0;
                    for (int64_t k = 0; k < call.k; ++k) {
                        const uint8_t u = level_at(packed, n, k);
                        const double stored = call.body.is_signed && packed.bits == 8 ? double(int8_t(u)) : double(u);
                        const double code = stored * call.grid.step + call.grid.lowest;
                        y += (x[k] - zero) * (code - call.grid.zero_point) * scale[int64_t(double(k) / size)];
                    }
                    y = y * x_scale + (w.bias ? load_float(w.bias, int(w.bias_dtype), n) : 0.0f);
                    store_float(w.out, call.out_dtype, m * w.out_stride + n, float(y));
                }
            }
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

bool sound(const hb_input& x, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count,
           int out_dtype) {
    if (m < 0 || k < 0 || count < 1 || (grid.bits != 1 && grid.bits != 2 && grid.bits != 4 && grid.bits != 8)) return false;
    if (!grid.packed && grid.bits != 8) return false;
    if (x.x_dtype != HB_I8 && (!is_float(x.x_dtype) || x.scale || x.zero)) return false;
    if (!is_float(out_dtype) || (x.norm_weight && !is_float(x.norm_dtype))) return false;
    for (int64_t i = 0; i < count; ++i) {
        const hb_weight& w = weights[i];
        if (w.n < 0 || w.groups < 1 || k % w.groups || (w.scale_rows != 1 && w.scale_rows != w.n)) return false;
        if (w.groups != weights[0].groups || (w.bias && !is_float(w.bias_dtype))) return false;
    }
    return true;
}

// Each weight on its own row, where the forms that take all rows have to serve.
int linear_each(const hb_input& input, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count, int out_dtype,
                const int64_t* row_of) {
    for (int64_t i = 0; i < count; ++i) {
        hb_input row = input;
        row.x = at(input.x, input.x_dtype, row_of[i] * input.x_stride);
        if (const int error = linear(row, 1, k, grid, &weights[i], 1, out_dtype, nullptr)) return error;
    }
    return HB_OK;
}

}  // namespace

int linear(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count,
           int out_dtype, const int64_t* row_of) {
    if (!sound(input, m, k, grid, weights, count, out_dtype)) return HB_ERROR_ARGUMENT;
    if (m == 0) return HB_OK;
    const ProductBodies& widest = product();
    const int64_t groups = weights[0].groups, group = k / groups;
    const bool fits = groups == 1 || group % widest.k_unit == 0 || !widest.finer;
    const ProductBodies& body = fits ? widest : *widest.finer;
    hb_grid seen = grid;
    // 8-bit levels are flipped to the signedness that the body multiplies; `lowest` follows
    uint8_t flip = 0;
    if (!grid.packed) {
        seen.lowest = body.is_signed ? 0 : -128;
        seen.step = 1;
        flip = body.is_signed ? 0 : 0x80;
    } else if (grid.bits == 8 && body.is_signed) {
        seen.lowest = grid.lowest + 128 * grid.step;
        flip = 0x80;
    }
    const bool ordered = groups == 1 || group % codes_of_word(grid.bits) == 0;
    const Call call{body, input, m, k, seen, flip, weights, count, out_dtype, ordered};
    const bool rows_served = groups == 1 || (body.dot_grouped && ordered), few = m <= kRowForm;
    if (row_of && (k == 0 || !few || !rows_served)) return linear_each(input, k, grid, weights, count, out_dtype, row_of);
    if (k == 0) return linear_plain(call);
    if (groups > 1 && (input.zero || !(few ? rows_served : group % body.k_unit == 0))) return linear_plain(call);
    return few ? linear_rows(call, row_of) : linear_blocks(call);
}

}  // namespace hb
