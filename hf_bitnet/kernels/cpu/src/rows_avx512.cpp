// The row bodies for AVX-512 F, BW, VL and DQ; NULL where the file is not compiled for them. Own.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__F16C__)
#include "rows.inc"

namespace hb {
const RowBodies* rows_avx512() { return &BODIES; }
}  // namespace hb
#else
#include "internal.h"

namespace hb {
const RowBodies* rows_avx512() { return nullptr; }
}  // namespace hb
#endif
