// What this machine can do at most: bytes read from memory, and int8 products of each instruction set. Own.
//
// Streaming read: every thread adds up its part of a buffer, which it walks in `streams` places at once; a core has only so
// many misses under way, and the number of places decides how many of them the prefetchers find. Nothing is prefetched by hand.
// Peak of an instruction: a loop of it alone, on registers, with more accumulators than its latency needs. A multiplication
// and its addition count as two operations.
//
// Calls from C: the packed products of one row back to back, without Python between them.
//
// For benchmarks.cpu_limits, which compiles this file for the machine it runs on. Leaves out: timing, which threads, and
// whether the processor has an instruction (the caller asks only for those that it has).
#include <stdint.h>

#include "hf_bitnet_cpu.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using RangeBody = hb_range_body;
using ParallelFor = hb_parallel_for;

// calls body once for each of `threads` numbers, on torch's threads where `for_range` is torch's torch_parallel_for
void each_thread(ParallelFor for_range, int64_t threads, RangeBody body, void* context) {
    if (for_range) {
        for_range(0, threads, 1, body, context);
    } else {
        body(0, threads, context);
    }
}

// ---- streaming read ----

constexpr int64_t kLine = 64;
constexpr int64_t kStep = 4 * kLine;  // bytes of one stream before the next one's turn
typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));

struct Read {
    const char* data;
    int64_t bytes;  // of each thread
    uint64_t* sums;
};

template <int kStreams>
uint64_t sum_of(const char* data, int64_t bytes) {
    const int64_t each = bytes / kStreams / kStep * kStep;
    Line sums[4] = {};
    for (int64_t at = 0; at < each; at += kStep) {
#pragma GCC unroll 8
        for (int stream = 0; stream < kStreams; ++stream) {
            const char* from = data + stream * each + at;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[i] += *reinterpret_cast<const Line*>(from + i * kLine);
        }
    }
    const Line all = sums[0] + sums[1] + sums[2] + sums[3];
    return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

template <int kStreams>
void read_part(int64_t begin, int64_t end, void* context) {
    const Read& read = *static_cast<const Read*>(context);
    for (int64_t part = begin; part < end; ++part) {
        read.sums[part] = sum_of<kStreams>(read.data + part * read.bytes, read.bytes);
    }
}

// ---- peaks: 12 (or 6) independent accumulators, registers 14 and 15 the operands ----

#if defined(__x86_64__)

#define HB_X86_VECTORS \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm14", "xmm15"
#define HB_LOOP(body) \
    asm volatile("1:\n" body "dec %0\n jnz 1b\n vzeroupper" : "+r"(rounds) : : "memory", "cc", HB_X86_VECTORS)
#define HB_TWELVE(i) i(0) i(1) i(2) i(3) i(4) i(5) i(6) i(7) i(8) i(9) i(10) i(11)

#define HB_DOT_ZMM(to) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #to "\n"
int64_t dot_zmm(int64_t rounds) {
    const int64_t operations = rounds * 12 * 128;
    HB_LOOP(HB_TWELVE(HB_DOT_ZMM));
    return operations;
}

#define HB_DOT_YMM(to) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #to "\n"
int64_t dot_ymm(int64_t rounds) {
    const int64_t operations = rounds * 12 * 64;
    HB_LOOP(HB_TWELVE(HB_DOT_YMM));
    return operations;
}

#define HB_PAIRS(product, sum) \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #product "\n vpaddw %%ymm" #product ", %%ymm" #sum ", %%ymm" #sum "\n"
int64_t pairs_ymm(int64_t rounds) {
    const int64_t operations = rounds * 6 * 64;
    HB_LOOP(HB_PAIRS(0, 6) HB_PAIRS(1, 7) HB_PAIRS(2, 8) HB_PAIRS(3, 9) HB_PAIRS(4, 10) HB_PAIRS(5, 11));
    return operations;
}

// tiles 0 to 5 accumulate, 6 and 7 are the operands; all of 16 rows of 64 bytes. Operands that were never loaded count as
// zeros, and products with those are not slowed down by another thread of the core as all others are.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define HB_TILE(to) "tdpbusd %%tmm7, %%tmm6, %%tmm" #to "\n"
int64_t dot_tile(int64_t rounds) {
    const int64_t operations = rounds * 6 * 2 * 16 * 16 * 64, row_bytes = 64;
    const TileConfig config;
    uint8_t operand[1024];
    for (int i = 0; i < 1024; ++i) operand[i] = uint8_t(1 + i % 3);
    asm volatile("ldtilecfg %1\n tileloadd (%2,%3,1), %%tmm6\n tileloadd (%2,%3,1), %%tmm7\n1:\n" HB_TILE(0) HB_TILE(1)
                 HB_TILE(2) HB_TILE(3) HB_TILE(4) HB_TILE(5) "dec %0\n jnz 1b\n tilerelease"
                 : "+r"(rounds)
                 : "m"(config), "r"(operand), "r"(row_bytes)
                 : "memory", "cc");
    return operations;
}

// the operating system gives the tiles to a process that asks
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return true;
#endif
}

#elif defined(__aarch64__)

#define HB_SDOT(to) "sdot v" #to ".4s, v30.16b, v31.16b\n"
int64_t dot_neon(int64_t rounds) {
    const int64_t operations = rounds * 12 * 32;
    asm volatile(".arch armv8.2-a+dotprod\n1:\n" HB_SDOT(0) HB_SDOT(1) HB_SDOT(2) HB_SDOT(3) HB_SDOT(4) HB_SDOT(5)
                 HB_SDOT(16) HB_SDOT(17) HB_SDOT(18) HB_SDOT(19) HB_SDOT(20) HB_SDOT(21) "subs %0, %0, #1\n b.ne 1b\n"
                 : "+r"(rounds)
                 :
                 : "memory", "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v16", "v17", "v18", "v19", "v20", "v21", "v30", "v31");
    return operations;
}

#endif

// in the order of hb_level; the portable level has no instruction of its own
using Peak = int64_t (*)(int64_t rounds);
#if defined(__x86_64__)
constexpr Peak kPeaks[] = {nullptr, pairs_ymm, dot_ymm, dot_zmm, dot_tile, nullptr};
#elif defined(__aarch64__)
constexpr Peak kPeaks[] = {nullptr, nullptr, nullptr, nullptr, nullptr, dot_neon};
#else
constexpr Peak kPeaks[] = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
#endif

struct PeakRun {
    Peak peak;
    int64_t rounds;
    int64_t operations;  // of one thread
};

void peak_part(int64_t begin, int64_t end, void* context) {
    PeakRun& run = *static_cast<PeakRun*>(context);
    for (int64_t part = begin; part < end; ++part) {
        const int64_t operations = run.peak(run.rounds);
        if (part == 0) run.operations = operations;
    }
}

}  // namespace

extern "C" {

// Reads `bytes` at `data` (8-byte aligned) with 1, 2, 4 or 8 streams in each of at most 64 threads. Returns the sum of the
// words it has read, so that the reading cannot be left out; -1 where it does not know that many streams or threads.
int64_t limits_read(const void* data, int64_t bytes, int64_t streams, ParallelFor for_range, int64_t threads) {
    uint64_t sums[64] = {};
    const RangeBody body = streams == 1   ? read_part<1>
                           : streams == 2 ? read_part<2>
                           : streams == 4 ? read_part<4>
                           : streams == 8 ? read_part<8>
                                          : nullptr;
    if (!body || threads < 1 || threads > 64) return -1;
    Read read{static_cast<const char*>(data), bytes / threads / 8 * 8, sums};
    each_thread(for_range, threads, body, &read);
    uint64_t sum = 0;
    for (int64_t i = 0; i < threads; ++i) sum += sums[i];
    return static_cast<int64_t>(sum >> 1);
}

// Runs `rounds` > 0 of the loop for `level` (an hb_level that this machine offers) in each thread. Returns the operations
// of all threads; 0 where the level has no such instruction.
int64_t limits_peak(int64_t level, int64_t rounds, ParallelFor for_range, int64_t threads) {
    if (level < 0 || level >= static_cast<int64_t>(sizeof(kPeaks) / sizeof(kPeaks[0])) || !kPeaks[level]) return 0;
#if defined(__x86_64__)
    if (kPeaks[level] == dot_tile && !may_use_tiles()) return 0;
#endif
    PeakRun run{kPeaks[level], rounds, 0};
    each_thread(for_range, threads, peak_part, &run);
    return run.operations * threads;
}

// hb_linear (at `linear`) of one bfloat16 row (k) with each of `count` packed weights (n, k), which lie one after another
// and share one scale; out bfloat16 (n). Returns the first error.
int64_t limits_rows(void* linear, const uint8_t* weights, int64_t count, int64_t n, int64_t k, int64_t bits, int64_t lowest,
                    int64_t step, const void* x, const float* scale, void* out) {
    const auto call = reinterpret_cast<decltype(&hb_linear)>(linear);
    hb_input input{};
    input.x = x, input.x_stride = k, input.x_dtype = HB_BF16;
    input.qmin = -128, input.qmax = 127, input.eps = 1e-5f;
    const hb_grid grid{static_cast<int32_t>(bits), 1, static_cast<int32_t>(lowest), static_cast<int32_t>(step), 0};
    const int64_t row_bytes = k * bits / 8;
    for (int64_t i = 0; i < count; ++i) {
        const hb_weight weight{weights + i * n * row_bytes, n, row_bytes, scale, 1, 1, nullptr, 0, out, n};
        if (const int error = call(&input, 1, k, &grid, &weight, 1, HB_BF16)) return error;
    }
    return 0;
}

}  // extern "C"
