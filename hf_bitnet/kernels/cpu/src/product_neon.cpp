// Products with the dot product of ARMv8.2 (`sdot`): levels up to 15 are as good as signed, 8-bit ones are flipped. Own.
//
// Compiled and run only under emulation so far; speed on a real processor has not been measured.
#include "product.h"

#ifdef HB_WITH_NEON
#include <arm_neon.h>

#include "fixed.inc"

namespace hb {
namespace {

constexpr int kVector = 16, kBlockRows = 6, kBlockColumns = 16;

void permute(const int8_t* x, int64_t k, int bits, int64_t chunks, int8_t* out) { permute_plain(x, k, bits, chunks, out, kVector); }

template <int kBits>
HB_INLINE int8x16_t load_level(const uint8_t* from, int64_t left, uint8x16_t flip, int shift) {
    uint8_t rest[16] = {};
    if (left < kVector) memcpy(rest, from, size_t(left));
    const uint8x16_t bytes = vld1q_u8(left < kVector ? rest : from);
    if constexpr (kBits == 8) return vreinterpretq_s8_u8(veorq_u8(bytes, flip));
    return vreinterpretq_s8_u8(vandq_u8(vshlq_u8(bytes, vdupq_n_s8(int8_t(-shift))), vdupq_n_u8((1 << kBits) - 1)));
}

// Four weight rows (the same one again where `stride` is 0) times one row of x.
template <int kBits>
int32x4_t dot_one(const uint8_t* data, int64_t stride, int64_t bytes, uint8x16_t flip, const int8_t* x) {
    int32x4_t acc[4];
    unroll<4>([&](auto r) HB_LAMBDA { acc[r] = vdupq_n_s32(0); });
    for (int64_t at = 0; at < bytes; at += kVector, x += kVector * (8 / kBits))
        unroll<8 / kBits>([&](auto j) HB_LAMBDA {
            const int8x16_t of_x = vld1q_s8(x + kVector * j);
            unroll<4>([&](auto r) HB_LAMBDA {
                acc[r] = vdotq_s32(acc[r], load_level<kBits>(data + r * stride + at, bytes - at, flip, kBits * j), of_x);
            });
        });
    return vpaddq_s32(vpaddq_s32(acc[0], acc[1]), vpaddq_s32(acc[2], acc[3]));
}

template <int kBits>
void dot_bits(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int rows, int32_t* c,
              int64_t c_stride) {
    const int64_t bytes = (w.k * kBits + 7) / 8;
    for (int64_t i = 0; i < count;) {
        const bool four = count - i >= 4;  // the last rows one by one: the other three places repeat them
        for (int m = 0; m < rows; ++m) {
            const int32x4_t sums = dot_one<kBits>(w.data + (row + i) * w.stride, four ? w.stride : 0, bytes, vdupq_n_u8(w.flip),
                                                  planes + m * planes_stride);
            memcpy(c + m * c_stride + i, &sums, four ? 16 : 4);
        }
        i += four ? 4 : 1;
    }
}

void dot(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int rows, int32_t* c,
         int64_t c_stride) {
    switch (w.bits) {
        case 1: return dot_bits<1>(w, row, count, planes, planes_stride, rows, c, c_stride);
        case 2: return dot_bits<2>(w, row, count, planes, planes_stride, rows, c, c_stride);
        case 4: return dot_bits<4>(w, row, count, planes, planes_stride, rows, c, c_stride);
        default: return dot_bits<8>(w, row, count, planes, planes_stride, rows, c, c_stride);
    }
}

template <int kRows>
void block(const int8_t* x, int64_t steps, const int8_t* panel, int32_t* c, bool accumulate) {
    int32x4_t acc[kRows][4];
    unroll<kRows>([&](auto r) HB_LAMBDA {
        unroll<4>([&](auto h) HB_LAMBDA { acc[r][h] = accumulate ? vld1q_s32(c + r * kBlockColumns + 4 * h) : vdupq_n_s32(0); });
    });
    for (int64_t s = 0; s < steps; ++s, x += 4 * kRows, panel += 64)
        unroll<4>([&](auto h) HB_LAMBDA {
            const int8x16_t level = vld1q_s8(panel + 16 * h);
            unroll<kRows>([&](auto r) HB_LAMBDA {
                int32_t four;
                memcpy(&four, x + 4 * r, 4);
                acc[r][h] = vdotq_s32(acc[r][h], level, vreinterpretq_s8_s32(vdupq_n_s32(four)));
            });
        });
    unroll<kRows>([&](auto r) HB_LAMBDA { unroll<4>([&](auto h) HB_LAMBDA { vst1q_s32(c + r * kBlockColumns + 4 * h, acc[r][h]); }); });
}

void kernel(const int8_t* x, int64_t size, int rows, const uint8_t* panels, int, int32_t* c, bool accumulate,
            const Lines& later) {
    fetch(later);
    using Block = void (*)(const int8_t*, int64_t, const int8_t*, int32_t*, bool);
    static constexpr Block blocks[kBlockRows] = {block<1>, block<2>, block<3>, block<4>, block<5>, block<6>};
    blocks[rows - 1](x, size / 4, reinterpret_cast<const int8_t*>(panels), c, accumulate);
}

constexpr ProductBodies kBodies = {
    true, kBlockRows, kBlockColumns, 512, 4, kVector, nullptr, nothing, nothing, sum_of, order, pack_rows_plain, panel_plain,
    kernel, permute, dot, nullptr, fixed_rows, fixed_columns, panel_columns, fixed_finish, finish,
};

}  // namespace

const ProductBodies* product_neon() { return &kBodies; }

}  // namespace hb
#else
const hb::ProductBodies* hb::product_neon() { return nullptr; }
#endif
