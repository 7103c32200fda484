// Products with AVX2 and its dot product (AVX-VNNI): laptops since 2021. Own.
#include "product.h"

#ifdef HB_WITH_AVXVNNI
#define HB_YMM_DOT
#include "product_ymm.inc"

const hb::ProductBodies* hb::product_avxvnni() { return &kYmmBodies; }
#else
const hb::ProductBodies* hb::product_avxvnni() { return nullptr; }
#endif
