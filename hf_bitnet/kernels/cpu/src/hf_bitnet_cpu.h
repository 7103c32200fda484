// The C ABI of the CPU kernels: everything Python (or another program) may call. Own.
//
// Conventions: row-major; sizes and strides in elements unless a name says bytes; `scale` always multiplies. Every function
// returns 0, or an HB_ERROR_* when an argument makes no sense; the caller (Python) has checked dtypes, devices and shapes.
// Sizes may be 0 or 1, pointers need no alignment. Nothing here keeps a pointer after the call.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define HB_API __declspec(dllexport)
#else
#define HB_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// raised with every incompatible change; Python refuses a library of another version
#define HB_ABI_VERSION 4

enum hb_dtype { HB_F32 = 0, HB_BF16 = 1, HB_F16 = 2, HB_I8 = 3 };
enum hb_error { HB_OK = 0, HB_ERROR_ARGUMENT = 1, HB_ERROR_UNSUPPORTED = 2, HB_ERROR_MEMORY = 3 };

// Instruction sets, from plain C++ up. A level is legal where the processor and the operating system offer it.
enum hb_level {
    HB_PORTABLE = 0,
    HB_AVX2 = 1,
    HB_AVXVNNI = 2,     // AVX2 + the 256-bit dot product
    HB_AVX512VNNI = 3,  // AVX-512 F, BW, VL, DQ, VNNI
    HB_AMX = 4,         // the above + AMX tiles of int8 and bfloat16, AVX-512 BF16
    HB_NEON = 5,        // ARMv8.2 dot product
    HB_LEVELS = 6
};

HB_API int hb_abi_version(void);
HB_API int hb_level(void);                      // the level in use
HB_API const char* hb_level_name(int level);    // "portable", "avx2", ...; NULL for no level
HB_API int hb_level_legal(int level);           // 1 when compiled in and offered by this machine
HB_API int hb_set_level(int level);             // for tests; not to be called while another thread computes

// `for_range(begin, end, grain, body, context)` calls body on disjoint parts of [begin, end), on its own threads, and
// returns when all are done: torch's `torch_parallel_for`. Without it everything runs on the calling thread.
typedef void (*hb_range_body)(int64_t begin, int64_t end, void* context);
typedef void (*hb_parallel_for)(int64_t begin, int64_t end, int64_t grain, hb_range_body body, void* context);
typedef uint32_t (*hb_thread_count)(void);
HB_API void hb_set_threads(hb_parallel_for for_range, hb_thread_count count);

// ---- activations -------------------------------------------------------------------------------------------------
// inverse = qmax / max(amax|x|, eps); codes = clamp(round_half_even(x * inverse), qmin, qmax); scale = 1 / inverse.
// x (rows, k) with `x_stride` elements between rows; codes int8 (rows, k) contiguous; scale (rows).
HB_API int hb_quantize_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride, float qmin, float qmax,
                            float eps, int8_t* codes, float* scale);
// The same of RMS-normed rows: x * rsqrt(mean(x^2) + norm_eps) rounded to x's dtype, times norm_weight (k), rounded again.
HB_API int hb_norm_quantize_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride,
                                 const void* norm_weight, int norm_dtype, float norm_eps, float qmin, float qmax, float eps,
                                 int8_t* codes, float* scale);
// out (rows, k) = x (rows, k) of dtype int8 or float, times scale (rows), rounded once.
HB_API int hb_scale_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride, const float* scale, void* out,
                         int out_dtype);

// ---- weights -----------------------------------------------------------------------------------------------------
// Sum (in float64, in an order that does not depend on the threads) and maximum of |w| over each of `rows` runs of n.
HB_API int hb_abs_sums(const void* w, int dtype, int64_t rows, int64_t n, double* sums);
HB_API int hb_abs_maxima(const void* w, int dtype, int64_t rows, int64_t n, float* maxima);
// clamp(round_half_even(w * (1 / scale) + zero_point), qmin, qmax), one scale for each of `rows` runs of n; any out dtype.
HB_API int hb_quantize_weight(const void* w, int dtype, int64_t rows, int64_t n, const float* scale, float zero_point, float qmin,
                              float qmax, void* out, int out_dtype);
// +1 where w >= threshold, else -1; one threshold for each of `rows` runs of n.
HB_API int hb_quantize_sign(const void* w, int dtype, int64_t rows, int64_t n, const float* threshold, void* out, int out_dtype);
// hb_quantize_weight and hb_pack in one pass: w (n, k), scale (scale_rows 1 or n, groups) -> (n, ceil(k * bits / 8)).
HB_API int hb_quantize_pack(const void* w, int dtype, int64_t n, int64_t k, const float* scale, int64_t scale_rows, int64_t groups,
                            float zero_point, float qmin, float qmax, int bits, int lowest, int step, uint8_t* packed);
// hb_quantize_sign and hb_pack in one pass, 1 bit, lowest -1, step 2: w (n, k), threshold (threshold_rows 1 or n, groups).
HB_API int hb_sign_pack(const void* w, int dtype, int64_t n, int64_t k, const float* threshold, int64_t threshold_rows,
                        int64_t groups, uint8_t* packed);
// Codes int8 (n, k) <-> bytes (n, ceil(k * bits / 8)): level = (code - lowest) / step, the first neighbour in the lowest bits.
HB_API int hb_pack(const int8_t* codes, int64_t n, int64_t k, int bits, int lowest, int step, uint8_t* packed);
HB_API int hb_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, int lowest, int step, int8_t* codes);
// Ternary codes int8 (n, k) <-> five of them in a byte (n, ceil(k / 5)): sum of (code_i + 1) * 3^i, i = 0..4.
HB_API int hb_pack_trits(const int8_t* codes, int64_t n, int64_t k, uint8_t* packed);
HB_API int hb_unpack_trits(const uint8_t* packed, int64_t n, int64_t k, int8_t* codes);

// ---- products ----------------------------------------------------------------------------------------------------
// out int32 (m, n) = a int8 (m, k) b^T, b int8 (n, k); exact modulo 2^32.
HB_API int hb_int_matmul(const int8_t* a, int64_t a_stride, const int8_t* b, int64_t b_stride, int64_t m, int64_t n, int64_t k,
                         int32_t* out);

// One weight matrix of a product and where its part of the result goes.
typedef struct {
    const void* weight;      // packed: uint8 (n, weight_stride bytes); bits = 8 and packed = 0: int8 codes
    int64_t n;               // rows: output features
    int64_t weight_stride;   // bytes between rows
    const float* scale;      // (scale_rows, groups)
    int64_t scale_rows;      // 1 or n
    int64_t groups;          // runs of k / groups codes share a scale; 1: one per row
    const void* bias;        // (n) or NULL
    int64_t bias_dtype;
    void* out;               // (m, n) in the out dtype
    int64_t out_stride;      // elements between rows
} hb_weight;

// How weights are stored: value = (level * step + lowest - zero_point) * scale.
typedef struct {
    int32_t bits;      // 1, 2, 4, 8
    int32_t packed;    // 0: `weight` holds int8 codes, and lowest and step mean nothing
    int32_t lowest;
    int32_t step;
    float zero_point;
} hb_grid;

// The left operand: either floats, quantized per row on the way (x_dtype a float; after an RMS norm when norm_weight is
// not NULL), or int8 codes with a scale and a zero point (or NULL) for each row.
typedef struct {
    const void* x;
    int64_t x_stride;
    const float* scale;
    const float* zero;
    const void* norm_weight;
    int32_t x_dtype;
    int32_t norm_dtype;
    float norm_eps, qmin, qmax, eps;
} hb_input;

// For each weight: out = ((sum (x - x_zero)(code - zero_point)) * x_scale) * w_scale + bias, rounded once to out_dtype.
// With one scale in all, (x_scale * w_scale) is formed first; both as the torch bodies do, so that results are bit-equal.
HB_API int hb_linear(const hb_input* input, int64_t m, int64_t k, const hb_grid* grid, const hb_weight* weights, int64_t count,
                     int out_dtype);

// out (m, n) = (a (m, k) * a_scale (k) or 1) (b (k, n) - zero_point) * scale, a float, b int8 codes: for gradients.
// Each row of a is rounded to 15-bit fixed point, q = rint(a * 32512 / max|a|) = 256 high + low, and both bytes are multiplied
// exactly: the error of an element of a is at most max|row| / 65024, uniformly (bfloat16's is up to |a| / 512, but of each
// element). A row with an inf or NaN gives NaN. Element (i, j) of a lies at i * a_stride + j * a_step.
HB_API int hb_fixed_matmul(const void* a, int a_dtype, int64_t a_stride, int64_t a_step, const float* a_scale, int64_t m, int64_t k,
                           const int8_t* b, int64_t b_stride, int64_t n, float zero_point, float scale, void* out, int out_dtype,
                           int64_t out_stride);

#ifdef __cplusplus
}
#endif
