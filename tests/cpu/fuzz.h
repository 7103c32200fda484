// What the parts of the fuzz program share: random numbers, exact heap blocks, dtypes as double, what a case expects. Own.
//
// Every part draws one call of the C ABI at random, computes what it should give in int64 and double (or, where the
// contract is one rounding after the other, in float), calls it and compares. A part knows nothing of the bodies.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "hf_bitnet_cpu.h"

namespace fuzz {

// The case at hand, for the message of a failure.
extern thread_local char description[512];
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Says what is wrong with the case at hand and ends the program with 1.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void expect_ok(int error);
inline long long ll(int64_t value) { return value; }  // for %lld

// Deterministic numbers: splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t between(int64_t lowest, int64_t highest) { return lowest + int64_t(next() % uint64_t(highest - lowest + 1)); }
    bool one_in(int64_t n) { return between(1, n) == 1; }
    double uniform(double lowest, double highest) { return lowest + (highest - lowest) * double(next() >> 11) * 0x1p-53; }
    template <class T, size_t kCount>
    const T& pick(const T (&values)[kCount]) {
        return values[between(0, int64_t(kCount) - 1)];
    }
    // 0, 1, beside a multiple of what a vector or block holds, or anything up to `limit`
    int64_t size(int64_t limit) {
        static const int64_t units[] = {4, 6, 8, 12, 16, 32, 64, 256, 512};
        int64_t size = between(0, limit);
        if (one_in(12))
            size = between(0, 1);
        else if (one_in(3))
            size = pick(units) * between(1, 4) + between(-1, 1);
        return size > limit ? limit : size;
    }

  private:
    uint64_t state_;
};

int64_t width_of(int dtype);
bool is_float(int dtype);
int random_float_dtype(Random& random);
// The nearest number of a dtype, half to even; of int8 the number itself.
double nearest(int dtype, double value);

// Numbers of one dtype in a heap block that ends with the last of them, so that ASan and valgrind see every access past the
// end; at any address. What is not set is not initialized, for valgrind. No numbers: often no address either.
class Array {
  public:
    // aligned: at a line of the cache, where results may be written as whole lines
    Array(Random& random, int dtype, int64_t count, bool aligned = false);
    Array(const Array&) = delete;
    ~Array() { free(block_); }

    void* data() const { return data_; }
    template <class T>
    T* as() const {
        return static_cast<T*>(data());
    }
    int dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    double get(int64_t i) const;
    void set(int64_t i, double value);

    // Bytes that a call must leave alone, or overwrite wholly.
    void mark();
    bool is_marked(int64_t i) const;
    // Every element in [begin, end) still is as `mark` left it.
    void expect_untouched(int64_t begin, int64_t end) const;
    void expect(int64_t i, double expected) const { expect_near(i, expected, 0); }
    // The nearest number of the dtype to something within `tolerance` of `expected`; NaN where NaN is expected.
    void expect_near(int64_t i, double expected, double tolerance) const;

  private:
    int dtype_;
    int64_t count_;
    char *block_, *data_;
};

// int32 and float64 results, which are no dtype of the library.
constexpr int kInt32 = 100, kFloat64 = 101;

// Floats as models have them, or now and then all zero, constant, huge, or with a NaN or infinity among them.
void fill_floats(Random& random, Array& array, int64_t begin, int64_t end);
// int8 codes: random, or the extremes that overflow narrow sums.
void fill_codes(Random& random, Array& array, int64_t begin, int64_t end);

// ---- what the library says it computes, see hf_bitnet_cpu.h ----

// One row as hb_quantize_rows makes it.
struct Row {
    std::vector<int64_t> codes;
    float scale;
};
Row quantized(const float* x, int64_t k, float qmin, float qmax, float eps);
// Row `row` of `x`, normed when `norm` is given, then quantized.
Row quantized_row(const Array& x, int64_t start, int64_t k, const Array* norm, float norm_eps, float qmin, float qmax,
                  float eps);

// Limits of codes and the layout that holds them.
struct Limits {
    float qmin, qmax;
};
extern const Limits kRowLimits[3];

// A way to store codes: (bits, lowest, step).
struct Layout {
    int bits, lowest, step;
};
Layout random_layout(Random& random);
// Level `i` of a row that starts at `bytes`.
int level_at(const uint8_t* bytes, int64_t i, int bits);

// ---- the parts: one random call each ----
void fuzz_int_matmul(Random& random);
void fuzz_linear(Random& random);
void fuzz_experts(Random& random);
void fuzz_fixed_matmul(Random& random);
void fuzz_quantize_rows(Random& random);
void fuzz_scale_rows(Random& random);
void fuzz_magnitudes(Random& random);
void fuzz_quantize_weight(Random& random);
void fuzz_quantize_pack(Random& random);
void fuzz_pack(Random& random);
void fuzz_trits(Random& random);
void fuzz_rms_norm(Random& random);
void fuzz_rotate(Random& random);
void fuzz_decode_layer(Random& random);
void fuzz_decode_tokens(Random& random);
void fuzz_errors(Random& random);

// Products whose rows do not fit into one slab; long, so not drawn at random.
void many_rows(Random& random);
void linear_of_many_rows(Random& random);

}  // namespace fuzz
