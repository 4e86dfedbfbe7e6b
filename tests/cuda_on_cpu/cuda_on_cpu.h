// Stands in for what nvcc knows by itself, so that the kernels' own source runs on the CPU.
//
// The blocks of a grid run one after the other; the threads of a block run at the same time, in one of two ways:
//   STPM_FIBERS    each thread is a fiber, switched at barriers and shuffles: fast, always in the same order
//   otherwise      each thread is a thread of the operating system: slow, and ThreadSanitizer sees every race
// A kernel in which some threads of a block miss a barrier ends the program with a message instead of hanging.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#ifdef STPM_FIBERS
#include <ucontext.h>
#else
#include <barrier>
#include <memory>
#include <thread>
#endif

#define __global__
#define __device__
#define __launch_bounds__(threads)
// one block at a time, so one copy serves all of them
#define __shared__ static

using std::max;
using std::min;
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
typedef _Float16 __half;
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return static_cast<__half>(value); }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

namespace cpu {

constexpr int WARP = 32;

struct Block {
    dim3 grid, shape;
    int threads;
    std::vector<uint32_t> slots;  // what each thread gives to a shuffle
};
inline Block block;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

#ifdef STPM_FIBERS

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    dim3 index;
    bool done = false;
    int waits = 0;  // barriers reached so far
};
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline dim3 block_index;
inline std::function<void()> body;

inline dim3 thread_index() { return current->index; }
inline int thread_number() { return static_cast<int>(current - fibers.data()); }

inline void wait() {
    ++current->waits;
    swapcontext(&current->context, &scheduler);
}
inline void wait_block() { wait(); }
inline void wait_warp() { wait(); }

inline void enter() {
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

inline void run_block() {
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.waits = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    // every round takes each thread to its next barrier or to its end
    for (;;) {
        int done = 0, waits = -1;
        for (Fiber& fiber : fibers) {
            if (!fiber.done) {
                current = &fiber;
                swapcontext(&scheduler, &fiber.context);
            }
            done += fiber.done;
        }
        if (done == block.threads) return;
        for (const Fiber& fiber : fibers) {
            if (fiber.done) fail("a thread ended while others wait at a barrier");
            if (waits >= 0 && fiber.waits != waits) fail("threads wait at different barriers");
            waits = fiber.waits;
        }
    }
}

inline void run_grid() {
    if (static_cast<int>(fibers.size()) != block.threads) fibers = std::vector<Fiber>(block.threads);
    for (int number = 0; number < block.threads; ++number) {
        const unsigned n = number;
        fibers[number].index = {n % block.shape.x, n / block.shape.x % block.shape.y,
                                n / block.shape.x / block.shape.y};
    }
    for (block_index.z = 0; block_index.z < block.grid.z; ++block_index.z)
        for (block_index.y = 0; block_index.y < block.grid.y; ++block_index.y)
            for (block_index.x = 0; block_index.x < block.grid.x; ++block_index.x) run_block();
}

#else

inline thread_local dim3 own_thread, block_index;
inline thread_local int own_number;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline std::function<void()> body;
inline std::atomic<int> at_end;

inline dim3 thread_index() { return own_thread; }
inline int thread_number() { return own_number; }
inline void wait_block() {
    block_barrier->arrive_and_wait();
    // whoever has left the kernel waits at the same barrier, between two blocks
    if (at_end.load() != 0) fail("a thread ended while others wait at a barrier");
    block_barrier->arrive_and_wait();
}
inline void wait_warp() { warp_barriers[own_number / WARP]->arrive_and_wait(); }

inline void run_thread(int number) {
    const unsigned n = number;
    own_number = number;
    own_thread = {n % block.shape.x, n / block.shape.x % block.shape.y, n / block.shape.x / block.shape.y};
    for (block_index.z = 0; block_index.z < block.grid.z; ++block_index.z)
        for (block_index.y = 0; block_index.y < block.grid.y; ++block_index.y)
            for (block_index.x = 0; block_index.x < block.grid.x; ++block_index.x) {
                body();
                at_end.fetch_add(1);
                block_barrier->arrive_and_wait();
                if (at_end.load() != block.threads) fail("a thread ended while others wait at a barrier");
                block_barrier->arrive_and_wait();
                if (number == 0) at_end.store(0);
                block_barrier->arrive_and_wait();
            }
}

inline void run_grid() {
    block_barrier = std::make_unique<std::barrier<>>(block.threads);
    warp_barriers.clear();
    for (int first = 0; first < block.threads; first += WARP)
        warp_barriers.push_back(std::make_unique<std::barrier<>>(std::min(WARP, block.threads - first)));
    at_end.store(0);
    std::vector<std::thread> threads;
    for (int number = 0; number < block.threads; ++number) threads.emplace_back(run_thread, number);
    for (std::thread& thread : threads) thread.join();
}

#endif

template <class Kernel, class Parameters>
void launch(Kernel kernel, dim3 grid, dim3 shape, const Parameters& parameters) {
    block = {grid, shape, static_cast<int>(shape.x * shape.y * shape.z), {}};
    block.slots.resize(block.threads);
    body = [=] { kernel(parameters); };
    run_grid();
}

template <class T>
T shuffle_down(T value, int distance) {
    static_assert(sizeof(T) == 4);
    const int own = thread_number(), from = own + distance;
    std::memcpy(&block.slots[own], &value, 4);
    wait_warp();
    T result = value;  // beyond the end of the warp a thread gets its own value back
    if (own % WARP + distance < WARP && from < block.threads) std::memcpy(&result, &block.slots[from], 4);
    wait_warp();
    return result;
}

template <class T, class Join>
void atomic(T* address, Join join) {
    std::atomic_ref<T> target(*address);
    T before = target.load();
    while (!target.compare_exchange_weak(before, join(before))) {
    }
}

}  // namespace cpu

#define threadIdx (cpu::thread_index())
#define blockIdx (cpu::block_index)
#define __syncthreads() cpu::wait_block()
#define __shfl_down_sync(mask, value, distance) cpu::shuffle_down(value, distance)

template <class T>
void atomicMax(T* address, T value) {
    cpu::atomic(address, [=](T before) { return std::max(before, value); });
}
template <class T>
void atomicMin(T* address, T value) {
    cpu::atomic(address, [=](T before) { return std::min(before, value); });
}
template <class T>
void atomicAdd(T* address, T value) {
    cpu::atomic(address, [=](T before) { return before + value; });
}
