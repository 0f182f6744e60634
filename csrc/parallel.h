// Threads for one call: no pool outlives it, so nothing spins beside torch's own threads and a fork finds none.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace pke_fast {

// Runs body(block) once for every block in 0 .. blocks - 1, on at most `threads` threads, the caller's among them.
// A block goes to whoever is free. So that the result doesn't depend on the number of threads, the blocks have to come
// from the shape alone and each has to write what no other reads or writes. `body` must not throw.
template <typename Body>
void parallel_for(std::size_t blocks, std::size_t threads, const Body& body) {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) body(block);
    };
    std::vector<std::thread> helpers;
    const std::size_t wanted = std::min(threads, blocks);
    if (wanted > 1) helpers.reserve(wanted - 1);
    try {
        while (helpers.size() + 1 < wanted) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads: those there are do the work.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace pke_fast
