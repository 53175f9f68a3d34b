// Threads and scratch memory, compiled once for the baseline instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastffn {

// How many threads may run: `asked`, or one in a forked child (whose OpenMP would wait for threads that do not exist)
// and within a parallel region.
int usable_threads(int asked);

// Memory of the calling thread, kept for its next call, aligned to 64 bytes. `slot` tells apart what is in use at once.
// Throws std::bad_alloc.
void* scratch(int slot, std::size_t bytes);
constexpr int kScratchSlots = 12;

// Asks for large pages under memory that is about to be written for the first time: one page fault for each 2 MiB
// instead of 512, which cost more than the kernels. Nothing happens where the system has none, or for small memory.
void prefer_large_pages(void* memory, std::size_t bytes);

}  // namespace fastffn
