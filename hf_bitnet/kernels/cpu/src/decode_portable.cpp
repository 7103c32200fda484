// The decoding bodies in plain C++. Own.
#include "decode.inc"

const hb::DecodeBodies* hb::decode_portable() { return &kBodies; }
