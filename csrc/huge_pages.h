// Big results in huge pages: their first use then costs a page fault for every 2 MiB instead of every 4 KiB.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pke_fast {

// Asks the system for huge pages within `bytes` at `data`, which nothing has been written to yet. A wish: where the
// system has none to give, or was told to give none, the memory stays as it is.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef __linux__
    constexpr std::size_t kLeast = std::size_t{4} << 20;  // half of it at least lies in whole huge pages
    constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
    if (bytes < kLeast) return;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace pke_fast
