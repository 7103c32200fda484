// Products with AMX int8 tiles for many rows; few rows take the AVX-512 VNNI body, which is bound by memory as well. Own.
//
// Two tiles of x (16 rows, 64 codes) times two tiles of levels (64 codes, 16 outputs) into four tiles of sums, so that each
// tile that is loaded is used twice. The tile unit is configured at the start of a thread's part of a region, because other
// libraries configure it too, and released at the end: a unit left in use costs every context switch 8 KB.
#include "product.h"

#ifdef HB_WITH_AMX
#include "amx_tiles.inc"
#include "panel_avx512.inc"

namespace hb {
namespace {

constexpr int kBlockRows = 32, kBlockColumns = 32;
constexpr int kCodes = 2048;  // for which sums stay in tiles; 3 to 8 % faster than 512, where levels fit the first-level cache

// [2][size / 64][16][64]: every tile is 1 KB in one piece (rows at a stride of a power of two would share cache sets)
void pack_rows(const int8_t* x, int64_t stride, int rows, int64_t size, int8_t* out) {
    for (int r = 0; r < kBlockRows; ++r) {
        int8_t* to = out + r / 16 * 16 * size + r % 16 * 64;
        for (int64_t at = 0; at < size; at += 64, to += 1024)
            _mm512_store_si512(to, r < rows ? _mm512_loadu_si512(x + r * stride + at) : _mm512_setzero_si512());
    }
}

// Tiles 0..3: sums; 4, 5: x; 6, 7: levels.
template <bool kBoth>
void block(const int8_t* x, int64_t x_second, int64_t steps, const uint8_t* left, const uint8_t* right, int32_t* c, bool accumulate) {
    constexpr int64_t stride = kBlockColumns * 4;
    int32_t* second = c + 16 * kBlockColumns;
    if (accumulate) {
        load_tile<0>(c, stride), load_tile<1>(c + 16, stride);
        if (kBoth) load_tile<2>(second, stride), load_tile<3>(second + 16, stride);
    } else {
        zero_tile<0>(), zero_tile<1>();
        if (kBoth) zero_tile<2>(), zero_tile<3>();
    }
    for (int64_t s = 0; s < steps; ++s) {  // all loads first: the products then run while the next loads do
        for (int line = 0; line < 16; ++line) {  // x streams by from the second-level cache
            _mm_prefetch(reinterpret_cast<const char*>(x + 1024 * (s + 1) + 64 * line), _MM_HINT_T0);
            if (kBoth) _mm_prefetch(reinterpret_cast<const char*>(x + x_second + 1024 * (s + 1) + 64 * line), _MM_HINT_T0);
        }
        load_tile<4>(x + 1024 * s, 64);
        load_tile<6>(left + 1024 * s, 64);
        load_tile<7>(right + 1024 * s, 64);
        if (kBoth) load_tile<5>(x + x_second + 1024 * s, 64);
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        if (kBoth) multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(c, stride), store_tile<1>(c + 16, stride);
    if (kBoth) store_tile<2>(second, stride), store_tile<3>(second + 16, stride);
}

void kernel(const int8_t* x, int64_t size, int rows, const uint8_t* panels, int, int32_t* c, bool accumulate) {
    const auto run = rows > 16 ? block<true> : block<false>;
    run(x, 16 * size, size / 64, panels, panels + size * 16, c, accumulate);
}

const ProductBodies& bodies() {
    static const ProductBodies made = [] {
        ProductBodies all = *product_avx512vnni();  // the row form and the end of both
        all.mr = kBlockRows, all.nr = kBlockColumns, all.kc = kCodes, all.k_unit = 64;
        all.finer = product_avx512vnni(), all.begin = configure_tiles, all.end = release_tiles;
        all.pack_rows = pack_rows, all.panel = panel_avx512, all.kernel = kernel, all.fixed_columns = nullptr;
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
