// hb_fixed_matmul of bfloat16 with AMX tiles of bfloat16: what backward multiplies. Own.
//
// Levels are exact in bfloat16 and the operand is bfloat16 already, so that nothing is rounded but its products with a scale along
// K, where there is one; sums are float32. Half the rate of int8, but one product in place of two, and nothing to look for in
// the rows before. Both sides are laid out as tiles once a call: rows of 32 along K on the left, pairs along K of 16 outputs on the
// right. Blocks and panels of one part of K follow each other. Whole tiles of rows that lie in one piece are read where they are.
#include "product.h"

#ifdef HB_WITH_AMX
#include "amx_block.inc"
#include "product.inc"
#include "transpose_avx512.inc"

namespace hb {
namespace {

constexpr int64_t kLeftBytes = 8 << 20, kRightBytes = 16 << 20;  // of each side that are laid out at a time
constexpr int64_t kPartBytes = 1 << 20;  // of the left side that meet one panel: half of a second-level cache
constexpr int64_t kStep = 32;            // numbers along K of one tile
constexpr int64_t kPart = 512;           // numbers along K for which sums stay in tiles: two panels fit the first-level cache
constexpr int64_t kPieces = 4;           // panels of one task, at most
constexpr int64_t kTiles = 4;            // of a row that are laid out together: 256 bytes; divides kPart
constexpr int64_t kGroup = 128;          // rows that are laid out together
constexpr int64_t kWide = 64;            // outputs that are laid out together: a cache line of codes

// One side, laid out: `span` rows (or outputs) in whole blocks, `kpad` along K, two bytes each.
struct Side {
    char* data;
    int64_t span, kpad;

    int64_t size(int64_t k0) const { return smaller(kPart, kpad - k0); }
    // 32 rows (or outputs) from `row` on, numbers [k0, k0 + size(k0)): two halves of 16, each one tile after another
    char* block(int64_t row, int64_t k0) const { return data + 2 * (k0 * span + row * size(k0)); }
    // the tile of 16 that begins with `row`, for the numbers from k on
    char* tile(int64_t row, int64_t k) const {
        const int64_t k0 = k / kPart * kPart;
        return block(row / 32 * 32, k0) + (row % 32 ? 32 * size(k0) : 0) + (k - k0) / kStep * 1024;
    }
};

inline __m512i upper_halves() { return _mm512_set1_epi32(int(0xffff0000u)); }

// float32 bits -> nearest even bfloat16 in the upper half; the lower half may hold anything
inline __m512i rounded_up_there(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline __m512i pair(__m512i first, __m512i second) {  // upper halves -> both in a word
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper_halves()));
}

inline __m512i scaled(__m512i halves, __m512 even, __m512 odd) {  // 32 bfloat16 times a factor each
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(halves, upper_halves()));
    return pair(rounded_up_there(_mm512_mul_ps(low, even)), rounded_up_there(_mm512_mul_ps(high, odd)));
}

// Rows [row, row + rows) where a row lies in one piece: some tiles of each row, then of the next.
void lay_rows(const FixedOperand& a, const AnyFloat* scale, int64_t m0, int64_t row, int64_t rows, const Side& left) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int64_t k0 = 0; k0 < left.kpad; k0 += kTiles * kStep)
        for (int64_t r = 0; r < round_up(rows, kBlockRows); ++r) {
            const auto* from = static_cast<const uint16_t*>(a.data) + (m0 + row + r) * a.stride;
            char* to = left.tile(row + r / 16 * 16, k0) + r % 16 * 64;
            for (int64_t k = k0; k < smaller(k0 + kTiles * kStep, left.kpad); k += kStep, to += 1024) {
                const __mmask32 there = r < rows ? first_of_32(a.k - k) : 0;
                __m512i numbers = _mm512_maskz_loadu_epi16(there, from + k);
                if (scale) {
                    const __m512 first = _mm512_maskz_loadu_ps(__mmask16(there), scale + k);
                    const __m512 second = _mm512_maskz_loadu_ps(__mmask16(there >> 16), scale + k + 16);
                    const __m512 even = _mm512_permutex2var_ps(first, places, second);
                    const __m512 odd = _mm512_permutex2var_ps(first, _mm512_add_epi32(places, _mm512_set1_epi32(1)), second);
                    numbers = scaled(numbers, even, odd);
                }
                _mm512_store_si512(to, numbers);
            }
        }
}

// 32 rows from `row` on where they are neighbours in memory, 32 numbers of each: pairs along K become words, which are transposed.
inline void lay_square(const FixedOperand& a, const AnyFloat* scale, int64_t m0, int64_t row, __mmask32 there, int64_t k, const Side& left) {
    const auto* data = static_cast<const uint16_t*>(a.data) + m0 + row;
    __m512i low[16], high[16];
    const auto at = [&](int64_t i) HB_LAMBDA {
        if (i >= a.k) return _mm512_setzero_si512();
        const __m512i numbers = _mm512_maskz_loadu_epi16(there, data + i * a.step);
        if (!scale) return numbers;
        const __m512 factor = _mm512_set1_ps(scale[i]);
        return scaled(numbers, factor, factor);
    };
    for (int64_t p = 0; p < 16; ++p) {
        const __m512i first = at(k + 2 * p), second = at(k + 2 * p + 1);
        low[p] = _mm512_unpacklo_epi16(first, second), high[p] = _mm512_unpackhi_epi16(first, second);
    }
    transpose(low), transpose(high);
    char *upper = left.tile(row, k), *lower = left.tile(row + 16, k);
    // lanes of 128 bits hold rows 8 L .. 8 L + 3 in `low` and the next four in `high`
    for (int r = 0; r < 16; ++r) {
        char* to = (r < 8 ? upper : lower) + 64 * (r % 8 / 4 * 8 + r % 4);
        _mm512_store_si512(to, low[r]), _mm512_store_si512(to + 64 * 4, high[r]);
    }
}

// Rows [row, row + rows) of that kind. The same numbers along K of all of them together: each lies on a page of its own.
void lay_columns(const FixedOperand& a, const AnyFloat* scale, int64_t m0, int64_t row, int64_t rows, const Side& left) {
    const auto* data = static_cast<const uint16_t*>(a.data) + m0 + row;
    for (int64_t k = 0; k < left.kpad; k += kStep) {
        for (int64_t i = k + kStep; i < smaller(k + 2 * kStep, a.k); ++i)
            for (int64_t r = 0; r < rows; r += 32) _mm_prefetch(reinterpret_cast<const char*>(data + i * a.step + r), _MM_HINT_T0);
        for (int64_t r = 0; r < rows; r += 32) lay_square(a, scale, m0, row + r, first_of_32(rows - r), k, left);
    }
}

// Outputs [n, n + kWide) of the right side: pairs along K side by side.
void lay_codes(const FixedCall& call, const AnyFloat* scale, int64_t n0, int64_t n, int64_t outputs, const Side& right) {
    const __m512 zero = _mm512_set1_ps(call.zero_point);
    const int64_t k = call.a.k, columns = round_up(outputs, 32);
    const auto numbers = [&](int64_t i, int64_t column) HB_LAMBDA {  // in upper halves
        if (i >= k || column >= outputs) return _mm512_setzero_si512();
        const __mmask16 there = __mmask16(first_of_32(smaller(outputs - column, 16)));
        const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, call.b + i * call.b_stride + n0 + n + column));
        const __m512 levels = _mm512_cvtepi32_ps(codes);
        if (!scale && call.zero_point == 0.0f) return _mm512_castps_si512(levels);
        return rounded_up_there(_mm512_mul_ps(_mm512_sub_ps(levels, zero), _mm512_set1_ps(scale ? scale[i] : 1.0f)));
    };
    for (int64_t k0 = 0; k0 < right.kpad; k0 += kStep)
        for (int64_t p = 0; p < 16; ++p)
            for (int64_t column = 0; column < columns; column += 16)
                _mm512_store_si512(right.tile(n + column, k0) + 64 * p,
                                   pair(numbers(k0 + 2 * p, column), numbers(k0 + 2 * p + 1, column)));
}

template <int kOut>
void finish_rows(const FixedCall& call, const float* sums, int64_t row, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
        char* out = at(call.out, kOut, (row + r) * call.out_stride + n);
        by_sixteen(columns, [&](int64_t i, bool whole) {
            store_some<kOut, kRoundsItself>(out, i, columns, whole, load16<HB_F32>(sums + r * kBlockColumns, i) * call.scale);
        });
    }
}

LeftRows rows_of(const FixedOperand& a, int64_t row, int64_t k0) {
    return {at(a.data, HB_BF16, row * a.stride + k0), 2 * a.stride, 64, 32 * a.stride};
}

// Rows [from, to) of the left side, which has no data where rows are read in place, times outputs [n, end). K is the outer loop: the
// part of the left side meets all panels while it is near.
bool part_of_outputs(const FixedCall& call, const Side& left, const Side& right, int64_t m0, int64_t from, int64_t to, int64_t n0,
                     int64_t n, int64_t end) {
    const int64_t kpad = left.kpad, all = round_up(to - from, kBlockRows) * kBlockColumns;
    const bool kept = kpad > kPart;  // sums of a single part of K stay in the first-level cache: the next rows write over them
    auto* c = static_cast<float*>(scratch(SLOT_SUMS, size_t(kept ? ceil_div(end - n, kBlockColumns) * all : kBlockRows * kBlockColumns) * 4));
    if (!c) return false;
    const auto finish = call.out_dtype == HB_F32 ? finish_rows<HB_F32> : call.out_dtype == HB_BF16 ? finish_rows<HB_BF16> : finish_rows<HB_F16>;
    for (int64_t k0 = 0; k0 < kpad; k0 += kPart) {
        const bool last = k0 + kPart >= kpad;
        const int64_t bytes = 2 * left.size(k0);
        for (int64_t column = n; column < end; column += kBlockColumns) {
            const int64_t columns = smaller(kBlockColumns, call.n - n0 - column);
            const auto* panels = reinterpret_cast<const uint8_t*>(right.block(column, k0));
            for (int64_t r = from; r < to; r += kBlockRows) {
                const int64_t rows = smaller(kBlockRows, to - r);
                float* sums = c + (kept ? (column - n) / kBlockColumns * all + (r - from) * kBlockColumns : 0);
                const LeftRows x = left.data ? tiles_of_rows(left.block(r, k0), bytes) : rows_of(call.a, m0 + r, k0);
                const Lines results = lines_of(call.out, call.out_dtype, call.out_stride, m0 + r, int(rows), n0 + column);
                multiply_block<true>(x, bytes, int(rows), panels, sums, k0 > 0, last ? results : Lines{});
                if (last) finish(call, sums, m0 + r, rows, n0 + column, columns);
            }
        }
    }
    return true;
}

}  // namespace

int fixed_bf16(const FixedCall& call) {
    const FixedOperand& a = call.a;
    if (a.dtype != HB_BF16 || (a.step != 1 && a.stride != 1)) return HB_ERROR_UNSUPPORTED;
    const int64_t kpad = round_up(a.k, kStep);
    const int64_t most_rows = round_up(smaller(call.m, kLeftBytes / (2 * kpad) + 1), kBlockRows);
    const int64_t most_outputs = round_up(smaller(call.n, kRightBytes / (2 * kpad) + 1), kWide);
    // each thread has rows of its own
    const int64_t fair = ceil_div(call.m, threads()), fit = kPartBytes / (2 * kpad) + 1;
    const int64_t part = round_up(smaller(smaller(most_rows, fair), fit), kBlockRows);
    const bool scales_codes = call.n < call.m;  // the smaller side
    const AnyFloat *of_rows = scales_codes ? nullptr : a.scale, *of_codes = scales_codes ? a.scale : nullptr;
    const auto lay = a.step == 1 ? lay_rows : lay_columns;
    // rows a multiple of 4 KB apart share a set of the first-level cache
    const bool in_place = a.step == 1 && !of_rows && call.m % kBlockRows == 0 && a.k % kStep == 0 && a.stride % 2048;
    auto* of_left = in_place ? nullptr : static_cast<char*>(scratch(SLOT_CODES, size_t(2 * most_rows * kpad)));
    auto* of_right = static_cast<char*>(scratch(SLOT_PANEL, size_t(2 * most_outputs * kpad)));
    if ((!in_place && !of_left) || !of_right) return HB_ERROR_MEMORY;
    std::atomic<bool> complete{true};
    for (int64_t n0 = 0; n0 < call.n; n0 += most_outputs) {
        const int64_t outputs = smaller(most_outputs, call.n - n0), wides = ceil_div(outputs, kWide);
        const Side right = {of_right, round_up(outputs, 32), kpad};
        for (int64_t m0 = 0; m0 < call.m; m0 += most_rows) {
            const int64_t rows = smaller(most_rows, call.m - m0), groups = in_place ? 0 : ceil_div(rows, kGroup);
            const Side left = {of_left, round_up(rows, kBlockRows), kpad};
            const int64_t first = m0 == 0 ? wides : 0, laid = groups + first;
            // both sides in turn, so that the share of each thread has the rows that it will multiply
            take_tasks(laid, ceil_div((4 * groups + 2 * first) * kpad, 1024), [](bool) {}, [&](int64_t task) {
                const int64_t group = task * groups / laid, next = (task + 1) * groups / laid, wide = task - group;
                if (next == group)
                    lay_codes(call, of_codes, n0, wide * kWide, smaller(kWide, outputs - wide * kWide), right);
                else
                    lay(a, of_rows, m0, group * kGroup, smaller(kGroup, rows - group * kGroup), left);
            });
            const int64_t panels = ceil_div(outputs, kBlockColumns), pieces = smaller(kPieces, ceil_div(panels, 2));
            const int64_t counts = ceil_div(panels, pieces), tasks = ceil_div(rows, part) * counts, width = pieces * kBlockColumns;
            take_tasks(tasks, tasks, [](bool begins) { begins ? configure_tiles() : release_tiles(); }, [&](int64_t task) {
                const int64_t from = task / counts * part, n = task % counts * width, end = smaller(n + width, panels * kBlockColumns);
                if (!part_of_outputs(call, left, right, m0, from, smaller(from + part, rows), n0, n, end)) complete = false;
            });
        }
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

}  // namespace hb
#else
int hb::fixed_bf16(const FixedCall&) { return HB_ERROR_UNSUPPORTED; }
#endif
