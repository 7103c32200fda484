// The row bodies for AVX2 and F16C; NULL where the file is not compiled for them. Own.
#if defined(__AVX2__) && defined(__F16C__)
#include "rows.inc"

namespace hb {
const RowBodies* rows_avx2() { return &BODIES; }
}  // namespace hb
#else
#include "internal.h"

namespace hb {
const RowBodies* rows_avx2() { return nullptr; }
}  // namespace hb
#endif
