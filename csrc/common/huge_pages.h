// Huge pages for large results on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace efe {

// For a result that is about to be written for the first time. malloc maps blocks of this size anew on each call, and the
// first write to each 4 KiB of them is a page fault: together these cost many times what the writing does. Where the
// system gives huge pages on request (transparent_hugepage=madvise, the usual setting), one fault serves 2 MiB.
inline void prefer_huge_pages(void* fresh, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t kMappedAnew = size_t{32} << 20;  // glibc's upper limit for M_MMAP_THRESHOLD
    if (bytes < kMappedAnew) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(fresh) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(fresh) + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: it may fail
#endif
}

}  // namespace efe
