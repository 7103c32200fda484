// Attention of many tokens of bfloat16 with AMX tiles. Own.
//
// What is rounded are the weights of the softmax, to bfloat16, as in torch's fused attention; their sum is of unrounded ones.
#include "attend_tokens.h"

#ifdef HB_WITH_AMX
#include "amx_block.inc"
#include "attend_tokens.inc"
#include "transpose_avx512.inc"

namespace hb {
namespace {

constexpr int64_t kTile = 1024, kTileKeys = 32;  // bytes; numbers along K of one tile

struct TileProducts {
    static constexpr int64_t kNumber = 2, kWeights = 2;

    // [wide / 32] tiles of [16 pairs of numbers][16 keys][2]
    static void lay_keys(const char* from, int, int64_t stride, int64_t count, int64_t d, int64_t wide, void* to) {
        const auto* keys = reinterpret_cast<const uint16_t*>(from);
        for (int64_t c = 0; c < wide; c += kTileKeys) {
            __m512i pairs[16];
            unroll<16>([&](auto key) HB_LAMBDA {
                pairs[key] = _mm512_maskz_loadu_epi16(key < count ? first_of_32(d - c) : 0, keys + key * stride + c);
            });
            transpose(pairs);
            char* tile = static_cast<char*>(to) + c / kTileKeys * kTile;
            unroll<16>([&](auto pair) HB_LAMBDA { _mm512_storeu_si512(tile + 64 * pair, pairs[pair]); });
        }
    }

    // for each 16 columns [kAttendKeys / 32] tiles of [16 pairs of keys][16 columns][2]
    static void lay_values(const char* from, int, int64_t stride, int64_t count, int64_t d, int64_t wide, void* to) {
        const auto* values = reinterpret_cast<const uint16_t*>(from);
        for (int64_t key = 0; key < round_up(count, kTileKeys); key += 2)
            for (int64_t c = 0; c < wide; c += 16) {
                const auto words = [&](int64_t at) {
                    const __mmask16 there = at < count ? __mmask16(first_of_32(smaller(d - c, 16))) : __mmask16(0);
                    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, values + at * stride + c));
                };
                const __m512i pair = _mm512_or_si512(words(key), _mm512_slli_epi32(words(key + 1), 16));
                _mm512_storeu_si512(static_cast<char*>(to) + 2 * c * kAttendKeys + key / kTileKeys * kTile + key % kTileKeys / 2 * 64, pair);
            }
    }

    // two halves of 16 rows, [wide / 32] tiles of [16][32] each
    static void lay_queries(const Attention& a, int64_t token, int64_t head, int64_t rows, int64_t wide, void* to) {
        const auto* q = reinterpret_cast<const uint16_t*>(a.q) + token * a.token_stride + head * a.head_dim;
        for (int64_t r = 0; r < kAttendRows; ++r)
            for (int64_t c = 0; c < wide; c += kTileKeys)
                _mm512_storeu_si512(static_cast<char*>(to) + r / 16 * 32 * wide + c / kTileKeys * kTile + r % 16 * 64,
                                    _mm512_maskz_loadu_epi16(r < rows ? first_of_32(a.head_dim - c) : 0, q + r * a.token_stride + c));
    }

    static void scores(const void* queries, const char* keys, int64_t wide, int64_t rows, float* to) {
        multiply_block<true>(tiles_of_rows(queries, 2 * wide), 2 * wide, int(rows), reinterpret_cast<const uint8_t*>(keys), to, false, {});
    }

    // two halves of 16 rows, [kAttendKeys / 32] tiles each
    static void weigh(Floats e0, Floats e1, int64_t row, int64_t key, float*, void* weights) {
        auto* to = static_cast<char*>(weights) + row / 16 * 32 * kAttendKeys + key / kTileKeys * kTile + row % 16 * 64;
        store16<HB_BF16, kRoundsItself>(to, 0, e0), store16<HB_BF16, kRoundsItself>(to, 16, e1);
    }

    static void add(const float*, const void* weights, const char* values, int64_t column, int64_t keys, int64_t rows, float* sums,
                    bool more) {
        const auto* right = reinterpret_cast<const uint8_t*>(values) + 2 * column * kAttendKeys;
        multiply_panels<true>(tiles_of_rows(weights, 2 * kAttendKeys), keys / kTileKeys, int(rows), right, right + 32 * kAttendKeys,
                              sums, more, {});
    }
};

constexpr AttendBodies kBodies = attend_bodies<TileProducts>(configure_tiles, release_tiles);

}  // namespace

const AttendBodies* attend_amx() { return &kBodies; }

}  // namespace hb
#else
const hb::AttendBodies* hb::attend_amx() { return nullptr; }
#endif
