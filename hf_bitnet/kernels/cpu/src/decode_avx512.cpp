// The decoding bodies for AVX-512. Own.
#ifdef HB_WITH_AVX512
#include "decode.inc"

const hb::DecodeBodies* hb::decode_avx512() { return &kBodies; }
#else
#include "decode.h"

const hb::DecodeBodies* hb::decode_avx512() { return nullptr; }
#endif
