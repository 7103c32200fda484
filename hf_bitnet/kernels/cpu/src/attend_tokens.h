// Causal attention of many new tokens: what one instruction set must bring. Own.
//
// Keys and values of a head are laid out once, in blocks of kAttendKeys positions, for the products of the body; then every
// kAttendRows queries of a head go over the blocks that they see, with the largest score and the sum so far (the online softmax of
// arXiv 1805.02867, in blocks as in arXiv 2205.14135). Scores and sums are float32; what rounds on the way is the body's matter.
#pragma once

#include "internal.h"

namespace hb {

constexpr int64_t kAttendRows = 32, kAttendKeys = 256;

// The query heads that share one head of keys, for `tokens` new positions of a sequence after `length` past ones. Token t sees
// positions 0 .. length + t. Strides in elements of `dtype`.
struct Attention {
    int dtype;
    int64_t heads, head_dim;
    float scaling;
    const char *keys, *values;  // (length + tokens, head_dim)
    int64_t position_stride;
    int64_t length, tokens;
    const char* q;  // (tokens, heads, head_dim)
    char* out;      // laid out alike
    int64_t token_stride;
};

struct AttendBodies {
    int64_t (*block_bytes)(int64_t head_dim);
    int64_t (*space_bytes)(int64_t head_dim);
    // keys and values of positions [first, first + kAttendKeys), as far as they exist -> a block; `first` is a multiple
    void (*lay_out)(const Attention& a, int64_t first, void* block);
    // results of tokens [token, token + kAttendRows), as far as they exist; `blocks` follow each other
    void (*attend)(const Attention& a, const char* blocks, int64_t token, void* space);
    void (*begin)();  // once per thread and region, around `attend`
    void (*end)();
};

const AttendBodies* attend_amx();  // of bfloat16 only; NULL where not compiled in

}  // namespace hb
