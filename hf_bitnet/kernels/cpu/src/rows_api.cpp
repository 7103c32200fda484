// The C functions on activations and weights: argument checks, and the rows or pieces of them spread over threads. Own.
//
// A piece has a fixed size, whatever the number of threads, and so have the sums of pieces.
#include <atomic>

#include "internal.h"

namespace {

using hb::at;
using hb::is_float;
using hb::smaller;

// elements a thread should get at least: 128 KB of float32, some ten microseconds, several times what waking a thread costs.
// A multiple of 8, so that pieces of packed rows start at whole bytes
constexpr int64_t PIECE = 1 << 15;

int64_t pieces(int64_t n) { return n > PIECE ? hb::ceil_div(n, PIECE) : 1; }

int64_t rows_at_once(int64_t n) { return n >= PIECE ? 1 : PIECE / (n > 0 ? n : 1); }

// body(row, begin, size) for every run of at most PIECE elements of `rows` rows of n
template <class Body>
void for_pieces(int64_t rows, int64_t n, const Body& body) {
    const int64_t count = pieces(n);
    hb::for_range(rows * count, rows_at_once(n), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = i % count * PIECE;
            body(i / count, begin, smaller(PIECE, n - begin));
        }
    });
}

bool is_dtype(int dtype) { return is_float(dtype) || dtype == HB_I8; }
bool is_layout(int bits, int step) { return (bits == 1 || bits == 2 || bits == 4 || bits == 8) && (step == 1 || step == 2); }

// numbers at any address
float number(const float* data, int64_t i) { return hb::load_float(data, HB_F32, i); }
template <class Number>
void put(Number* data, int64_t i, Number value) {
    memcpy(data + i, &value, sizeof(value));
}

// Codes of `weight` (n, k), made block by block with quantize(values, size, index of their scale, codes), are packed while
// they are in the cache. The scales lie (scale_rows, groups); k / groups neighbours share one.
template <class Quantize>
void quantize_pack(const void* weight, int dtype, int64_t n, int64_t k, int64_t scale_rows, int64_t groups, int bits,
                   int lowest, int step, uint8_t* packed, const Quantize& quantize) {
    constexpr int64_t BLOCK = 4096;  // codes; a multiple of 8
    const hb::RowBodies& body = hb::rows();
    const int64_t group = k / groups, stride = (k * bits + 7) / 8;
    for_pieces(n, k, [&](int64_t row, int64_t first, int64_t count) {
        int8_t codes[BLOCK];
        const int64_t scales = scale_rows == 1 ? 0 : row * groups;
        for (int64_t begin = first; begin < first + count; begin += BLOCK) {
            const int64_t end = smaller(begin + BLOCK, first + count);
            for (int64_t i = begin; i < end;) {
                const int64_t size = smaller((i / group + 1) * group, end) - i;
                quantize(at(weight, dtype, row * k + i), size, scales + i / group, codes + (i - begin));
                i += size;
            }
            body.pack(codes, end - begin, bits, lowest, step, packed + row * stride + begin * bits / 8);
        }
    });
}

bool is_grouping(int64_t n, int64_t k, int64_t scale_rows, int64_t groups) {
    return n >= 0 && k >= 0 && groups > 0 && k % groups == 0 && (scale_rows == 1 || scale_rows == n);
}

}  // namespace

extern "C" {

int hb_quantize_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride, float qmin, float qmax, float eps,
                     int8_t* codes, float* scale) {
    if (!is_float(x_dtype) || rows < 0 || k < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    hb::for_range(rows, rows_at_once(k), [&](int64_t begin, int64_t end) {
        int32_t sum;
        for (int64_t row = begin; row < end; ++row)
            put(scale, row, body.quantize(at(x, x_dtype, row * x_stride), x_dtype, k, qmin, qmax, eps, codes + row * k, &sum));
    });
    return HB_OK;
}

int hb_norm_quantize_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride, const void* norm_weight,
                          int norm_dtype, float norm_eps, float qmin, float qmax, float eps, int8_t* codes, float* scale) {
    if (!is_float(x_dtype) || !is_float(norm_dtype) || rows < 0 || k < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    std::atomic<int> error{HB_OK};
    hb::for_range(rows, rows_at_once(k), [&](int64_t begin, int64_t end) {
        float* normed = static_cast<float*>(hb::scratch(hb::SLOT_ROW, size_t(k) * sizeof(float)));
        if (!normed && k > 0) {
            error = HB_ERROR_MEMORY;
            return;
        }
        int32_t sum;
        for (int64_t row = begin; row < end; ++row)
            put(scale, row, body.norm_quantize(at(x, x_dtype, row * x_stride), x_dtype, k, norm_weight, norm_dtype, norm_eps, qmin,
                                               qmax, eps, normed, codes + row * k, &sum));
    });
    return error;
}

int hb_scale_rows(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t x_stride, const float* scale, void* out,
                  int out_dtype) {
    if (!is_dtype(x_dtype) || !is_float(out_dtype) || rows < 0 || k < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    for_pieces(rows, k, [&](int64_t row, int64_t begin, int64_t size) {
        body.scale(at(x, x_dtype, row * x_stride + begin), x_dtype, size, number(scale, row), at(out, out_dtype, row * k + begin),
                   out_dtype);
    });
    return HB_OK;
}

int hb_abs_sums(const void* w, int dtype, int64_t rows, int64_t n, double* sums) {
    if (!is_dtype(dtype) || rows < 0 || n < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    const int64_t count = pieces(n);
    double* parts = count == 1 ? sums : static_cast<double*>(hb::scratch(hb::SLOT_SUMS, size_t(rows * count) * sizeof(double)));
    if (!parts && rows > 0) return HB_ERROR_MEMORY;
    for_pieces(rows, n, [&](int64_t row, int64_t begin, int64_t size) {
        put(parts, row * count + begin / PIECE, body.abs_sum(at(w, dtype, row * n + begin), dtype, size));
    });
    for (int64_t row = 0; row < rows && count > 1; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += parts[row * count + i];
        put(sums, row, sum);
    }
    return HB_OK;
}

int hb_abs_maxima(const void* w, int dtype, int64_t rows, int64_t n, float* maxima) {
    if (!is_dtype(dtype) || rows < 0 || n < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    const int64_t count = pieces(n);
    float* parts = count == 1 ? maxima : static_cast<float*>(hb::scratch(hb::SLOT_SUMS, size_t(rows * count) * sizeof(float)));
    if (!parts && rows > 0) return HB_ERROR_MEMORY;
    for_pieces(rows, n, [&](int64_t row, int64_t begin, int64_t size) {
        put(parts, row * count + begin / PIECE, body.abs_max(at(w, dtype, row * n + begin), dtype, size));
    });
    for (int64_t row = 0; row < rows && count > 1; ++row) put(maxima, row, body.abs_max(parts + row * count, HB_F32, count));
    return HB_OK;
}

int hb_quantize_weight(const void* w, int dtype, int64_t rows, int64_t n, const float* scale, float zero_point, float qmin,
                       float qmax, void* out, int out_dtype) {
    if (!is_float(dtype) || !is_dtype(out_dtype) || rows < 0 || n < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    for_pieces(rows, n, [&](int64_t row, int64_t begin, int64_t size) {
        const int64_t i = row * n + begin;
        void* codes = at(out, out_dtype, i);
        body.quantize_weight(at(w, dtype, i), dtype, size, number(scale, row), zero_point, qmin, qmax, codes, out_dtype);
    });
    return HB_OK;
}

int hb_quantize_sign(const void* w, int dtype, int64_t rows, int64_t n, const float* threshold, void* out, int out_dtype) {
    if (!is_float(dtype) || !is_dtype(out_dtype) || rows < 0 || n < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    for_pieces(rows, n, [&](int64_t row, int64_t begin, int64_t size) {
        const int64_t i = row * n + begin;
        body.quantize_sign(at(w, dtype, i), dtype, size, number(threshold, row), at(out, out_dtype, i), out_dtype);
    });
    return HB_OK;
}

int hb_quantize_pack(const void* w, int dtype, int64_t n, int64_t k, const float* scale, int64_t scale_rows, int64_t groups,
                     float zero_point, float qmin, float qmax, int bits, int lowest, int step, uint8_t* packed) {
    if (!is_float(dtype) || !is_grouping(n, k, scale_rows, groups) || !is_layout(bits, step)) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    quantize_pack(w, dtype, n, k, scale_rows, groups, bits, lowest, step, packed,
                  [&](const void* values, int64_t size, int64_t i, int8_t* codes) {
                      body.quantize_weight(values, dtype, size, number(scale, i), zero_point, qmin, qmax, codes, HB_I8);
                  });
    return HB_OK;
}

int hb_sign_pack(const void* w, int dtype, int64_t n, int64_t k, const float* threshold, int64_t threshold_rows, int64_t groups,
                 uint8_t* packed) {
    if (!is_float(dtype) || !is_grouping(n, k, threshold_rows, groups)) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    quantize_pack(w, dtype, n, k, threshold_rows, groups, 1, -1, 2, packed,
                  [&](const void* values, int64_t size, int64_t i, int8_t* codes) {
                      body.quantize_sign(values, dtype, size, number(threshold, i), codes, HB_I8);
                  });
    return HB_OK;
}

int hb_pack(const int8_t* codes, int64_t n, int64_t k, int bits, int lowest, int step, uint8_t* packed) {
    if (n < 0 || k < 0 || !is_layout(bits, step)) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    const int64_t stride = (k * bits + 7) / 8;
    for_pieces(n, k, [&](int64_t row, int64_t begin, int64_t size) {
        body.pack(codes + row * k + begin, size, bits, lowest, step, packed + row * stride + begin * bits / 8);
    });
    return HB_OK;
}

int hb_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, int lowest, int step, int8_t* codes) {
    if (n < 0 || k < 0 || !is_layout(bits, step)) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    const int64_t stride = (k * bits + 7) / 8;
    for_pieces(n, k, [&](int64_t row, int64_t begin, int64_t size) {
        body.unpack(packed + row * stride + begin * bits / 8, size, bits, lowest, step, codes + row * k + begin);
    });
    return HB_OK;
}

int hb_pack_trits(const int8_t* codes, int64_t n, int64_t k, uint8_t* packed) {
    if (n < 0 || k < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    hb::for_range(n, rows_at_once(k), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body.pack_trits(codes + row * k, k, packed + row * ((k + 4) / 5));
    });
    return HB_OK;
}

int hb_unpack_trits(const uint8_t* packed, int64_t n, int64_t k, int8_t* codes) {
    if (n < 0 || k < 0) return HB_ERROR_ARGUMENT;
    const hb::RowBodies& body = hb::rows();
    hb::for_range(n, rows_at_once(k), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body.unpack_trits(packed + row * ((k + 4) / 5), k, codes + row * k);
    });
    return HB_OK;
}

}  // extern "C"
