// Random calls of everything in the C ABI, compared with plain arithmetic; made to run under sanitizers and valgrind. Own.
//
//     fuzz level=avx2 seed=1 first=0 cases=2000 threads=2 callers=1 slabs=0
//
// `threads` serve the library's loops, `callers` threads call it at once; `slabs=1` adds products of very many rows. Case i
// depends on the seed and i alone: a failure names both, and `first=i cases=1` repeats it. Ends with 1 at the first failure.
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <mutex>
#include <thread>

#include "fuzz.h"

namespace fuzz {
namespace {

struct Options {
    const char* level = "portable";
    int64_t seed = 1, first = 0, cases = 100, threads = 1, callers = 1, slabs = 0;
} options;

thread_local int64_t current = -1;

// The program's own torch_parallel_for: parts of at least `grain` on threads of their own.
void parallel_for(int64_t begin, int64_t end, int64_t grain, hb_range_body body, void* context) {
    const int64_t size = end - begin, parts = std::min(options.threads, (size + grain - 1) / grain);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < parts; ++i)
        threads.emplace_back([=] { body(begin + size * i / parts, begin + size * (i + 1) / parts, context); });
    body(begin, begin + size / parts, context);
    for (std::thread& thread : threads) thread.join();
}

uint32_t thread_count() { return uint32_t(options.threads); }

using Part = void (*)(Random&);
// products stand more than once: they have the most to go wrong
const Part kParts[] = {fuzz_linear,     fuzz_int_matmul,      fuzz_linear,        fuzz_fixed_matmul, fuzz_quantize_rows,
                       fuzz_linear,     fuzz_quantize_weight, fuzz_quantize_pack, fuzz_linear,       fuzz_pack,
                       fuzz_scale_rows, fuzz_linear,          fuzz_magnitudes,    fuzz_trits,        fuzz_linear,
                       fuzz_rms_norm,   fuzz_rotate,          fuzz_decode_layer,  fuzz_experts,      fuzz_decode_tokens,
                       fuzz_errors};

void run_cases(int64_t caller) {
    const auto parts = int64_t(std::size(kParts));
    for (int64_t i = options.first + caller; i < options.first + options.cases; i += options.callers) {
        current = i;
        Random random(uint64_t(options.seed) * 1000003u + uint64_t(i));
        describe("?");
        kParts[i % parts](random);
    }
}

bool read_option(const char* word) {
    if (!strncmp(word, "level=", 6)) return options.level = word + 6, true;
    const struct {
        const char* name;
        int64_t* value;
    } numbers[] = {{"seed=", &options.seed},       {"first=", &options.first},     {"cases=", &options.cases},
                   {"threads=", &options.threads}, {"callers=", &options.callers}, {"slabs=", &options.slabs}};
    for (const auto& number : numbers)
        if (!strncmp(word, number.name, strlen(number.name))) return *number.value = atoll(word + strlen(number.name)), true;
    return false;
}

// Sets the level of that name; false where this machine or build does not offer it.
bool choose_level(const char* name) {
    for (int level = 0; level < HB_LEVELS; ++level)
        if (!strcmp(hb_level_name(level), name)) return hb_set_level(level) == HB_OK;
    return false;
}

}  // namespace

void fail(const char* format, ...) {
    static std::mutex one_at_a_time;
    one_at_a_time.lock();  // for ever
    fprintf(stderr, "level %s, seed %lld, case %lld: %s: ", options.level, ll(options.seed), ll(current), description);
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    fflush(stderr);
    _Exit(1);
}

}  // namespace fuzz

int main(int count, char** words) {
    using namespace fuzz;
    for (int i = 1; i < count; ++i)
        if (!read_option(words[i])) return fprintf(stderr, "%s is no option, see the head of fuzz.cpp\n", words[i]), 2;
    if (!choose_level(options.level)) return fprintf(stderr, "level %s is not offered here\n", options.level), 3;
    if (hb_abi_version() != HB_ABI_VERSION) return fprintf(stderr, "another library\n"), 3;
    hb_set_threads(parallel_for, thread_count);
    std::vector<std::thread> callers;
    for (int64_t i = 1; i < options.callers; ++i) callers.emplace_back(run_cases, i);
    run_cases(0);
    for (std::thread& caller : callers) caller.join();
    if (options.slabs) {
        Random random(uint64_t(options.seed));
        many_rows(random);
        linear_of_many_rows(random);
    }
    printf("level %s: %lld cases equal plain arithmetic\n", options.level, ll(options.cases));
    return 0;
}
