// Small kernels, each with one mistake or one promise of the emulator. test_emulator.py runs each in a process of its own.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace {

__device__ int sink;

__global__ void nothing() {}

__global__ void __launch_bounds__(64) at_most_64_threads() {}

__global__ void exits_before_the_barrier() {
    if (threadIdx.x == 1) return;
    __syncthreads();
}

__global__ void half_waits_elsewhere() {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void barrier_against_shuffle() {
    if (threadIdx.x < 32)
        sink = __shfl_xor_sync(0xffffffffu, 1, 1);
    else
        __syncthreads();
    if (threadIdx.x == 0) __syncthreads();
}

__global__ void shuffle_of_some_lanes() { sink = __shfl_xor_sync(0x0000ffffu, 1, 1); }

__global__ void shuffle_of_all_lanes() { sink = __shfl_xor_sync(0xffffffffu, 1, 1); }

__global__ void shuffle_that_a_lane_misses() {
    if (threadIdx.x != 3) sink = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void too_deep() {
    volatile char frame[64 << 10];
    for (int i = 0; i < (64 << 10); ++i) frame[i] = 0;
    if (frame[0] == 0) __syncthreads();
}

// Thread i receives 100 i of thread i ^ 5, or what the others hold if a value moves before all have given theirs.
__global__ void shuffles(int* out) {
    int value = 100 * static_cast<int>(threadIdx.x);
    for (int turn = 0; turn < 3; ++turn) value = __shfl_xor_sync(0xffffffffu, value, 5);
    out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void reverses_with_a_barrier(int* out) {
    __shared__ int values[64];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void reverses_without_a_barrier(int* out) {
    __shared__ int values[64];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void reverses_across_a_shuffle(int* out) {
    __shared__ int values[32];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    const int zero = __shfl_xor_sync(0xffffffffu, 0, 1);
    out[threadIdx.x] = values[31 - threadIdx.x] + zero;
}

// The first block writes what the second must not find.
__global__ void shared_memory_of_the_block_before(int* out) {
    __shared__ int kept;
    if (blockIdx.x == 0) kept = 7;
    out[blockIdx.x] = kept;
}

__global__ void wide_load(const float* from, uint4* to) { *to = *reinterpret_cast<const uint4*>(from); }

__global__ void past_the_end_of_shared_memory(int* out) {
    __shared__ int values[4];
    values[threadIdx.x] = 0;
    out[threadIdx.x] = values[threadIdx.x];
}

__global__ void order_of_threads(std::vector<int>* seen) {
    seen->push_back(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

std::vector<int> order(cuda_emulator::Order wish) {
    std::vector<int> seen;
    cuda_emulator::order = wish;
    order_of_threads<<<3, 40, 0, nullptr>>>(&seen);
    return seen;
}

int print_orders() {
    for (const auto wish : {cuda_emulator::Order::forward, cuda_emulator::Order::reversed, cuda_emulator::Order::shuffled}) {
        for (const int thread : order(wish)) std::printf("%d ", thread);
        std::printf("\n");
    }
    return 0;
}

int print(const std::vector<int>& values) {
    for (const int value : values) std::printf("%d ", value);
    return 0;
}

}  // namespace

int main(int, char** arguments) {
    const std::string scenario = arguments[1];
    std::vector<int> out(64);
    std::vector<float> floats(8);
    uint4 word{};
    cudaStream_t stream = nullptr;
    if (scenario == "no blocks") nothing<<<0, 32, 0, stream>>>();
    if (scenario == "no threads") nothing<<<1, 0, 0, stream>>>();
    if (scenario == "1025 threads") nothing<<<1, 1025, 0, stream>>>();
    if (scenario == "2^31 blocks") nothing<<<2147483648u, 1, 0, stream>>>();
    if (scenario == "launch bounds") at_most_64_threads<<<1, 96, 0, stream>>>();
    if (scenario == "dynamic shared memory") nothing<<<1, 32, 16, stream>>>();
    if (scenario == "exited") exits_before_the_barrier<<<1, 64, 0, stream>>>();
    if (scenario == "different barriers") half_waits_elsewhere<<<1, 32, 0, stream>>>();
    if (scenario == "deadlock") barrier_against_shuffle<<<1, 64, 0, stream>>>();
    if (scenario == "masked shuffle") shuffle_of_some_lanes<<<1, 32, 0, stream>>>();
    if (scenario == "partial warp") shuffle_of_all_lanes<<<1, 48, 0, stream>>>();
    if (scenario == "missing lane") shuffle_that_a_lane_misses<<<1, 32, 0, stream>>>();
    if (scenario == "stack") too_deep<<<1, 32, 0, stream>>>();
    if (scenario == "shuffles") shuffles<<<1, 64, 0, stream>>>(out.data()), print(out);
    if (scenario == "barrier") reverses_with_a_barrier<<<1, 64, 0, stream>>>(out.data()), print(out);
    if (scenario == "no barrier") reverses_without_a_barrier<<<1, 64, 0, stream>>>(out.data());
    if (scenario == "shuffle as barrier") reverses_across_a_shuffle<<<1, 32, 0, stream>>>(out.data());
    if (scenario == "stale shared memory") shared_memory_of_the_block_before<<<2, 1, 0, stream>>>(out.data()), print(out);
    if (scenario == "aligned") wide_load<<<1, 1, 0, stream>>>(floats.data(), &word);
    if (scenario == "misaligned") wide_load<<<1, 1, 0, stream>>>(floats.data() + 1, &word);
    if (scenario == "shared bounds") past_the_end_of_shared_memory<<<1, 5, 0, stream>>>(out.data());
    if (scenario == "orders") return print_orders();
    return 0;
}
