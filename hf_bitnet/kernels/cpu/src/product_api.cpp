// `linear`: cuts a product into pieces, spreads them over the threads, calls the bodies. Own.
//
// Up to kRowForm rows of x take the row form: x is quantized on the calling thread and one parallel region runs over the
// outputs of all weights. More rows take the matrix form in slabs of x: one region quantizes and lays out x, a second one
// runs over (part of the slab) x (panels), each thread unpacking its own panels.
#include "product_call.h"

namespace hb {
namespace {

constexpr int64_t kRowForm = 8;
constexpr int64_t kTile = 256;                   // outputs of the row form that are worked on together, at most
constexpr int64_t kThreadBytes = 64 << 10;       // weight bytes below which a second thread does not pay

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

Call call_of(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count, int out_dtype) {
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
    return {body, input, m, k, seen, flip, weights, count, out_dtype, ordered, nullptr};
}

}  // namespace

int linear(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count,
           int out_dtype, const int64_t* row_of) {
    if (!sound(input, m, k, grid, weights, count, out_dtype)) return HB_ERROR_ARGUMENT;
    if (m == 0) return HB_OK;
    const Call call = call_of(input, m, k, grid, weights, count, out_dtype);
    const int64_t groups = weights[0].groups;
    const bool rows_served = groups == 1 || (call.body.dot_grouped && call.ordered), few = m <= kRowForm;
    if (row_of && (k == 0 || !few || !rows_served)) return linear_each(input, k, grid, weights, count, out_dtype, row_of);
    if (k == 0) return linear_plain(call);
    if (groups > 1 && (input.zero || !(few ? rows_served : k / groups % call.body.k_unit == 0))) return linear_plain(call);
    return few ? linear_rows(call, row_of) : linear_blocks(call);
}

int linear_gate(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int out_dtype,
                const Gate& gate) {
    if (m <= kRowForm) return HB_ERROR_UNSUPPORTED;  // every token that is decoded asks
    if (!sound(input, m, k, grid, weights, 2, out_dtype)) return HB_ERROR_ARGUMENT;
    const bool plain = weights[0].n == weights[1].n && weights[0].groups == 1 && weights[0].scale && weights[1].scale && !input.zero;
    if (k == 0 || !plain) return HB_ERROR_UNSUPPORTED;
    Call call = call_of(input, m, k, grid, weights, 2, out_dtype);
    if (call.body.mr * call.body.nr > kBlockMost) return HB_ERROR_UNSUPPORTED;
    call.gate = &gate;
    return linear_blocks(call);
}

}  // namespace hb
