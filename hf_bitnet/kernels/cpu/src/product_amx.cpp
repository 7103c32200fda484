// Products with AMX int8 tiles for many rows; few rows take the AVX-512 VNNI body, which is bound by memory as well. Own.
//
// The tile unit is configured at the start of a thread's part of a region, because other libraries configure it too, and
// released at the end: a unit left in use costs every context switch 8 KB.
#include "product.h"

#ifdef HB_WITH_AMX
#include "amx_block.inc"
#include "panel_avx512.inc"
#include "round_avx512.inc"

namespace hb {
namespace {

constexpr int kCodes = 1024;  // for which sums stay in tiles: two panels of them stay in the first-level cache

// [2][size / 64][16][64]: every tile is 1 KB in one piece (rows at a stride of a power of two would share cache sets)
int8_t* row_of_tiles(int8_t* block, int r, int64_t size) { return block + r / 16 * 16 * size + r % 16 * 64; }

void pack_rows(const int8_t* x, int64_t stride, int rows, int64_t size, int8_t* out) {
    for (int r = 0; r < kBlockRows; ++r) {
        int8_t* to = row_of_tiles(out, r, size);
        for (int64_t at = 0; at < size; at += 64, to += 1024)
            _mm512_store_si512(to, r < rows ? _mm512_loadu_si512(x + r * stride + at) : _mm512_setzero_si512());
    }
}

int32_t round_to_tiles(const void* x, int dtype, int64_t count, float factor, int bits, int r, int64_t size, int64_t ahead,
                       int8_t* out) {
    return round_row(x, dtype, count, factor, {row_of_tiles(out, r, size), 1024, places_of(bits)}, size, ahead);
}

void kernel(const int8_t* x, int64_t size, int rows, const uint8_t* panels, int, int32_t* c, bool accumulate,
            const Lines& later) {
    multiply_block<false>(tiles_of_rows(x, size), size, rows, panels, c, accumulate, later);
}

const ProductBodies& bodies() {
    static const ProductBodies made = [] {
        ProductBodies all = *product_avx512vnni();  // the row form
        all.mr = kBlockRows, all.nr = kBlockColumns, all.kc = kCodes, all.k_unit = 64;
        all.finer = product_avx512vnni(), all.begin = configure_tiles, all.end = release_tiles;
        all.pack_rows = pack_rows, all.round_row = round_to_tiles, all.panel = panel_avx512, all.kernel = kernel, all.fixed_columns = nullptr;
        all.fixed_bf16 = fixed_bf16;
        all.finish = finish;
        return all;
    }();
    return made;
}

}  // namespace

const ProductBodies* product_amx() { return product_avx512vnni() ? &bodies() : nullptr; }

}  // namespace hb
#else
const hb::ProductBodies* hb::product_amx() { return nullptr; }
#endif
