// The row bodies in plain C++, for whatever processor the compiler takes as its base. Own.
#include "rows.inc"

namespace hb {

const RowBodies* rows_portable() { return &BODIES; }

}  // namespace hb
