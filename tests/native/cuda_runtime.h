// Test only: as much of CUDA as csrc/*.cu uses, on the CPU, so that the very same kernels run without a GPU.
//
// A block's threads are fibers of one CPU thread. They run until a barrier, in an order that changes all the time, so a
// barrier that is missing shows. Blocks run on several CPU threads at once, the "multiprocessors"; what they leave in
// shared memory is what the next block finds there. Under ThreadSanitizer only what CUDA promises orders two accesses:
// __syncthreads within a block, __threadfence with an atomic between blocks, and the end of a launch. (__shfl_*_sync
// and atomics order nothing alone.)
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)
#define __shared__ static thread_local
// What belongs to the emulation itself is not a part of what is examined.
#define EMULATION __attribute__((no_sanitize("thread"), noinline))

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned count = 1) : x(count) {}
};
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration" : "no error"; }
inline const char* cudaGetErrorName(cudaError_t error) {
    return error ? "cudaErrorInvalidConfiguration" : "cudaSuccess";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

namespace emulated {

constexpr unsigned kWarp = 32, kMultiprocessors = 3, kMostThreads = 1024;
constexpr size_t kStack = 128 << 10;

inline void acquire([[maybe_unused]] void* token) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(token);
#endif
}
inline void release([[maybe_unused]] void* token) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(token);
#endif
}

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

class Multiprocessor;
inline thread_local Multiprocessor* here = nullptr;

class Multiprocessor {
  public:
    Multiprocessor() : fibers_(kMostThreads), stacks_(new char[kMostThreads * kStack]) {
#ifdef __SANITIZE_THREAD__
        own_ = __tsan_get_current_fiber();
        for (Fiber& fiber : fibers_) fiber.tsan = __tsan_create_fiber(0);
#endif
    }

    EMULATION void run_block(unsigned index, unsigned threads, const std::function<void()>& body) {
        block_ = index;
        body_ = &body;
        for (unsigned i = 0; i < threads; ++i) prepare(fibers_[i], stacks_.get() + i * kStack);
        release(&edge_);
        unsigned done = 0;
        while (done < threads) {
            bool moved = false;
            const unsigned stride = next_random() | 1, offset = next_random();
            for (unsigned i = 0; i < kMostThreads; ++i) {  // an odd stride visits each of a power of two
                current_ = (i * stride + offset) % kMostThreads;
                if (current_ >= threads || fibers_[current_].state != State::kReady) continue;
                switch_to(fibers_[current_]);
                done += fibers_[current_].state == State::kDone;
                moved = true;
            }
            for (unsigned warp = 0; warp < threads; warp += kWarp) {
                if (all(warp, min(warp + kWarp, threads), State::kAtWarpBarrier)) {
                    wake(warp, min(warp + kWarp, threads));
                    moved = true;
                }
            }
            if (all(0, threads, State::kAtBlockBarrier)) {
                wake(0, threads);
                moved = true;
            }
            if (!moved) {
                std::fprintf(stderr, "emulated CUDA: block %u: not all threads reach the same barrier\n", index);
                std::abort();
            }
        }
        acquire(&edge_);
    }

    EMULATION unsigned thread() const { return current_; }
    EMULATION unsigned block() const { return block_; }

    EMULATION void wait(State barrier) {
        Fiber& fiber = fibers_[current_];
        fiber.state = barrier;
#ifdef __SANITIZE_THREAD__
        __tsan_switch_to_fiber(own_, __tsan_switch_to_fiber_no_sync);
#endif
        swapcontext(&fiber.context, &scheduler_);
    }

    // What the lane `offset` below this one brings; its own where there is none. No memory is ordered by it.
    template <typename T>
    EMULATION T shuffle_up(T value, unsigned offset) {
        const unsigned me = current_;
        static_assert(sizeof value <= sizeof fibers_[me].brought);
        std::memcpy(&fibers_[me].brought, &value, sizeof value);
        wait(State::kAtWarpBarrier);
        if (me % kWarp >= offset) std::memcpy(&value, &fibers_[me - offset].brought, sizeof value);
        wait(State::kAtWarpBarrier);
        return value;
    }

    // A fence orders what comes before it with what another thread does behind its own fence, if an atomic of this
    // thread after the fence is seen by an atomic of the other before its fence.
    EMULATION void fence() {
        Fiber& fiber = fibers_[current_];
        if (fiber.last_atomic) acquire(fiber.last_atomic);
        fiber.fenced = true;
    }
    EMULATION bool fenced_before_atomic(void* address) {
        fibers_[current_].last_atomic = address;
        return fibers_[current_].fenced;
    }

    void block_barrier() {
        release(&barrier_);
        wait(State::kAtBlockBarrier);
        acquire(&barrier_);
    }

  private:
    struct Fiber {
        ucontext_t context;
        State state = State::kDone;
        uint64_t brought = 0;
        void* last_atomic = nullptr;
        bool fenced = false;
        void* tsan = nullptr;
    };

    EMULATION static void prepare(Fiber& fiber, char* stack) {
        fiber.state = State::kReady;
        fiber.last_atomic = nullptr;
        fiber.fenced = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Multiprocessor::enter, 0);
    }

    EMULATION static void enter() {
        acquire(&here->edge_);
        (*here->body_)();
        release(&here->edge_);
        here->wait(State::kDone);
    }

    EMULATION void switch_to(Fiber& fiber) {
#ifdef __SANITIZE_THREAD__
        __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
        swapcontext(&scheduler_, &fiber.context);
    }

    EMULATION bool all(unsigned from, unsigned end, State state) const {
        for (unsigned i = from; i < end; ++i) {
            if (fibers_[i].state != state) return false;
        }
        return true;
    }

    EMULATION void wake(unsigned from, unsigned end) {
        for (unsigned i = from; i < end; ++i) fibers_[i].state = State::kReady;
    }

    EMULATION unsigned next_random() { return random_ = random_ * 1664525u + 1013904223u, random_ >> 8; }

    std::vector<Fiber> fibers_;
    std::unique_ptr<char[]> stacks_;
    ucontext_t scheduler_;
    const std::function<void()>* body_ = nullptr;
    unsigned current_ = 0, block_ = 0, random_ = 1;
    char edge_ = 0, barrier_ = 0;  // what ThreadSanitizer orders by: the block's begin and end, and its barrier
    void* own_ = nullptr;
};

// Runs the blocks of one launch after another; block b on multiprocessor b % kMultiprocessors.
class Device {
  public:
    static Device& instance() {
        static Device& device = *new Device;  // its threads live as long as the process
        return device;
    }

    void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
        std::unique_lock<std::mutex> lock(mutex_);
        blocks_ = blocks;
        threads_ = threads;
        body_ = &body;
        left_ = kMultiprocessors;
        ++launches_;
        changed_.notify_all();
        changed_.wait(lock, [&] { return left_ == 0; });
    }

  private:
    Device() {
        for (unsigned i = 0; i < kMultiprocessors; ++i) std::thread([this, i] { work(i); }).detach();
    }

    void work(unsigned number) {
        Multiprocessor multiprocessor;
        here = &multiprocessor;
        for (uint64_t seen = 0;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return launches_ != seen; });
            seen = launches_;
            const unsigned blocks = blocks_, threads = threads_;
            const std::function<void()>& body = *body_;
            lock.unlock();
            for (unsigned block = number; block < blocks; block += kMultiprocessors) {
                multiprocessor.run_block(block, threads, body);
            }
            lock.lock();
            if (--left_ == 0) changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    const std::function<void()>* body_ = nullptr;
    unsigned blocks_ = 0, threads_ = 0, left_ = 0;
    uint64_t launches_ = 0;
};

struct Index {
    unsigned x;
};

}  // namespace emulated

#define threadIdx (emulated::Index{emulated::here->thread()})
#define blockIdx (emulated::Index{emulated::here->block()})

inline void __syncthreads() { emulated::here->block_barrier(); }
inline void __threadfence() { emulated::here->fence(); }
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
    return emulated::here->shuffle_up(value, offset);
}
template <typename T>
T atomicAdd(T* to, T value) {
    return emulated::here->fenced_before_atomic(to) ? __atomic_fetch_add(to, value, __ATOMIC_RELEASE)
                                                    : __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (!config->gridDim.x || !config->blockDim.x || config->blockDim.x > emulated::kMostThreads) {
        return cudaErrorInvalidConfiguration;
    }
    emulated::Device::instance().launch(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
    return cudaSuccess;
}
