// hb_fixed_matmul of bfloat16 with AMX tiles of bfloat16: what backward multiplies. Own.
//
// Levels are exact in bfloat16 and the operand is bfloat16 already, so that nothing is rounded but its products with a scale along
// K, where there is one; sums are float32. Half the rate of int8, but one product in place of two, and nothing to look for in
// the rows before. The right side is laid out as tiles once a call, pairs along K of 16 outputs; the left one, rows of 32 along K, by
// each task for itself, a part of K at a time. Whole tiles of rows that lie in one piece are read where they are.
#include "product.h"

#ifdef HB_WITH_AMX
#include "amx_block.inc"
#include "product.inc"
#include "transpose_avx512.inc"

namespace hb {
namespace {

constexpr int64_t kRightBytes = 16 << 20;  // of the right side that are laid out at a time
constexpr int64_t kPartBytes = 1 << 20;    // of rows read in place that a task has: half of a second-level cache
constexpr int64_t kPieces = 4;             // panels that they meet in one task, at most
constexpr int64_t kLaidRows = 256;         // rows that are laid out at a time; with their sums and panels half of such a cache
constexpr int64_t kLaidPieces = 16;        // panels that they meet in one task, at most
constexpr int64_t kStep = 32;              // numbers along K of one tile
constexpr int64_t kPart = 512;             // numbers along K for which sums stay in tiles: two panels fit the first-level cache
constexpr int64_t kTiles = 4;              // of a row that are laid out together: 256 bytes; divides kPart
constexpr int64_t kWide = 64;              // outputs that are laid out together: a cache line of codes

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

// `rows` rows where each lies in one piece: some tiles of a row, then of the next.
void lay_rows(const FixedOperand& a, const AnyFloat* scale, int64_t rows, int64_t, const Side& left) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int64_t k0 = 0; k0 < left.kpad; k0 += kTiles * kStep)
        for (int64_t r = 0; r < round_up(rows, kBlockRows); ++r) {
            const auto* from = static_cast<const uint16_t*>(a.data) + r * a.stride;
            char* to = left.tile(r / 16 * 16, k0) + r % 16 * 64;
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
inline void lay_square(const FixedOperand& a, const AnyFloat* scale, int64_t row, __mmask32 there, int64_t k, const Side& left) {
    const auto* data = static_cast<const uint16_t*>(a.data) + row;
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

// `rows` rows of that kind. The same numbers along K of all of them together: each lies on a page of its own. `there`: numbers along K
// that there are, more than the operand's k where it is a part.
void lay_columns(const FixedOperand& a, const AnyFloat* scale, int64_t rows, int64_t there, const Side& left) {
    const auto* data = static_cast<const uint16_t*>(a.data);
    for (int64_t k = 0; k < left.kpad; k += kStep) {
        for (int64_t i = k + kStep; i < smaller(k + 2 * kStep, there); ++i)
            for (int64_t r = 0; r < rows; r += 32) _mm_prefetch(reinterpret_cast<const char*>(data + i * a.step + r), _MM_HINT_T0);
        for (int64_t r = 0; r < rows; r += 32) lay_square(a, scale, r, first_of_32(rows - r), k, left);
    }
}

// Two rows of sixteen numbers -> pairs of them in bfloat16.
inline __m512i pairs_of(__m512 first, __m512 second) {
#if defined(__AVX512BF16__)
    if constexpr (kRoundsItself) {
        const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i places = _mm512_or_si512(lower, _mm512_slli_epi32(_mm512_add_epi32(lower, _mm512_set1_epi32(16)), 16));
        return _mm512_permutexvar_epi16(places, __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(second, first)));
    }
#endif
    return pair(rounded_up_there(first), rounded_up_there(second));
}

// Outputs [n, n + kWide) of the right side: pairs along K side by side.
void lay_codes(const FixedCall& call, const AnyFloat* scale, int64_t n0, int64_t n, int64_t outputs, const Side& right) {
    const __m512 zero = _mm512_set1_ps(call.zero_point);
    const int64_t k = call.a.k, columns = round_up(outputs, 32);
    const auto numbers = [&](int64_t i, int64_t column) HB_LAMBDA {
        if (i >= k || column >= outputs) return _mm512_setzero_ps();
        const __mmask16 there = __mmask16(first_of_32(smaller(outputs - column, 16)));
        const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, call.b + i * call.b_stride + n0 + n + column));
        const __m512 levels = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero);
        return scale ? _mm512_mul_ps(levels, _mm512_set1_ps(scale[i])) : levels;
    };
    for (int64_t k0 = 0; k0 < right.kpad; k0 += kStep)
        for (int64_t p = 0; p < 16; ++p)
            for (int64_t column = 0; column < columns; column += 16)
                _mm512_store_si512(right.tile(n + column, k0) + 64 * p, pairs_of(numbers(k0 + 2 * p, column), numbers(k0 + 2 * p + 1, column)));
}

template <int kOut>
void finish_rows(const FixedCall& call, const float* sums, int64_t row, int64_t rows, int64_t n, int64_t columns, bool streams) {
    for (int64_t r = 0; r < rows; ++r, sums += kBlockColumns) {
        write_row<kOut, kRoundsItself>(streams, at(call.out, kOut, (row + r) * call.out_stride + n), columns,
                                       [&](int64_t i, bool) HB_LAMBDA { return load16<HB_F32>(sums, i) * call.scale; });
    }
}

LeftRows rows_of(const FixedOperand& a, int64_t row, int64_t k0) {
    return {at(a.data, HB_BF16, row * a.stride + k0), 2 * a.stride, 64, 32 * a.stride};
}

using LayLeft = void (*)(const FixedOperand&, const AnyFloat*, int64_t, int64_t, const Side&);

// How the left side is read: laid out by `lay`, with the factors along K where there are some, or where it lies (NULL).
struct Left {
    LayLeft lay;
    const AnyFloat* scale;
};

// Rows [from, to) of the left side times outputs [n, end) of the right one, which begins with output n0. K is the outer loop: a part of
// the left side is laid out and meets all panels while it is near.
bool part_of_outputs(const FixedCall& call, const Left& left, const Side& right, int64_t from, int64_t to, int64_t n0, int64_t n,
                     int64_t end) {
    const int64_t kpad = right.kpad, span = round_up(to - from, kBlockRows), all = span * kBlockColumns;
    const int64_t written = call.m * call.n * int64_t(size_of(call.out_dtype));
    const bool kept = kpad > kPart;  // sums of a single part of K stay in the first-level cache: the next rows write over them
    const int64_t sums_there = kept ? ceil_div(end - n, kBlockColumns) * all : kBlockRows * kBlockColumns;
    auto* c = static_cast<float*>(scratch(SLOT_SUMS, size_t(sums_there) * 4));
    auto* own = left.lay ? static_cast<char*>(scratch(SLOT_CODES, size_t(2 * span * smaller(kpad, kPart)))) : nullptr;
    if (!c || (left.lay && !own)) return false;
    const auto finish = call.out_dtype == HB_F32 ? finish_rows<HB_F32> : call.out_dtype == HB_BF16 ? finish_rows<HB_BF16> : finish_rows<HB_F16>;
    for (int64_t k0 = 0; k0 < kpad; k0 += kPart) {
        const bool last = k0 + kPart >= kpad;
        const int64_t size = right.size(k0);
        const Side near = {own, span, size};
        if (left.lay) {
            FixedOperand a = call.a;
            a.data = at(a.data, HB_BF16, from * a.stride + k0 * a.step), a.k = smaller(a.k - k0, size);
            left.lay(a, left.scale ? left.scale + k0 : nullptr, to - from, call.a.k - k0, near);
        }
        for (int64_t column = n; column < end; column += kBlockColumns) {
            const int64_t columns = smaller(kBlockColumns, call.n - n0 - column);
            const auto* panels = reinterpret_cast<const uint8_t*>(right.block(column, k0));
            for (int64_t r = from; r < to; r += kBlockRows) {
                const int64_t rows = smaller(kBlockRows, to - r);
                float* sums = c + (kept ? (column - n) / kBlockColumns * all + (r - from) * kBlockColumns : 0);
                const LeftRows x = left.lay ? tiles_of_rows(near.block(r - from, 0), 2 * size) : rows_of(call.a, r, k0);
                const Lines results = lines_of(call.out, call.out_dtype, call.out_stride, r, int(rows), n0 + column);
                const bool streams = columns == kBlockColumns && go_past_caches(results, written);
                multiply_block<true>(x, 2 * size, int(rows), panels, sums, k0 > 0, last && !streams ? results : Lines{});
                if (last) finish(call, sums, r, rows, n0 + column, columns, streams);
            }
        }
    }
    finish_streams();
    return true;
}

// How many rows and panels a task has: what it works on at a time should fit half of a second-level cache.
struct Cut {
    int64_t rows, panels;

    // `there`: panels of the right side
    Cut(const FixedCall& call, bool in_place, int64_t kpad, int64_t there) {
        const int64_t workers = threads(), fair = ceil_div(call.m, workers);  // each thread has rows of its own
        const int64_t in_cache = in_place ? kPartBytes / (2 * kpad) + 1 : kLaidRows;
        // as many parts for each thread, but no small ones: each lays panels' worth of rows out, or reads panels anew
        const int64_t parts = round_up(ceil_div(call.m, smaller(fair, in_cache)), workers), least = 2 * kBlockRows;
        const int64_t equal = round_up(ceil_div(call.m, parts), kBlockRows);
        rows = equal > least ? equal : least;
        const int64_t tasks = in_place ? 2 * workers : workers;
        panels = smaller(in_place ? kPieces : kLaidPieces, ceil_div(there, ceil_div(tasks, ceil_div(call.m, rows))));
    }
};

}  // namespace

int fixed_bf16(const FixedCall& call) {
    const FixedOperand& a = call.a;
    if (a.dtype != HB_BF16 || (a.step != 1 && a.stride != 1)) return HB_ERROR_UNSUPPORTED;
    const int64_t kpad = round_up(a.k, kStep), most_outputs = round_up(smaller(call.n, kRightBytes / (2 * kpad) + 1), kWide);
    // factors along K go to the smaller side; to codes, which become floats anyway, they cost next to nothing
    const bool scales_codes = call.n < (kRoundsItself ? 4 : 1) * call.m;
    const AnyFloat *of_rows = scales_codes ? nullptr : a.scale, *of_codes = scales_codes ? a.scale : nullptr;
    // rows a multiple of 4 KB apart share a set of the first-level cache
    const bool in_place = a.step == 1 && !of_rows && call.m % kBlockRows == 0 && a.k % kStep == 0 && a.stride % 2048;
    const Left left = {in_place ? nullptr : a.step == 1 ? lay_rows : lay_columns, of_rows};
    auto* of_right = static_cast<char*>(scratch(SLOT_PANEL, size_t(2 * most_outputs * kpad)));
    if (!of_right) return HB_ERROR_MEMORY;
    std::atomic<bool> complete{true};
    for (int64_t n0 = 0; n0 < call.n; n0 += most_outputs) {
        const int64_t outputs = smaller(most_outputs, call.n - n0), wides = ceil_div(outputs, kWide);
        const Side right = {of_right, round_up(outputs, 32), kpad};
        take_tasks(wides, ceil_div(2 * wides * kpad, 1024), [](bool) {}, [&](int64_t task) {
            lay_codes(call, of_codes, n0, task * kWide, smaller(kWide, outputs - task * kWide), right);
        });
        const int64_t panels = ceil_div(outputs, kBlockColumns);
        const Cut cut(call, in_place, kpad, panels);
        const int64_t counts = ceil_div(panels, cut.panels), tasks = ceil_div(call.m, cut.rows) * counts, width = cut.panels * kBlockColumns;
        take_tasks(tasks, tasks, [](bool begins) { begins ? configure_tiles() : release_tiles(); }, [&](int64_t task) {
            const int64_t from = task / counts * cut.rows, n = task % counts * width, end = smaller(n + width, panels * kBlockColumns);
            if (!part_of_outputs(call, left, right, from, smaller(from + cut.rows, call.m), n0, n, end)) complete = false;
        });
    }
    return complete ? HB_OK : HB_ERROR_MEMORY;
}

}  // namespace hb
#else
int hb::fixed_bf16(const FixedCall&) { return HB_ERROR_UNSUPPORTED; }
#endif
