// What the source files share: dtype conversion, threads, scratch memory, and the table of bodies of each level. Own.
#pragma once

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <atomic>

#include "hf_bitnet_cpu.h"

namespace hb {

// numbers at any address, whatever type they were stored as. Not for template arguments, `auto` or lambda captures:
// they lose the attributes
typedef uint16_t AnyHalf __attribute__((aligned(1), may_alias));
typedef uint32_t AnyWord __attribute__((aligned(1), may_alias));
typedef float AnyFloat __attribute__((aligned(1), may_alias));

// ---- conversion, also where there is no hardware for it. `static`: each file compiles its own copy with its own instruction
// set; one copy shared by the linker could run AVX-512 code on a processor that lacks it ----
static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float from_bf16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }
// round to nearest even; a NaN stays one
static inline uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float from_f16(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
    float value = float(mantissa) * bits_to_float(0x33800000u);  // 2^-24
    return sign ? -value : value;
}
static inline uint16_t to_f16(float value) {
    uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or beyond
    if (magnitude < 0x38800000u) {                                // subnormal: let the float adder round to 2^-24
        float rounded = bits_to_float(magnitude) + bits_to_float(0x3f000000u);
        return uint16_t(sign | (float_to_bits(rounded) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

static inline bool is_float(int64_t dtype) { return dtype == HB_F32 || dtype == HB_BF16 || dtype == HB_F16; }
static inline size_t size_of(int dtype) { return dtype == HB_F32 ? 4 : dtype == HB_I8 ? 1 : 2; }
static inline const char* at(const void* data, int dtype, int64_t element) {
    return static_cast<const char*>(data) + element * int64_t(size_of(dtype));
}
static inline char* at(void* data, int dtype, int64_t element) { return static_cast<char*>(data) + element * int64_t(size_of(dtype)); }

// Lines of memory, `stride` bytes apart, that are fetched before or while sums are computed: those that results will be written to, where
// they do not go past the caches (rows of results are far apart, and stores would wait for their lines one after another), or weights
// that come next.
struct Lines {
    char* first;
    int64_t stride;
    int count;
    bool only_read;
};
static inline void fetch_line(const char* line, bool only_read) {
    only_read ? __builtin_prefetch(line, 0, 2) : __builtin_prefetch(line, 1);
}
static inline void fetch(const Lines& lines) {
    for (int i = 0; i < lines.count; ++i) fetch_line(lines.first + i * lines.stride, lines.only_read);
}
// Where `rows` rows of a matrix of results begin in column n.
static inline Lines lines_of(void* out, int dtype, int64_t stride, int64_t row, int rows, int64_t n) {
    return {at(out, dtype, row * stride + n), stride * int64_t(size_of(dtype)), rows, false};
}

// Whether `bytes` of results, which begin in these lines, are written past the caches: many, and whole lines of a cache. A store to
// memory that is in no cache would first read its line, and rows of results are far apart: most are not even in the cache of
// page addresses. Few results are soon read again where they are.
#ifndef HB_STREAM_BYTES  // tests lower it
#define HB_STREAM_BYTES (1 << 20)
#endif
static inline bool go_past_caches(const Lines& lines, int64_t bytes) {
    return bytes >= HB_STREAM_BYTES && (reinterpret_cast<uintptr_t>(lines.first) | uintptr_t(lines.stride)) % 64 == 0;
}
// 64 bytes to a line of the cache, past it. From other threads they are seen after `finish_streams`.
static inline void stream_line(char* to, const char* from) {
#if defined(__SSE2__)
    for (int i = 0; i < 4; ++i)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
#else
    memcpy(to, from, 64);
#endif
}
static inline void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

static inline float load_float(const void* data, int dtype, int64_t i) {
    switch (dtype) {
        case HB_F32: return static_cast<const AnyFloat*>(data)[i];
        case HB_BF16: return from_bf16(static_cast<const AnyHalf*>(data)[i]);
        case HB_F16: return from_f16(static_cast<const AnyHalf*>(data)[i]);
        default: return float(static_cast<const int8_t*>(data)[i]);
    }
}
static inline void store_float(void* data, int dtype, int64_t i, float value) {
    switch (dtype) {
        case HB_F32: static_cast<AnyFloat*>(data)[i] = value; break;
        case HB_BF16: static_cast<AnyHalf*>(data)[i] = to_bf16(value); break;
        default: static_cast<AnyHalf*>(data)[i] = to_f16(value); break;
    }
}

static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a row is multiplied by before it is rounded; its scale is 1 over that. torch divides a number by a tensor in these two steps.
static inline float inverse_scale(float largest, float qmax, float eps) { return (1.0f / (largest < eps ? eps : largest)) * qmax; }
// Whether no code of such a row can be beyond the limits, of which the upper one is at most 127.
static inline bool is_symmetric(float qmin, float qmax) { return qmin <= -qmax; }
// Infinity times 0, or NaN; or all of the row is 0, and eps too: all codes are 0.
static inline bool leaves_nothing(float largest, float inverse) { return !(largest <= FLT_MAX) || !(inverse <= FLT_MAX); }

// ---- threads ----
int threads();  // as many as torch would use here
// body(begin, end) on parts of [0, size) of at least `grain`
void parallel(int64_t size, int64_t grain, hb_range_body body, void* context);
template <class Body>
static void for_range(int64_t size, int64_t grain, const Body& body) {
    parallel(
        size, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<Body*>(&body));
}

// task(i) for all i < count by `workers` threads, from `shares` runs of neighbours, 64 at most: each thread begins with one of them and goes on with
// those of others, so that a core that others use as well holds nobody up. `around` is called at the begin and the end of each
// thread's work with true and false.
template <class Task, class Around>
static void take_from_shares(int64_t count, int64_t workers, int64_t shares, const Around& around, const Task& task) {
    constexpr int64_t kMostShares = 64;
    struct alignas(64) Counter {
        std::atomic<int64_t> next;
    };
    if (count < 1) return;
    shares = smaller(shares, kMostShares);
    Counter counters[kMostShares];
    for (int64_t s = 0; s < shares; ++s) counters[s].next = s * count / shares;
    for_range(workers, 1, [&](int64_t begin, int64_t) {
        around(true);
        for (int64_t s = begin; s < begin + shares; ++s) {
            const int64_t share = s % shares, end = (share + 1) * count / shares;
            std::atomic<int64_t>& next = counters[share].next;
            // looked at first: who finds nothing does not take the line from others
            while (next.load(std::memory_order_relaxed) < end) {
                const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
                if (i < end) task(i);
            }
        }
        around(false);
    });
}
// On as many threads. Each has a share, the same one in every region with as many tasks, so that what it finds in its caches is its own.
template <class Task, class Around>
static void take_tasks(int64_t count, int64_t most_threads, const Around& around, const Task& task) {
    const int64_t workers = smaller(smaller(threads(), most_threads), count);
    take_from_shares(count, workers, workers, around, task);
}
// For tasks that are sorted, the longest first: each thread takes the next of all.
template <class Task, class Around>
static void take_in_order(int64_t count, const Around& around, const Task& task) {
    take_from_shares(count, smaller(threads(), count), 1, around, task);
}

// ---- scratch: one growing buffer per thread and slot, 64-byte aligned, so that decoding allocates nothing. NULL: no memory.
enum Slot { SLOT_CODES, SLOT_PANEL, SLOT_SUMS, SLOT_ROW, SLOT_LAYER, SLOT_TOKENS, SLOT_EXPERT, SLOT_KEYS, SLOTS };
void* scratch(Slot slot, size_t bytes);

// ---- one table per level; `rows` and `product` may each be the table of a lower level ----

// Elementwise work on one row or run, serial: rows.inc, compiled once per instruction set.
struct RowBodies {
    // see hb_quantize_rows; one row of k elements; returns the scale, and the sum of the codes in *sum
    float (*quantize)(const void* x, int dtype, int64_t k, float qmin, float qmax, float eps, int8_t* codes, int32_t* sum);
    // see hb_norm_quantize_rows; `row` is scratch for k floats
    float (*norm_quantize)(const void* x, int dtype, int64_t k, const void* norm_weight, int norm_dtype, float norm_eps, float qmin,
                           float qmax, float eps, float* row, int8_t* codes, int32_t* sum);
    void (*scale)(const void* x, int dtype, int64_t n, float scale, void* out, int out_dtype);
    double (*abs_sum)(const void* w, int dtype, int64_t n);
    float (*abs_max)(const void* w, int dtype, int64_t n);
    void (*quantize_weight)(const void* w, int dtype, int64_t n, float scale, float zero_point, float qmin, float qmax, void* out,
                            int out_dtype);
    void (*quantize_sign)(const void* w, int dtype, int64_t n, float threshold, void* out, int out_dtype);
    void (*pack)(const int8_t* codes, int64_t k, int bits, int lowest, int step, uint8_t* packed);
    void (*unpack)(const uint8_t* packed, int64_t k, int bits, int lowest, int step, int8_t* codes);
    void (*pack_trits)(const int8_t* codes, int64_t k, uint8_t* packed);
    void (*unpack_trits)(const uint8_t* packed, int64_t k, int8_t* codes);
};

struct ProductBodies;  // product.h

const RowBodies* rows_portable();
const RowBodies* rows_avx2();    // NULL where not compiled in
const RowBodies* rows_avx512();
const ProductBodies* product_portable();
const ProductBodies* product_avx2();
const ProductBodies* product_avxvnni();
const ProductBodies* product_avx512vnni();
const ProductBodies* product_amx();
const ProductBodies* product_neon();

// Of tables for three widths of register, the one that the level in use has; the wider ones may be NULL.
template <class Table>
static const Table& of_width(const Table* portable, const Table* (*avx2)(), const Table* (*avx512)()) {
    const int level = hb_level();
    const Table* wider = level >= HB_AVX512VNNI && level <= HB_AMX ? avx512() : nullptr;
    if (!wider && level >= HB_AVX2 && level <= HB_AMX) wider = avx2();
    return wider ? *wider : *portable;
}

const RowBodies& rows();        // of the level in use
const ProductBodies& product();

}  // namespace hb
