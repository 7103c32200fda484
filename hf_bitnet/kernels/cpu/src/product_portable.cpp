// Products in plain C++: for processors without a body of their own, and the simplest form of the others. Own.
#include "fixed.inc"
#include "product.inc"

namespace hb {
namespace {

constexpr int kVector = 16, kBlockRows = 4, kBlockColumns = 16;

void permute(const int8_t* x, int64_t k, int bits, int64_t chunks, int8_t* out) { permute_plain(x, k, bits, chunks, out, kVector); }

void dot(const Packed& w, int64_t row, int64_t count, const int8_t* planes, int64_t planes_stride, int rows, int32_t* c,
         int64_t c_stride) {
    const int64_t bytes = (w.k * w.bits + 7) / 8;
    const int planes_of_byte = 8 / w.bits, mask = (1 << w.bits) - 1;
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t* data = w.data + (row + i) * w.stride;
        for (int m = 0; m < rows; ++m) {
            const int8_t* x = planes + m * planes_stride;
            uint32_t sum = 0;
            for (int64_t at = 0; at < bytes; at += kVector, x += kVector * planes_of_byte) {
                const int64_t size = bytes - at < kVector ? bytes - at : kVector;
                for (int j = 0; j < planes_of_byte; ++j) {
                    int32_t part = 0;
                    for (int64_t b = 0; b < size; ++b) {
                        const uint8_t byte = data[at + b];
                        const int level = w.bits == 8 ? int8_t(byte ^ w.flip) : (byte >> (w.bits * j)) & mask;
                        part += level * x[kVector * j + b];
                    }
                    sum += uint32_t(part);
                }
            }
            c[m * c_stride + i] = int32_t(sum);
        }
    }
}

void kernel(const int8_t* x, int64_t size, int rows, const uint8_t* panels, int, int32_t* c, bool accumulate,
            const Lines& later) {
    fetch(later);
    const auto* levels = reinterpret_cast<const int8_t*>(panels);
    if (!accumulate) memset(c, 0, size_t(rows) * kBlockColumns * 4);
    for (int64_t s = 0; s < size / 4; ++s, x += 4 * rows, levels += 64)
        for (int r = 0; r < rows; ++r)
            for (int j = 0; j < kBlockColumns; ++j) {
                int32_t sum = 0;
                for (int i = 0; i < 4; ++i) sum += x[4 * r + i] * levels[4 * j + i];
                c[r * kBlockColumns + j] = int32_t(uint32_t(c[r * kBlockColumns + j]) + uint32_t(sum));
            }
}

constexpr ProductBodies kBodies = {
    true, kBlockRows, kBlockColumns, 512, 4, kVector, nullptr, nothing, nothing, sum_of, order, pack_rows_plain, panel_plain,
    kernel, permute, dot, nullptr, fixed_rows, fixed_columns, panel_columns, fixed_finish, finish,
};

}  // namespace

const ProductBodies* product_portable() { return &kBodies; }

}  // namespace hb
