// Runs CUDA kernels on the CPU: the blocks of a grid one after another, the threads of a block as fibers that hand over to
// each other at barriers and shuffles. What hangs or is undefined on a GPU aborts with a sentence: a barrier that not every
// thread reaches, threads that meet at different ones, a shuffle of part of a warp, a launch that no device accepts. Shared
// memory is NaN at the start of a block. To ThreadSanitizer a fiber is a thread, which __syncthreads alone orders.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

namespace cuda_emulator {

// Kernels here have one dimension: what asks for y or z does not compile.
struct Index {
    unsigned x;
};

// In which order the blocks of a grid and the threads of a block run. No result may depend on it.
enum class Order { forward, reversed, shuffled };

inline Order order = Order::forward;
inline int64_t grid_limit = 0;  // the kMaxGrid of the source, which a test lowers; 0 where it has none
inline Index thread_index, block_index, block_size, grid_size;

struct Launch {
    const char* kernel;
    int64_t blocks, threads, shared;
};

void run(const Launch& launch, const std::function<void()>& thread);
void launch_bounds(int64_t threads, int64_t blocks_per_multiprocessor = 1);
void poison(volatile void* shared, int64_t bytes);
void synchronize_block(const std::source_location& site);
uint64_t exchange(uint64_t bits, unsigned mask, int lane_mask, const std::source_location& site);

// What a translated `kernel<<<blocks, threads, shared, stream>>>` becomes: called with the kernel's arguments.
template <class... Args>
auto launch(const char* name, void (*kernel)(Args...), int64_t blocks, int64_t threads, int64_t shared, cudaStream_t) {
    static_assert((std::is_trivially_copyable_v<Args> && ...), "arguments of a kernel are copied byte by byte");
    static_assert((sizeof(Args) + ... + 0) <= 4096, "arguments of a kernel fill at most 4096 bytes");
    return [=](Args... args) { run({name, blocks, threads, shared}, [&] { kernel(args...); }); };
}

}  // namespace cuda_emulator
