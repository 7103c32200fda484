// Which instruction set serves: asked of the processor once, or set by hand. Threads and scratch memory. Own.
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include <atomic>

#include "internal.h"

#if defined(__x86_64__) || defined(_M_X64)
#define HB_X86 1
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace hb {
namespace {

struct Processor {
    bool legal[HB_LEVELS] = {true, false, false, false, false, false};
    Processor();
};

#ifdef HB_X86
uint64_t enabled_state() {  // XCR0: which registers the operating system saves
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__)
    // Linux gives the 8 KB of tile registers to processes that ask for them: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

Processor::Processor() {
#ifdef HB_X86
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & (1u << 27))) return;  // OSXSAVE
    const bool fma = c & (1u << 12), f16c = c & (1u << 29);
    const uint64_t state = enabled_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    uint32_t a1 = 0, unused;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    __get_cpuid_count(7, 1, &a1, &unused, &unused, &unused);
    if (!ymm || !fma || !f16c || !(b & (1u << 5))) return;
    // product_*() last: they are compiled for their instruction set, so that even asking for the table needs it
    legal[HB_AVX2] = product_avx2() != nullptr;
    legal[HB_AVXVNNI] = (a1 & (1u << 4)) && product_avxvnni();
    const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
    legal[HB_AVX512VNNI] = zmm && (b & avx512) == avx512 && (c & (1u << 11)) && product_avx512vnni();
#ifdef HB_EMULATE_AMX
    legal[HB_AMX] = legal[HB_AVX512VNNI] && product_amx();
#else
    // tiles, of int8 and of bfloat16, and vectors that are rounded to bfloat16: there is no processor with one of the three
    const uint32_t with_tiles = (1u << 22) | (1u << 24) | (1u << 25);
    const bool amx = (d & with_tiles) == with_tiles && (a1 & (1u << 5)), tiles = (state & 0x60000) == 0x60000;
    legal[HB_AMX] = legal[HB_AVX512VNNI] && amx && tiles && may_use_tiles() && product_amx();
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
    legal[HB_NEON] = (getauxval(AT_HWCAP) & (1ul << 20)) && product_neon();  // ASIMDDP
#else
    legal[HB_NEON] = product_neon() != nullptr;  // every Apple processor of this kind has it
#endif
#endif
}

const Processor& processor() {
    static const Processor found;
    return found;
}

int best_level() {
    for (int level = HB_LEVELS - 1; level > 0; --level)
        if (processor().legal[level]) return level;
    return HB_PORTABLE;
}

std::atomic<int> chosen{-1};

hb_parallel_for parallel_for = nullptr;
hb_thread_count thread_count = nullptr;

// Memory at a multiple of 64 bytes, or NULL.
void* allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 64);
#else
    void* block = nullptr;
    return posix_memalign(&block, 64, bytes) ? nullptr : block;
#endif
}
void release(void* block) {
#if defined(_WIN32)
    _aligned_free(block);
#else
    free(block);
#endif
}

// The thread's buffers; freed when it ends.
struct Buffers {
    void* data[SLOTS] = {};
    size_t size[SLOTS] = {};
    ~Buffers() {
        for (void* block : data) release(block);
    }
};
thread_local Buffers buffers;
thread_local bool inside = false;  // a part of a parallel region

}  // namespace

// Inside a part of a parallel region there is one thread: torch does not nest regions either, but does not say so.
int threads() { return inside || !thread_count ? 1 : int(thread_count()); }

void parallel(int64_t size, int64_t grain, hb_range_body body, void* context) {
    if (size <= 0) return;
    if (!parallel_for || inside || size <= grain) return body(0, size, context);
    struct Part {
        hb_range_body body;
        void* context;
    } part = {body, context};
    const auto marked = [](int64_t begin, int64_t end, void* given) {
        const auto* part = static_cast<const Part*>(given);
        inside = true;
        part->body(begin, end, part->context);
        inside = false;
    };
    parallel_for(0, size, grain < 1 ? 1 : grain, marked, &part);
}

void* scratch(Slot slot, size_t bytes) {
    if (buffers.size[slot] < bytes) {
        const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        release(buffers.data[slot]);
        buffers.size[slot] = 0;
        buffers.data[slot] = allocate(rounded);
        if (!buffers.data[slot]) return nullptr;
        buffers.size[slot] = rounded;
    }
    return buffers.data[slot];
}

const RowBodies& rows() { return of_width(rows_portable(), rows_avx2, rows_avx512); }

const ProductBodies& product() {
    switch (hb_level()) {
        case HB_AVX2: return *product_avx2();
        case HB_AVXVNNI: return *product_avxvnni();
        case HB_AVX512VNNI: return *product_avx512vnni();
        case HB_AMX: return *product_amx();
        case HB_NEON: return *product_neon();
        default: return *product_portable();
    }
}

}  // namespace hb

extern "C" {

int hb_abi_version(void) { return HB_ABI_VERSION; }

int hb_level(void) {
    int level = hb::chosen.load(std::memory_order_relaxed);
    if (level < 0) {
        level = hb::best_level();
        hb::chosen.store(level, std::memory_order_relaxed);
    }
    return level;
}

const char* hb_level_name(int level) {
    static const char* const names[HB_LEVELS] = {"portable", "avx2", "avxvnni", "avx512vnni", "amx", "neon"};
    return level >= 0 && level < HB_LEVELS ? names[level] : nullptr;
}

int hb_level_legal(int level) { return level >= 0 && level < HB_LEVELS && hb::processor().legal[level]; }

int hb_set_level(int level) {
    if (!hb_level_legal(level)) return HB_ERROR_UNSUPPORTED;
    hb::chosen.store(level, std::memory_order_relaxed);
    return HB_OK;
}

void hb_set_threads(hb_parallel_for for_range, hb_thread_count count) {
    hb::parallel_for = for_range;
    hb::thread_count = count;
}

}  // extern "C"
