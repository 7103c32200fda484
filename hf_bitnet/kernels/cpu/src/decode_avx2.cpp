// The decoding bodies for AVX2. Own.
#ifdef HB_WITH_AVX2
#include "decode.inc"

const hb::DecodeBodies* hb::decode_avx2() { return &kBodies; }
#else
#include "decode.h"

const hb::DecodeBodies* hb::decode_avx2() { return nullptr; }
#endif
