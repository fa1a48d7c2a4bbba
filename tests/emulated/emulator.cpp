// The scheduler of the fibers. Compiled without sanitizers: they shall see what kernels do, not how fibers are switched.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

// ThreadSanitizer's fibers, null in a program without it.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
}

namespace cuda_emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr int64_t kMaxThreads = 1024, kMaxGrid = 0x7fffffff;  // of every device
constexpr size_t kStack = 64 << 10;
constexpr uint64_t kStackEnd = 0x456e644f66537461;  // stands in the last word that a stack may reach
constexpr unsigned kWithoutOrdering = 1;  // __tsan_switch_to_fiber: switching is no synchronisation

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<uint64_t[]> stack = std::make_unique_for_overwrite<uint64_t[]>(kStack / sizeof(uint64_t));
    void* thread = nullptr;  // as ThreadSanitizer knows it
    State state = State::done;
    std::source_location site;  // of the barrier or shuffle where it waits
    unsigned barriers = 0, shuffles = 0;
    uint64_t exchanged[2];  // by the last shuffle and the one before, which slower lanes may still read
};

std::vector<Fiber> fibers;
const std::function<void()>* body = nullptr;
ucontext_t scheduler;
void* scheduler_thread = nullptr;
std::vector<volatile void*> declared;  // the shared memory that this block has declared
std::map<std::string, int64_t> launches;
const char* kernel = "";

// What orders fibers for ThreadSanitizer: the start and end of a block, and its barriers. A thread arrives at the next
// barrier before every other has left the last one, hence two.
char block_start, block_end, barriers[2];

void acquire(char& order) {
    if (__tsan_acquire != nullptr) __tsan_acquire(&order);
}

void release(char& order) {
    if (__tsan_release != nullptr) __tsan_release(&order);
}

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "cuda_emulator: %s, block %u: %s\n", kernel, block_index.x, what.c_str());
    std::abort();
}

std::string where(const std::source_location& site) {
    return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

bool same(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

Fiber& current() { return fibers[thread_index.x]; }

void leave(Fiber& fiber, State state) {
    fiber.state = state;
    if (fiber.stack[0] != kStackEnd) fail("a thread needs more than " + std::to_string(kStack) + " bytes of stack");
    if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(scheduler_thread, kWithoutOrdering);
    swapcontext(&fiber.context, &scheduler);
}

void resume(unsigned thread) {
    thread_index = {thread};
    if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(fibers[thread].thread, kWithoutOrdering);
    swapcontext(&scheduler, &fibers[thread].context);
}

void run_fiber() {
    acquire(block_start);
    (*body)();
    release(block_end);
    leave(current(), State::done);
}

void start(Fiber& fiber) {
    fiber.state = State::ready;
    fiber.barriers = fiber.shuffles = 0;
    fiber.stack[0] = kStackEnd;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
}

// Lets the threads [begin, end) go on if all of them wait in this state; false if not.
bool meet(unsigned begin, unsigned end, State state) {
    for (unsigned i = begin; i < end; ++i)
        if (fibers[i].state != state) return false;
    for (unsigned i = begin; i < end; ++i)
        if (!same(fibers[i].site, fibers[begin].site))
            fail("threads " + std::to_string(begin) + " and " + std::to_string(i) + " meet at different places, " +
                 where(fibers[begin].site) + " and " + where(fibers[i].site));
    for (unsigned i = begin; i < end; ++i) fibers[i].state = State::ready;
    return true;
}

std::string describe(unsigned thread) {
    const Fiber& fiber = fibers[thread];
    const std::string name = "thread " + std::to_string(thread);
    if (fiber.state == State::done) return name + " has exited";
    return name + " waits at the " + (fiber.state == State::at_barrier ? "barrier" : "shuffle") + " in " +
           where(fiber.site);
}

[[noreturn]] void fail_for_deadlock() {
    unsigned waiting = 0, other = 0;
    while (fibers[waiting].state == State::done) ++waiting;
    const State state = fibers[waiting].state;
    const unsigned begin = state == State::at_shuffle ? waiting / kWarp * kWarp : 0;
    for (other = begin; fibers[other].state == state;) ++other;
    fail("deadlock: " + describe(waiting) + ", which others never reach: " + describe(other));
}

// 0 ... count - 1 as `order` has it.
std::vector<unsigned> sequence(unsigned count, std::minstd_rand& random) {
    std::vector<unsigned> found(count);
    std::iota(found.begin(), found.end(), 0u);
    if (order == Order::reversed) std::reverse(found.begin(), found.end());
    if (order == Order::shuffled) std::shuffle(found.begin(), found.end(), random);
    return found;
}

void run_block(const std::vector<unsigned>& threads) {
    const unsigned count = block_size.x;
    declared.clear();
    release(block_start);
    for (const unsigned thread : threads) start(fibers[thread]);
    for (unsigned done = 0; done < count;) {
        for (const unsigned thread : threads) {
            if (fibers[thread].state != State::ready) continue;
            resume(thread);
            done += fibers[thread].state == State::done;
        }
        bool progress = meet(0, count, State::at_barrier);
        for (unsigned warp = 0; warp + kWarp <= count; warp += kWarp)
            progress |= meet(warp, warp + kWarp, State::at_shuffle);
        if (!progress && done < count) fail_for_deadlock();
    }
    acquire(block_end);
}

void check(const Launch& launch) {
    const int64_t limit = grid_limit > 0 ? std::min(grid_limit, kMaxGrid) : kMaxGrid;
    const auto expect = [](const char* what, int64_t found, int64_t least, int64_t most) {
        if (found < least || found > most)
            fail("invalid launch: " + std::to_string(found) + " " + what + ", it must be from " +
                 std::to_string(least) + " to " + std::to_string(most));
    };
    expect("blocks", launch.blocks, 1, limit);
    expect("threads", launch.threads, 1, kMaxThreads);
    expect("bytes of dynamic shared memory", launch.shared, 0, 0);
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& thread) {
    kernel = launch.kernel;
    block_index = {0};
    check(launch);
    ++launches[kernel];
    body = &thread;
    grid_size = {static_cast<unsigned>(launch.blocks)};
    block_size = {static_cast<unsigned>(launch.threads)};
    if (fibers.size() < block_size.x) fibers.resize(block_size.x);
    if (__tsan_create_fiber != nullptr) {
        scheduler_thread = __tsan_get_current_fiber();
        for (Fiber& fiber : fibers)
            if (fiber.thread == nullptr) fiber.thread = __tsan_create_fiber(0);
    }
    std::minstd_rand random;
    for (const unsigned block : sequence(grid_size.x, random)) {
        block_index = {block};
        run_block(sequence(block_size.x, random));
    }
}

void launch_bounds(int64_t threads, int64_t) {
    if (block_size.x > threads)
        fail("invalid launch: " + std::to_string(block_size.x) + " threads, its __launch_bounds__ allow " +
             std::to_string(threads));
}

// Byte by byte: a call of memset would be a write of this one thread to ThreadSanitizer.
void poison(volatile void* shared, int64_t bytes) {
    for (volatile void* const known : declared)
        if (known == shared) return;
    declared.push_back(shared);
    for (int64_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(shared)[i] = 0xff;
}

void synchronize_block(const std::source_location& site) {
    Fiber& fiber = current();
    char& barrier = barriers[fiber.barriers++ % 2];
    release(barrier);
    fiber.site = site;
    leave(fiber, State::at_barrier);
    acquire(barrier);
}

// Orders no memory: on a GPU a shuffle does not, either.
uint64_t exchange(uint64_t bits, unsigned mask, int lane_mask, const std::source_location& site) {
    Fiber& fiber = current();
    const unsigned thread = thread_index.x;
    if (mask != 0xffffffff || thread / kWarp * kWarp + kWarp > block_size.x)
        fail("a shuffle of part of a warp in " + where(site));
    if (lane_mask < 0 || lane_mask >= static_cast<int>(kWarp))
        fail("a shuffle with lane mask " + std::to_string(lane_mask) + " in " + where(site));
    const unsigned slot = fiber.shuffles++ % 2;
    fiber.exchanged[slot] = bits;
    fiber.site = site;
    leave(fiber, State::at_shuffle);
    return fibers[thread ^ lane_mask].exchanged[slot];
}

}  // namespace cuda_emulator

// How often a kernel was launched, for Python.
extern "C" [[gnu::visibility("default")]] int64_t cuda_emulator_launches(const char* name) {
    return cuda_emulator::launches[name];
}
