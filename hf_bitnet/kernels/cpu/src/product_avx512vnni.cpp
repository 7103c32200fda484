// Products with AVX-512 VNNI: 64 multiply-adds of unsigned levels and signed x an instruction. Own.
#include "product.h"

#ifdef HB_WITH_AVX512VNNI
#include <immintrin.h>

#include "fixed.inc"
#include "panel_avx512.inc"

namespace hb {
namespace {

constexpr int kVector = 64;
constexpr int kBlockRows = 12, kBlockColumns = 32;
constexpr int64_t kAhead = 1024;  // bytes of weights between use and prefetch

// ---- row form ----------------------------------------------------------------------------------------------------

template <int kBits>
constexpr int kPlanes = 8 / kBits;
template <int kBits>
constexpr char kMask = char((1 << kBits) - 1);

inline __m512i load_bytes(const uint8_t* at, int64_t left) {
    return left >= kVector ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8((1ull << left) - 1, at);
}

// The sums over the lanes of four accumulators.
inline __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Adds bytes times one row of x. The levels stay in their place in the byte: plane j is too large by 2^(bits j), and so is
// its accumulator, an exact multiple. That spares the shifts, which share a port with the dot product.
template <int kBits>
HB_INLINE void add_in_place(__m512i bytes, const int8_t* x, __m512i* acc) {
    if constexpr (kBits == 1) {  // eight planes in four accumulators: the upper half of the byte is moved down
        const __m512i high = _mm512_srli_epi16(bytes, 4);
        unroll<4>([&](auto j) HB_LAMBDA {
            const __m512i mask = _mm512_set1_epi8(char(1 << j));
            acc[j] = _mm512_dpbusd_epi32(acc[j], _mm512_and_si512(bytes, mask), _mm512_loadu_si512(x + kVector * j));
            acc[j] = _mm512_dpbusd_epi32(acc[j], _mm512_and_si512(high, mask), _mm512_loadu_si512(x + kVector * (j + 4)));
        });
    } else if constexpr (kBits == 8) {
        acc[0] = _mm512_dpbusd_epi32(acc[0], bytes, _mm512_loadu_si512(x));
    } else {
        unroll<kPlanes<kBits>>([&](auto j) HB_LAMBDA {
            const __m512i mask = _mm512_set1_epi8(char(kMask<kBits> << (kBits * j)));
            acc[j] = _mm512_dpbusd_epi32(acc[j], _mm512_and_si512(bytes, mask), _mm512_loadu_si512(x + kVector * j));
        });
    }
}

template <int kBits>
constexpr int kInPlace = kBits == 1 ? 4 : kPlanes<kBits>;

template <int kBits>
HB_INLINE __m512i join(const __m512i* acc) {
    __m512i sum = acc[0];
    unroll<kInPlace<kBits> - 1>([&](auto j) HB_LAMBDA { sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[j + 1], kBits * (j + 1))); });
    return sum;
}

template <int kBits>
HB_INLINE __m512i load_row(const uint8_t* from, int64_t left, __m512i flip) {
    _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
    const __m512i bytes = load_bytes(from, left);
    return kBits == 8 ? _mm512_xor_si512(bytes, flip) : bytes;
}

// Four weight rows (the same one again where `stride` is 0) times one row of x. Whole vectors and the rest apart: with the
// test within the loop GCC 12 writes all accumulators to the stack at every step.
template <int kBits>
HB_NOINLINE __m128i dot_one(const uint8_t* data, int64_t stride, int64_t bytes, __m512i flip, const int8_t* x) {
    __m512i acc[4][kInPlace<kBits>];
    unroll<4>([&](auto r) HB_LAMBDA { unroll<kInPlace<kBits>>([&](auto j) HB_LAMBDA { acc[r][j] = _mm512_setzero_si512(); }); });
    const int64_t whole = bytes / kVector * kVector;
    for (int64_t at = 0; at < whole; at += kVector, x += kVector * kPlanes<kBits>)
        unroll<4>([&](auto r) HB_LAMBDA { add_in_place<kBits>(load_row<kBits>(data + r * stride + at, kVector, flip), x, acc[r]); });
    if (whole < bytes)
        unroll<4>([&](auto r) HB_LAMBDA {
            add_in_place<kBits>(load_row<kBits>(data + r * stride + whole, bytes - whole, flip), x, acc[r]);
        });
    return sum_lanes(join<kBits>(acc[0]), join<kBits>(acc[1]), join<kBits>(acc[2]), join<kBits>(acc[3]));
}

// Four weight rows times kM rows of x; levels are moved down once and used kM times.
template <int kBits, int kM>
HB_NOINLINE void dot_some(const uint8_t* data, int64_t stride, int64_t bytes, __m512i flip, const int8_t* x, int64_t x_stride, __m128i* sums) {
    __m512i acc[kM][4];
    unroll<kM>([&](auto m) HB_LAMBDA { unroll<4>([&](auto r) HB_LAMBDA { acc[m][r] = _mm512_setzero_si512(); }); });
    const __m512i mask = _mm512_set1_epi8(kMask<kBits>);
    const auto step = [&](int64_t at, int64_t left) HB_LAMBDA {
        __m512i loaded[4];
        unroll<4>([&](auto r) HB_LAMBDA { loaded[r] = load_row<kBits>(data + r * stride + at, left, flip); });
        unroll<kPlanes<kBits>>([&](auto j) HB_LAMBDA {
            __m512i level[4];
            unroll<4>([&](auto r) HB_LAMBDA {
                level[r] = kBits == 8 ? loaded[r] : _mm512_and_si512(_mm512_srli_epi16(loaded[r], unsigned(kBits * j)), mask);
            });
            unroll<kM>([&](auto m) HB_LAMBDA {
                const __m512i of_x = _mm512_loadu_si512(x + m * x_stride + kVector * j);
                unroll<4>([&](auto r) HB_LAMBDA { acc[m][r] = _mm512_dpbusd_epi32(acc[m][r], level[r], of_x); });
            });
        });
        x += kVector * kPlanes<kBits>;
    };
    const int64_t whole = bytes / kVector * kVector;
    for (int64_t at = 0; at < whole; at += kVector) step(at, kVector);
    if (whole < bytes) step(whole, bytes - whole);
    unroll<kM>([&](auto m) HB_LAMBDA { sums[m] = sum_lanes(acc[m][0], acc[m][1], acc[m][2], acc[m][3]); });
}

template <int kBits>
void dot_bits(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int rows, int32_t* c,
              int64_t c_stride) {
    const int64_t bytes = (w.k * kBits + 7) / 8;
    const __m512i flip = _mm512_set1_epi8(char(w.flip));
    const auto put = [&](int64_t i, int64_t apart, bool four) {
        const uint8_t* data = w.data + (row + i) * w.stride;
        const int64_t stride = four ? apart * w.stride : 0;
        for (int m = 0; m < rows; m += 4) {
            const int8_t* x = planes + m * planes_stride;
            __m128i sums[4];
            const int now = rows - m < 4 ? rows - m : 4;
            switch (now) {
                case 1: sums[0] = dot_one<kBits>(data, stride, bytes, flip, x); break;
                case 2: dot_some<kBits, 2>(data, stride, bytes, flip, x, planes_stride, sums); break;
                case 3: dot_some<kBits, 3>(data, stride, bytes, flip, x, planes_stride, sums); break;
                default: dot_some<kBits, 4>(data, stride, bytes, flip, x, planes_stride, sums); break;
            }
            for (int j = 0; j < now; ++j) store_sums(sums[j], c + (m + j) * c_stride + i, four ? apart : 0);
        }
    };
    // four rows far apart: memory then delivers four streams, and each is read from end to end
    const int64_t quarter = count / 4;
    for (int64_t i = 0; i < quarter; ++i) put(i, quarter, true);
    for (int64_t i = 4 * quarter; i < count; ++i) put(i, 0, false);
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

// One weight row times one row of x; every 32-bit lane lies within one group, so lanes are scaled one by one.
template <int kBits>
float dot_groups(const uint8_t* data, int64_t bytes, __m512i flip, const int8_t* x, const float* lane_sums, const int32_t* lane_group,
                 const float* scale, float step) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0, lane = 0; at < bytes; at += kVector, x += kVector * kPlanes<kBits>, lane += 16) {
        __m512i acc[kInPlace<kBits>];
        unroll<kInPlace<kBits>>([&](auto j) HB_LAMBDA { acc[j] = _mm512_setzero_si512(); });
        add_in_place<kBits>(load_row<kBits>(data + at, bytes - at, flip), x, acc);
        const __m512 of_lane = _mm512_i32gather_ps(_mm512_loadu_si512(lane_group + lane), scale, 4);
        const __m512 sums = _mm512_cvtepi32_ps(join<kBits>(acc));
        total = _mm512_fmadd_ps(_mm512_fmadd_ps(sums, _mm512_set1_ps(step), _mm512_loadu_ps(lane_sums + lane)), of_lane, total);
    }
    return _mm512_reduce_add_ps(total);
}

void dot_grouped(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int rows,
                 const float* lane_sums, const int32_t* lane_group, const float* scale, int64_t scale_stride, float step, float* c,
                 int64_t c_stride) {
    const int64_t bytes = (w.k * w.bits + 7) / 8, lanes = (bytes + kVector - 1) / kVector * 16;
    const __m512i flip = _mm512_set1_epi8(char(w.flip));
    auto* one = w.bits == 1 ? dot_groups<1> : w.bits == 2 ? dot_groups<2> : w.bits == 4 ? dot_groups<4> : dot_groups<8>;
    for (int64_t i = 0; i < count; ++i)
        for (int m = 0; m < rows; ++m)
            c[m * c_stride + i] = one(w.data + (row + i) * w.stride, bytes, flip, planes + m * planes_stride, lane_sums + m * lanes,
                                      lane_group, scale + i * scale_stride, step);
}

// ---- matrix form -------------------------------------------------------------------------------------------------

template <int kRows>
HB_NOINLINE void block(const int8_t* x, int64_t steps, const uint8_t* left, const uint8_t* right, int32_t* c, bool accumulate) {
    __m512i acc[kRows][2];
    unroll<kRows>([&](auto r) HB_LAMBDA {
        acc[r][0] = accumulate ? _mm512_loadu_si512(c + r * kBlockColumns) : _mm512_setzero_si512();
        acc[r][1] = accumulate ? _mm512_loadu_si512(c + r * kBlockColumns + 16) : _mm512_setzero_si512();
    });
    for (int64_t s = 0; s < steps; ++s, x += 4 * kRows) {
        const __m512i u = _mm512_loadu_si512(left + 64 * s), v = _mm512_loadu_si512(right + 64 * s);
        _mm_prefetch(reinterpret_cast<const char*>(x) + 1024, _MM_HINT_T0);  // x streams by, the panels stay
        unroll<kRows>([&](auto r) HB_LAMBDA {
            int32_t four;
            memcpy(&four, x + 4 * r, 4);
            const __m512i of_x = _mm512_set1_epi32(four);
            acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], u, of_x);
            acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], v, of_x);
        });
    }
    unroll<kRows>([&](auto r) HB_LAMBDA {
        _mm512_storeu_si512(c + r * kBlockColumns, acc[r][0]);
        _mm512_storeu_si512(c + r * kBlockColumns + 16, acc[r][1]);
    });
}

void kernel(const int8_t* x, int64_t size, int rows, const uint8_t* panels, int, int32_t* c, bool accumulate,
            const Lines& later) {
    fetch(later);
    using Block = void (*)(const int8_t*, int64_t, const uint8_t*, const uint8_t*, int32_t*, bool);
    static constexpr Block blocks[kBlockRows] = {block<1>, block<2>, block<3>, block<4>,  block<5>,  block<6>,
                                                 block<7>, block<8>, block<9>, block<10>, block<11>, block<12>};
    blocks[rows - 1](x, size / 4, panels, panels + size * 16, c, accumulate);
}

constexpr ProductBodies kBodies = {
    false,   kBlockRows, kBlockColumns, 512, 4, kVector, nullptr, nothing, nothing, sum_of, order, pack_rows_plain, panel_avx512,
    kernel,  permute_avx512, dot, dot_grouped, fixed_rows, fixed_columns, panel_columns, fixed_finish, finish,
};

}  // namespace

const ProductBodies* product_avx512vnni() { return &kBodies; }

}  // namespace hb
#else
const hb::ProductBodies* hb::product_avx512vnni() { return nullptr; }
#endif
