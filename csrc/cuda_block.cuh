// What the threads of a block do together, and the blocks of a grid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pke_fast {

constexpr unsigned kWarp = 32;

// N values that lie one behind the other, moved by one instruction where they are aligned.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
    T lane[N];
};

// The first `count` of N values, the others zero. Any address and any count will do; an aligned full one is fast.
template <int N, typename T>
__device__ inline Vector<T, N> load(const T* from, int count) {
    if (count >= N && reinterpret_cast<uintptr_t>(from) % sizeof(Vector<T, N>) == 0) {
        return *reinterpret_cast<const Vector<T, N>*>(from);
    }
    Vector<T, N> values{};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (j < count) values.lane[j] = from[j];
    }
    return values;
}

// The sum of what the threads before this one bring, and `total`, that of all. Every thread of the block has to call
// it.
template <unsigned kThreads, typename T>
__device__ inline T block_scan(T value, T (&warp_sums)[kThreads / kWarp], T& total) {
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T inclusive = value;
#pragma unroll
    for (unsigned step = 1; step < kWarp; step *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == kWarp - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    T before = 0;
    total = 0;
#pragma unroll
    for (unsigned w = 0; w < kThreads / kWarp; ++w) {
        if (w == warp) before = total;
        total += warp_sums[w];
    }
    __syncthreads();  // the next scan writes the sums again
    return before + inclusive - value;
}

// Whether this block is the last of `blocks` to come here; it then sees what the others wrote before. Which one is last
// differs from run to run, so what it computes must not depend on it. The ticket is zero before and after.
__device__ inline bool is_last_block(uint32_t* ticket, uint32_t blocks, bool& shared_flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // the block's writes before the ticket; the barrier has made them this thread's
        shared_flag = atomicAdd(ticket, 1u) == blocks - 1;
        __threadfence();  // the ticket before what is read from the other blocks
        if (shared_flag) *ticket = 0;
    }
    __syncthreads();
    return shared_flag;
}

}  // namespace pke_fast
