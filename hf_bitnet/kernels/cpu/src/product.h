// The bodies of the products: what one instruction set must bring. Own.
//
// Weights lie as in the checkpoint: row n holds its codes along K, 8 / bits neighbours in a byte, low bits first. Two forms:
//
// Row form (few rows of x): each weight row is a dot product. A vector of V weight bytes holds V codes in each of its
//   8 / bits bit planes, so x is permuted once into planes of V bytes instead of moving weights about.
// Matrix form: 16 weight rows become a panel [K / 4][16][4], one level a byte, which is what VNNI, AMX tiles and sdot
//   want; blocks of `mr` rows of x meet panels of `nr` outputs in a micro-kernel. Here too x is moved instead of weights: K is
//   taken in panel order, where a step has the same plane of the four bytes of a 32-bit word, so that unpacking is a shift and a
//   mask of words.
//
// Sums are of x * u, u the stored level; the way back to codes and values is in the epilogue:
//   sum x (code - zero) = step * sum x u + (lowest - zero) * sum x.
#pragma once

#include "internal.h"

namespace hb {

// Where the bytes of a weight matrix start and how they are read.
struct Packed {
    const uint8_t* data;
    int64_t stride;  // bytes between rows
    int64_t k;       // codes in a row
    int bits;
    uint8_t flip;    // xor for 8 bits: 0x80 turns signed codes into levels and back
};

static inline uint8_t level_at(const Packed& w, int64_t row, int64_t k) {
    const uint8_t byte = w.data[row * w.stride + k * w.bits / 8];
    return w.bits == 8 ? byte ^ w.flip : uint8_t((byte >> (k * w.bits % 8)) & ((1 << w.bits) - 1));
}

// Codes of a 32-bit word of weights: the unit of panel order.
constexpr int codes_of_word(int bits) { return 32 / bits; }
// The place in K of the code at place `at` of panel order.
static inline int64_t in_panel_order(int64_t at, int bits) {
    const int64_t unit = codes_of_word(bits), in_unit = at % unit, planes = unit / 4;
    return at - in_unit + in_unit % 4 * planes + in_unit / 4;
}

// The float operand of hb_fixed_matmul: element (row, i) at row * stride + i * step, times scale[i] where there is one.
struct FixedOperand {
    const void* data;
    int dtype;
    int64_t stride, step, k;
    const float* scale;
};

// A call of hb_fixed_matmul.
struct FixedCall {
    FixedOperand a;
    int64_t m;
    const int8_t* b;
    int64_t b_stride, n;
    float zero_point, scale;
    void* out;
    int out_dtype;
    int64_t out_stride;
};

// The left operand of a matrix form, laid out in int8 from row m0 on, and what scales need. Codes [k0, k0 + kc) of all blocks of
// `mr` rows lie one after another, so that it streams by. hb_fixed_matmul has two rows of bytes for each of its rows.
struct Slab {
    int64_t m0, rows, span, kpad, kc;  // span: rows of bytes in whole blocks
    int8_t* blocks;
    float* scales;  // (rows); of this slab
    int32_t* sums;

    int64_t size(int64_t k0) const { return smaller(kc, kpad - k0); }
    int8_t* block(int64_t byte_row, int64_t k0) const { return blocks + k0 * span + byte_row * size(k0); }
};

constexpr int kColumnGroup = 48;  // a multiple of the pairs of rows in every body's blocks

struct ProductBodies {
    bool is_signed;  // 8-bit levels are wanted as int8, not as uint8
    int mr, nr;      // block of the matrix form
    int kc;          // codes of a panel that are worked on at a time; a multiple of 64
    int k_unit;      // a part of K must be a multiple of this
    int vector;      // V, bytes of the row form

    const ProductBodies* finer;  // of another body for parts that `k_unit` does not divide; NULL: none has a smaller one

    void (*begin)();  // once per thread and region, around `kernel`
    void (*end)();
    int32_t (*sum)(const int8_t* x, int64_t k);
    // a row of x, `size` codes (a multiple of 64), to panel order where it lies
    void (*order)(int8_t* x, int64_t size, int bits);
    // rows <= mr of int8 x, `size` codes -> the body's own layout of rows (AMX: mr) * size bytes
    void (*pack_rows)(const int8_t* x, int64_t stride, int rows, int64_t size, int8_t* out);
    // codes [k0, k0 + size) of `rows` <= 16 weight rows -> [size / 4][16][4] in panel order, both multiples of its unit; outside
    // the matrix anything may stand: x is 0 there, and results are not kept
    void (*panel)(const Packed& w, int64_t row, int rows, int64_t k0, int64_t size, uint8_t* out);
    // c (mr, nr) (+)= a block of x times nr / 16 panels that are `size * 16` bytes each; `later`: lines that are fetched meanwhile,
    // or before
    void (*kernel)(const int8_t* block, int64_t size, int rows, const uint8_t* panels, int bits, int32_t* c, bool accumulate,
                   const Lines& later);
    // int8 x (k) -> planes for `bits`, chunks * (8 / bits) * V bytes, padded with zeros
    void (*permute)(const int8_t* x, int64_t k, int bits, int64_t chunks, int8_t* out);
    // c[m * c_stride + i] = sum over K of x_m * u, for weight rows row .. row + count, m rows of planes
    void (*dot)(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int m, int32_t* c,
                int64_t c_stride);
    // the same with group scales, in float32: sum_g scale[g] * (step * sum_g x u + offset * sum_g x). `lane_sums` (m, chunks *
    // V / 4) holds the sums of x under each 32-bit lane, `lane_group` the group of each lane. NULL: use the matrix form.
    void (*dot_grouped)(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int m,
                        const float* lane_sums, const int32_t* lane_group, const float* scale, int64_t groups, float step, float* c,
                        int64_t c_stride);
    // ---- for hb_fixed_matmul, see fixed.inc ----
    // rows [row, row + count) of the float operand -> two strips of int8 for each, `kpad` apart, with their sums and scale
    void (*fixed_rows)(const FixedOperand& a, int64_t row, int count, int64_t kpad, float* values, int8_t* strips, float* scales,
                       int32_t* sums);
    // the same for columns that are neighbours in memory (stride 1), straight into the blocks of a slab from its row `first` on,
    // `pairs` of them in a block; width <= kColumnGroup. NULL where blocks do not lie as pack_rows_plain makes them.
    void (*fixed_columns)(const FixedOperand& a, int64_t row, int width, const Slab& slab, int64_t first, int pairs);
    // b (k, n) int8, codes [k0, k0 + size) of outputs n0 .. n0 + columns (<= 16) -> [size / 4][16][4], xor flip
    void (*panel_columns)(const int8_t* b, int64_t stride, int64_t k, uint8_t flip, int64_t k0, int64_t size, int64_t n0, int columns,
                          uint8_t* out);
    // the sums of a high and a low strip, readable to a multiple of 16 -> `count` results
    void (*fixed_finish)(const int32_t* high, const int32_t* low, int64_t count, const int32_t* sums, int32_t lowest, float zero_point,
                         float row_scale, float scale, void* out, int out_dtype);
    // sums (rows, count), the rows `stride` apart and readable to a multiple of 16, -> results of rows m.. and outputs n..; with
    // group scales their float sums are in `grouped`, laid out alike
    void (*finish)(const struct Epilogue& e, int64_t m, int64_t rows, int64_t n, int64_t count, const int32_t* c, const float* grouped,
                   int64_t stride);
    // hb_fixed_matmul with the operand in bfloat16, as it is, times levels in bfloat16; HB_ERROR_UNSUPPORTED: the form above must
    // serve. NULL where bfloat16 is not multiplied faster than two bytes.
    int (*fixed_bf16)(const FixedCall& call) = nullptr;
    // `count` numbers of a row of float x times `factor`, as codes in panel order for `bits` >= 2, to row r of what pack_rows makes, the
    // rest of its `size` codes 0 -> their sum. What lies `ahead` bytes further is fetched meanwhile, where that is not 0. NULL: rows are
    // quantized, ordered and packed one step after another.
    int32_t (*round_row)(const void* x, int dtype, int64_t count, float factor, int bits, int r, int64_t size, int64_t ahead,
                         int8_t* out) = nullptr;
};

// All that turns integer sums into results.
struct Epilogue {
    const hb_weight* weight;
    const float* x_scale;   // (m)
    const float* x_zero;    // (m) or NULL
    const int32_t* x_sum;   // (m)
    const int32_t* ones;    // with x_zero: sums of u itself for the outputs at hand, laid out as a row of `c`
    int64_t k;
    int32_t lowest, step;
    float zero_point;
    int out_dtype;
    bool streams;  // results are whole lines of the cache, 32 of them at least, and go past it
};

int fixed_bf16(const FixedCall& call);  // of the AMX level

// Where results of two products meet: out (m, n) = activation of the first times the second.
struct Gate {
    // see DecodeBodies::gate
    void (*meet)(const void* gates, const void* ups, int dtype, int activation, int64_t n, void* out);
    int activation;
    void* out;
    int64_t out_stride;
};

// hb_linear of two weights of equal size, whose own results, which are nowhere needed, meet in `gate`. HB_ERROR_UNSUPPORTED: one
// after another, then.
int linear_gate(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int out_dtype,
                const Gate& gate);

// hb_linear. With `row_of`, weight i meets row row_of[i] of float x alone and has one row of results; at most a few rows.
int linear(const hb_input& input, int64_t m, int64_t k, const hb_grid& grid, const hb_weight* weights, int64_t count,
           int out_dtype, const int64_t* row_of);

}  // namespace hb
