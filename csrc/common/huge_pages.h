// Huge pages for large results on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace efe {

// For a result that is about to be written for the first time. Blocks of this size malloc maps anew for each call, and
// the kernel then takes a page fault for every 4 KiB of them, which costs many times what the write does; where huge
// pages are to be asked for, as is usual (transparent_hugepage=madvise), this asks for them: a fault per 2 MiB.
inline void prefer_huge_pages(const at::Tensor& fresh) {
#ifdef MADV_HUGEPAGE
    constexpr size_t kMappedAnew = size_t{32} << 20;  // the largest that glibc lets M_MMAP_THRESHOLD grow to
    const size_t bytes = fresh.nbytes();
    if (bytes < kMappedAnew) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()), end = begin + bytes;
    const uintptr_t first = (begin + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), end / page * page - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

}  // namespace efe
