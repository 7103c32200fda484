// Products with AVX2 alone. Own.
#include "product.h"

#ifdef HB_WITH_AVX2

#include "product_ymm.inc"

const hb::ProductBodies* hb::product_avx2() { return &kYmmBodies; }
#else
const hb::ProductBodies* hb::product_avx2() { return nullptr; }
#endif
