// hb_experts_call: the products of each row with the weights of the experts that it chose. Own.
//
// A few rows: one parallel region over the outputs of all chosen weights, each on its own row. More: rows are quantized once,
// gathered by expert, and some hundred of an expert's are multiplied by one thread, the most first; where there are too few such
// tasks, all threads work on one after another.
#include <algorithm>

#include "product.h"

extern "C" {

typedef struct {
    hb_input input;  // floats
    int64_t tokens, k;
    // (tokens, chosen): which expert; other numbers than 0 .. experts - 1: none, whose results are zeros
    const int64_t* index;
    int64_t chosen, experts, maps;
    int32_t out_dtype;
    hb_grid grid;
    // hb_weight weights[maps * experts] follow; results (tokens * chosen, n) go to `out` of the first weight of each map
} hb_experts_block;

static_assert(sizeof(hb_experts_block) % alignof(hb_weight) == 0, "the weights follow without a gap");

}  // extern "C"

namespace hb {
namespace {

constexpr int64_t kFewTokens = 8, kFewPlaces = 16;  // of the first form
constexpr int64_t kTogether = 2 * kFewPlaces;       // weights in one region of the first form, at most
constexpr int64_t kTokenBytes = 16 << 20;           // int8 bytes of rows that are gathered from at a time
constexpr int64_t kRows = 512;                      // rows of one expert that are multiplied together, at most

struct Call {
    const hb_experts_block& given;
    const hb_weight* weights;

    bool exists(int64_t expert) const { return expert >= 0 && expert < given.experts; }
    const hb_weight& weight(int64_t map, int64_t expert) const { return weights[map * given.experts + expert]; }
    // Where the results of a map at a place begin.
    char* result(int64_t map, int64_t place) const {
        const hb_weight& first = weights[map * given.experts];
        return at(first.out, given.out_dtype, place * first.n);
    }
    size_t bytes(int64_t map) const { return size_t(weights[map * given.experts].n) * size_of(given.out_dtype); }
    void clear(int64_t map, int64_t place) const {
        if (bytes(map)) memset(result(map, place), 0, bytes(map));
    }
    // The weight of a map and an expert, with its results at `out`.
    hb_weight placed(int64_t map, int64_t expert, void* out) const {
        hb_weight weight = this->weight(map, expert);
        weight.out = out, weight.out_stride = weight.n;
        return weight;
    }
};

int few(const Call& call) {
    const auto& given = call.given;
    hb_weight weights[kTogether];
    int64_t rows[kTogether], count = 0;
    const auto flush = [&] {
        const int64_t together = count;
        count = 0;
        if (!together) return int(HB_OK);
        return linear(given.input, given.tokens, given.k, given.grid, weights, together, given.out_dtype, rows);
    };
    for (int64_t map = 0; map < given.maps; ++map) {
        for (int64_t place = 0; place < given.tokens * given.chosen; ++place) {
            const int64_t expert = given.index[place];
            if (!call.exists(expert)) {
                call.clear(map, place);
                continue;
            }
            // weights of one region have as many groups of inputs each
            if (count == kTogether || (count && call.weight(map, expert).groups != weights[0].groups))
                if (const int error = flush()) return error;
            weights[count] = call.placed(map, expert, call.result(map, place));
            rows[count++] = place / given.chosen;
        }
    }
    return flush();
}

// Quantized tokens.
struct Gathered {
    const int8_t* codes;
    const float* scales;
    int64_t first;  // token that they begin with
};

// Places of one expert that are multiplied together.
struct Task {
    int64_t expert, count;
    const int64_t* places;
};

// The products of one task.
int of_expert(const Call& call, const Gathered& from, const Task& task) {
    const auto& given = call.given;
    const int64_t k = given.k, count = task.count, *places = task.places;
    size_t size = size_t(round_up(count * (k + 4), 64));
    const size_t results_at = size;
    for (int64_t map = 0; map < given.maps; ++map) size += size_t(count) * call.bytes(map);
    auto* codes = static_cast<int8_t*>(scratch(SLOT_EXPERT, size));
    if (!codes) return HB_ERROR_MEMORY;
    auto* scales = reinterpret_cast<float*>(codes + round_up(count * k, 4));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = places[i] / given.chosen - from.first;
        memcpy(codes + i * k, from.codes + row * k, size_t(k));
        scales[i] = from.scales[row];
    }
    const hb_input input = {codes, k, scales, nullptr, nullptr, HB_I8, 0, 0.0f, 0.0f, 0.0f, 0.0f};
    char* results = reinterpret_cast<char*>(codes) + results_at;
    for (int64_t map = 0; map < given.maps; ++map) {
        if (!call.bytes(map)) continue;
        const hb_weight weight = call.placed(map, task.expert, results);
        if (const int error = hb_linear(&input, count, k, &given.grid, &weight, 1, given.out_dtype)) return error;
        for (int64_t i = 0; i < count; ++i)
            memcpy(call.result(map, places[i]), results + size_t(i) * call.bytes(map), call.bytes(map));
        results += size_t(count) * call.bytes(map);
    }
    return HB_OK;
}

int many(const Call& call, int64_t first, int64_t tokens) {
    const auto& given = call.given;
    const int64_t places = tokens * given.chosen, experts = given.experts, base = first * given.chosen;
    const int64_t most_tasks = experts + places / kRows;
    const size_t code_bytes = size_t(round_up(tokens * given.k, 64)), scale_bytes = size_t(round_up(tokens, 16)) * 4;
    const size_t task_bytes = size_t(most_tasks) * sizeof(Task), numbers = size_t(places + 2 * experts + 1) * 8;
    auto* memory = static_cast<char*>(scratch(SLOT_TOKENS, code_bytes + scale_bytes + task_bytes + numbers));
    if (!memory) return HB_ERROR_MEMORY;
    auto* codes = reinterpret_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(memory + code_bytes);
    auto* tasks = reinterpret_cast<Task*>(memory + code_bytes + scale_bytes);
    // the places of expert e are order[starts[e]] to order[starts[e + 1] - 1]
    auto* order = reinterpret_cast<int64_t*>(memory + code_bytes + scale_bytes + task_bytes);
    int64_t *starts = order + places, *next = starts + experts + 1;
    const hb_input& x = given.input;
    const int error = hb_quantize_rows(at(x.x, x.x_dtype, first * x.x_stride), x.x_dtype, tokens, given.k, x.x_stride, x.qmin,
                                       x.qmax, x.eps, codes, scales);
    if (error) return error;

    memset(starts, 0, size_t(experts + 1) * 8);
    for (int64_t i = base; i < base + places; ++i)
        if (call.exists(given.index[i])) ++starts[given.index[i] + 1];
    for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    memcpy(next, starts, size_t(experts) * 8);
    for (int64_t i = base; i < base + places; ++i) {
        if (call.exists(given.index[i]))
            order[next[given.index[i]]++] = i;
        else
            for (int64_t map = 0; map < given.maps; ++map) call.clear(map, i);
    }
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t i = starts[e]; i < starts[e + 1]; i += kRows) tasks[count++] = {e, smaller(kRows, starts[e + 1] - i), order + i};
    std::stable_sort(tasks, tasks + count, [](const Task& a, const Task& b) { return a.count > b.count; });

    const Gathered from{codes, scales, first};
    std::atomic<int> failed{HB_OK};
    const auto compute = [&](int64_t i) {
        if (const int error = of_expert(call, from, tasks[i])) failed = error;
    };
    if (count >= 2 * threads())
        take_in_order(count, [](bool) {}, compute);
    else
        for (int64_t i = 0; i < count; ++i) compute(i);
    return failed;
}

}  // namespace
}  // namespace hb

extern "C" {

HB_API int hb_experts_call(const hb_experts_block* given) {
    using namespace hb;
    const hb::Call call{*given, reinterpret_cast<const hb_weight*>(given + 1)};
    if (given->tokens < 0 || given->k < 0 || given->chosen < 0 || given->experts < 1 || given->maps < 1) return HB_ERROR_ARGUMENT;
    if (!is_float(given->input.x_dtype) || given->input.norm_weight || !is_float(given->out_dtype)) return HB_ERROR_ARGUMENT;
    for (int64_t map = 0; map < given->maps; ++map)
        for (int64_t expert = 1; expert < given->experts; ++expert)
            if (call.weight(map, expert).n != call.weight(map, 0).n) return HB_ERROR_ARGUMENT;
    const int64_t places = given->tokens * given->chosen;
    if (!places) return HB_OK;
    if (given->tokens <= kFewTokens && places <= kFewPlaces) return few(call);
    const int64_t step = kTokenBytes / (given->k + 1) + 1;
    for (int64_t first = 0; first < given->tokens; first += step)
        if (const int error = many(call, first, smaller(step, given->tokens - first))) return error;
    return HB_OK;
}

}  // extern "C"
