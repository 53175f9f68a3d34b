#include "threads.hpp"

#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FASTFFN_HAS_FORK 1
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastffn {
namespace {

bool forked = false;

#if defined(FASTFFN_HAS_FORK)
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

struct Block {
    void* memory = nullptr;
    std::size_t bytes = 0;
    ~Block() { std::free(memory); }
};

// Larger blocks go back at the next smaller demand: one long call should not hold its memory for ever.
constexpr std::size_t kKept = std::size_t{64} << 20;

}  // namespace

int usable_threads(int asked) {
#if defined(_OPENMP)
    if (forked || omp_in_parallel()) return 1;
    return asked < 1 ? 1 : asked;
#else
    (void)asked;
    return 1;
#endif
}

void* scratch(int slot, std::size_t bytes) {
    thread_local Block blocks[kScratchSlots];
    Block& block = blocks[slot];
    if (block.bytes < bytes || (block.bytes > kKept && bytes <= kKept)) {
        std::free(block.memory);
        block.memory = nullptr;
        block.bytes = 0;
        const std::size_t rounded = (bytes + bytes / 4 + 63) / 64 * 64;
        block.memory = std::aligned_alloc(64, rounded);
        if (block.memory == nullptr) throw std::bad_alloc();
        block.bytes = rounded;
    }
    return block.memory;
}

void prefer_large_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kLarge = std::uintptr_t{2} << 20;
    const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
    const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kLarge * kLarge;
    // Advice only: where it is refused nothing is lost.
    if (memory != nullptr && end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace fastffn
