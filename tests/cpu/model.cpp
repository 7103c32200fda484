// Numbers, blocks and the quantization of rows as the fuzz program knows them, in plain C++. Own.
#include <float.h>
#include <stdarg.h>
#include <stdio.h>

#include "fuzz.h"

namespace fuzz {

thread_local char description[512];
const Limits kRowLimits[3] = {{-128, 127}, {-127, 127}, {-8, 7}};

void describe(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(description, sizeof(description), format, list);
    va_end(list);
}

void expect_ok(int error) {
    if (error) fail("returned %d", error);
}

int64_t width_of(int dtype) {
    switch (dtype) {
        case HB_F32:
        case kInt32: return 4;
        case kFloat64: return 8;
        case HB_I8: return 1;
        default: return 2;
    }
}

bool is_float(int dtype) { return dtype == HB_F32 || dtype == HB_BF16 || dtype == HB_F16; }

int random_float_dtype(Random& random) {
    static const int dtypes[] = {HB_F32, HB_BF16, HB_F16};
    return random.pick(dtypes);
}

// ---- dtypes ----

// `digits` binary digits, exponents from `lowest` on, infinite from 2^(highest + 1) on
static double nearest_of(double value, int digits, int lowest, int highest) {
    if (!isfinite(value) || value == 0) return value;
    int exponent;
    frexp(value, &exponent);  // value in [0.5, 1) * 2^exponent
    const int unit = (exponent - 1 < lowest ? lowest : exponent - 1) - (digits - 1);
    const double rounded = ldexp(nearbyint(ldexp(value, -unit)), unit);
    return fabs(rounded) >= ldexp(1, highest + 1) ? copysign(INFINITY, value) : rounded;
}

double nearest(int dtype, double value) {
    switch (dtype) {
        case HB_F32: return double(float(value));
        case HB_BF16: return nearest_of(value, 8, -126, 127);
        case HB_F16: return nearest_of(value, 11, -14, 15);
        default: return value;
    }
}

static double half_value(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                            : ldexp(mantissa, -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

static uint16_t half_bits(double value) {
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) return 0x7e00;
    value = fabs(nearest(HB_F16, value));
    if (isinf(value)) return sign | 0x7c00;
    if (value < 0x1p-14) return uint16_t(sign | int(value * 0x1p24));
    int exponent;
    const double mantissa = frexp(value, &exponent);
    return uint16_t(sign | ((exponent + 14) << 10) | (int(mantissa * 2048) - 1024));
}

template <class T>
static T read(const char* from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

// ---- Array ----

Array::Array(Random& random, int dtype, int64_t count, bool aligned) : dtype_(dtype), count_(count), block_(nullptr), data_(nullptr) {
    if (count <= 0 && random.one_in(2)) return;
    const int64_t shift = !aligned && random.one_in(2) ? random.between(0, 63) : 0, bytes = (count < 0 ? 0 : count) * width_of(dtype);
    void* block = nullptr;
    if (posix_memalign(&block, 64, size_t(bytes + shift))) abort();
    block_ = static_cast<char*>(block), data_ = block_ + shift;
}

double Array::get(int64_t i) const {
    const char* at = data_ + i * width_of(dtype_);
    switch (dtype_) {
        case HB_F32: return double(read<float>(at));
        case HB_F16: return half_value(read<uint16_t>(at));
        case HB_BF16: {
            const uint32_t bits = uint32_t(read<uint16_t>(at)) << 16;
            return double(read<float>(reinterpret_cast<const char*>(&bits)));
        }
        case HB_I8: return double(read<int8_t>(at));
        case kInt32: return double(read<int32_t>(at));
        default: return read<double>(at);
    }
}

void Array::set(int64_t i, double value) {
    char* at = data_ + i * width_of(dtype_);
    if (dtype_ == HB_I8) {
        *at = char(int8_t(value));
    } else if (dtype_ == HB_F16) {
        const uint16_t bits = half_bits(value);
        memcpy(at, &bits, 2);
    } else {  // a bfloat16 is the upper half of a float
        const float rounded = float(nearest(dtype_, value));
        memcpy(at, reinterpret_cast<const char*>(&rounded) + (dtype_ == HB_BF16 ? 2 : 0), size_t(width_of(dtype_)));
    }
}

void Array::mark() {
    if (count_ > 0) memset(data_, 0xa5, size_t(count_ * width_of(dtype_)));
}

bool Array::is_marked(int64_t i) const {
    for (int64_t byte = i * width_of(dtype_); byte < (i + 1) * width_of(dtype_); ++byte)
        if (uint8_t(data_[byte]) != 0xa5) return false;
    return true;
}

void Array::expect_untouched(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
        if (!is_marked(i)) fail("element %lld, between two rows, was overwritten", ll(i));
}

void Array::expect_near(int64_t i, double expected, double tolerance) const {
    const double found = get(i), low = nearest(dtype_, expected - tolerance), high = nearest(dtype_, expected + tolerance);
    if (isnan(expected) ? isnan(found) : low <= found && found <= high) return;
    fail("element %lld is %.9g, not %.9g to %.9g", ll(i), found, low, high);
}

void fill_floats(Random& random, Array& array, int64_t begin, int64_t end) {
    const int64_t kind = random.between(0, 20);
    const double size = kind == 1 ? 1e4 : kind == 2 ? 1e-4 : 1.0;
    for (int64_t i = begin; i < end; ++i) {
        const double value = random.uniform(-size, size) * (random.one_in(30) ? 5 : 1);
        array.set(i, kind == 0 ? 0.0 : kind == 3 ? 0.5 : value);
    }
    static const double strange[] = {NAN, INFINITY, -INFINITY};
    if (kind == 4 && end > begin) array.set(random.between(begin, end - 1), random.pick(strange));
}

void fill_codes(Random& random, Array& array, int64_t begin, int64_t end) {
    static const int constants[] = {-128, 127, 1, 0, -127};
    const int64_t kind = random.between(0, 9);
    for (int64_t i = begin; i < end; ++i)
        array.set(i, kind < 5    ? constants[kind]
                     : kind == 5 ? constants[random.between(0, 1)]
                                 : double(random.between(-128, 127)));
}

// ---- rows ----

Row quantized(const float* x, int64_t k, float qmin, float qmax, float eps) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i)
        if (isnan(x[i]) || fabsf(x[i]) > largest) largest = fabsf(x[i]);
    for (int64_t i = 0; i < k; ++i)
        if (isnan(x[i])) largest = NAN;
    const float inverse = (1.0f / (largest < eps ? eps : largest)) * qmax;
    Row row{std::vector<int64_t>(size_t(k), 0), 1.0f / inverse};
    if (!isfinite(largest) || !isfinite(inverse)) return row;
    for (int64_t i = 0; i < k; ++i) row.codes[size_t(i)] = int64_t(fminf(fmaxf(nearbyintf(x[i] * inverse), qmin), qmax));
    return row;
}

Row quantized_row(const Array& x, int64_t start, int64_t k, const Array* norm, float norm_eps, float qmin, float qmax,
                  float eps) {
    std::vector<float> values(static_cast<size_t>(k));
    double squares = 0;
    for (int64_t i = 0; i < k; ++i) {
        values[size_t(i)] = float(x.get(start + i));
        squares += double(values[size_t(i)]) * values[size_t(i)];
    }
    if (norm) {
        const float inverse = 1.0f / sqrtf(float(squares / double(k)) + norm_eps);
        for (int64_t i = 0; i < k; ++i) {
            const float normed = float(nearest(x.dtype(), values[size_t(i)] * inverse)), gained = float(norm->get(i)) * normed;
            values[size_t(i)] = x.dtype() == norm->dtype() ? float(nearest(x.dtype(), gained)) : gained;
        }
    }
    return quantized(values.data(), k, qmin, qmax, eps);
}

// ---- layouts ----

Layout random_layout(Random& random) {
    static const Layout layouts[] = {{1, -1, 2}, {1, 0, 1},  {2, -1, 1},   {2, -2, 1},  {2, -3, 2},
                                     {4, -7, 1}, {4, -8, 1}, {8, -127, 1}, {8, -128, 1}};
    return random.pick(layouts);
}

int level_at(const uint8_t* bytes, int64_t i, int bits) { return (bytes[i * bits / 8] >> (i * bits % 8)) & ((1 << bits) - 1); }

}  // namespace fuzz
