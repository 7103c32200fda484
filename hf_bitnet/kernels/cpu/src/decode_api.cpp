// hb_rms_norm, hb_rotate: spread rows and tokens over the threads. Own.
#include <atomic>

#include "decode.h"
#include "hf_bitnet_decode.h"

namespace hb {
int norm_rows(const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const hb_norm& norm, void* out) {
    const DecodeBodies& body = decode();
    std::atomic<int> failed{HB_OK};
    for_range(rows, grain(k), [&](int64_t begin, int64_t end) {
        auto* row = static_cast<float*>(scratch(SLOT_ROW, (size_t(k) + 16) * 4));
        if (!row) {
            failed = HB_ERROR_MEMORY;
            return;
        }
        for (int64_t i = begin; i < end; ++i)
            body.rms_norm(at(x, dtype, i * x_stride), dtype, k, norm.weight, norm.eps, norm.once != 0, row, at(out, dtype, i * k));
    });
    return failed;
}

const DecodeBodies& decode() { return of_width(decode_portable(), decode_avx2, decode_avx512); }

const AttendBodies& attention(int dtype) {
    const AttendBodies* tiles = dtype == HB_BF16 && hb_level() == HB_AMX ? attend_amx() : nullptr;
    return tiles ? *tiles : *decode().attention;
}

}  // namespace hb

using namespace hb;

extern "C" int hb_rms_norm(const void* x, int64_t dtype, int64_t rows, int64_t k, int64_t x_stride, const void* weight, float eps,
                           void* out) {
    if (!is_float(dtype) || rows < 0 || k < 0) return HB_ERROR_ARGUMENT;
    return norm_rows(x, int(dtype), rows, k, x_stride, {weight, eps, 0}, out);
}

extern "C" int hb_rotate(const hb_heads* tensors, int64_t count, int64_t dtype, int64_t batch, int64_t tokens, int64_t d,
                         const void* cos, const void* sin, int64_t batch_stride, int64_t token_stride) {
    if (!is_float(dtype) || batch < 0 || tokens < 0 || d < 0 || d % 2) return HB_ERROR_ARGUMENT;
    const DecodeBodies& body = decode();
    int64_t heads = 0;
    for (int64_t i = 0; i < count; ++i) heads += tensors[i].heads;
    for_range(batch * tokens, grain(heads * d), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens, angle = b * batch_stride + t * token_stride;
            for (int64_t i = 0; i < count; ++i) {
                const hb_heads& h = tensors[i];
                for (int64_t n = 0; n < h.heads; ++n)
                    body.rotate(at(h.x, dtype, b * h.batch_stride + n * h.head_stride + t * h.token_stride), int(dtype), d,
                                at(cos, dtype, angle), at(sin, dtype, angle),
                                at(h.out, dtype, b * h.out_batch_stride + n * h.out_head_stride + t * h.out_token_stride));
            }
        }
    });
    return HB_OK;
}
