// Just enough CUDA to run layersweep's kernels as ordinary C++, block after block. The threads of
// a block are fibers that run in turn and change over at barriers and warp exchanges.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct Extent {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline Extent threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
constexpr size_t STACK = 256 << 10;

// A barrier of `present` threads; one that has returned is no longer waited for.
struct Meeting {
    unsigned present = 0, arrived = 0, round = 0;
    void release() {
        if (present && arrived == present) arrived = 0, ++round;
    }
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber*> fibers;
inline unsigned current;
inline Meeting block_meeting, warp_meetings[32];
inline unsigned long long slots[32][32];
inline void (*body)(void*);
inline void* body_data;

inline void yield() { swapcontext(&fibers[current]->context, &scheduler); }
inline void meet(Meeting& meeting) {
    const unsigned round = meeting.round;
    ++meeting.arrived;
    meeting.release();
    while (meeting.round == round) yield();
}
inline void run_fiber() {
    body(body_data);
    fibers[current]->done = true;
    for (Meeting* one : {&block_meeting, &warp_meetings[current / 32]}) --one->present, one->release();
    yield();
}
inline void run_block(unsigned threads) {
    while (fibers.size() < threads) fibers.push_back(new Fiber);
    block_meeting = {threads};
    for (unsigned warp = 0; warp * 32 < threads; ++warp) {
        warp_meetings[warp] = {threads - warp * 32 < 32 ? threads - warp * 32 : 32};
    }
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, STACK};
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned left = threads; left;) {
        for (current = 0; current < threads; ++current) {
            if (fibers[current]->done) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current]->context);
            left -= fibers[current]->done;
        }
    }
}

// Parameters as cuLaunchKernel takes them: one after another, each at its own alignment.
template <class V>
V next(const char* buffer, size_t& at) {
    at = (at + alignof(V) - 1) / alignof(V) * alignof(V);
    V value;
    std::memcpy(&value, buffer + at, sizeof(V));
    at += sizeof(V);
    return value;
}
// Returns how many bytes of parameters the kernel takes: its caller's layout must say the same.
template <class... A>
size_t launch(void (*kernel)(A...), const unsigned* grid, unsigned threads, const char* buffer) {
    size_t size = 0;
    std::tuple<A...> args{next<A>(buffer, size)...};
    auto call = [&] { std::apply(kernel, args); };
    body = [](void* data) { (*(decltype(call)*)data)(); };
    body_data = &call;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) run_block(threads);
    return size;
}
}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::block_meeting); }
inline void __syncwarp() { emulator::meet(emulator::warp_meetings[threadIdx.x / 32]); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::memcpy(&emulator::slots[warp][lane], &value, sizeof(V));
    __syncwarp();
    std::memcpy(&value, &emulator::slots[warp][lane ^ mask], sizeof(V));
    __syncwarp();
    return value;
}
template <class V>
V __shfl_sync(unsigned, V value, int from) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    std::memcpy(&emulator::slots[warp][lane], &value, sizeof(V));
    __syncwarp();
    std::memcpy(&value, &emulator::slots[warp][from], sizeof(V));
    __syncwarp();
    return value;
}
inline bool __any_sync(unsigned, bool value) {
    unsigned any = value;
    for (int step = 16; step; step /= 2) any |= __shfl_xor_sync(0, any, step);
    return any;
}
inline int atomicMin(int* at, int value) {
    const int old = *at;
    if (value < old) *at = value;
    return old;
}
inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline unsigned atomicOr(unsigned* at, unsigned value) { return std::exchange(*at, *at | value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }  // as torch on the CPU
inline float divide_by_number(float value, float number) { return value / number; }
inline float half_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return (float)value;
}
inline unsigned short float_to_half(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

// Both halves of words of half numbers, each operation rounded once.
template <class Operation, class... Words>
unsigned in_halves(Operation operation, Words... words) {
    const auto one = [&](int shift) {
        const auto part = [&](unsigned word) { return (double)half_to_float(word >> shift & 0xffff); };
        const _Float16 result = (_Float16)operation(part(words)...);
        unsigned short bits;
        std::memcpy(&bits, &result, 2);
        return (unsigned)bits << shift;
    };
    return one(0) | one(16);
}
inline unsigned sub_two(unsigned a, unsigned b) {
    return in_halves([](double x, double y) { return x - y; }, a, b);
}
inline unsigned fma_two(unsigned a, unsigned b, unsigned c) {
    return in_halves([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
inline unsigned less_two(unsigned a, unsigned b) {
    const auto one = [&](int shift) {
        const bool less = half_to_float(a >> shift & 0xffff) < half_to_float(b >> shift & 0xffff);
        return less ? 0xffffu << shift : 0u;
    };
    return one(0) | one(16);
}
inline unsigned low_twice(unsigned word) { return (word & 0xffff) * 0x10001u; }
inline unsigned high_twice(unsigned word) { return (word >> 16) * 0x10001u; }
inline void expect(const void*) {}
inline unsigned lane_id() { return threadIdx.x % 32; }
inline unsigned from_bit(unsigned low, unsigned high, int shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> shift);
}
// As in common.cuh: every lane shows what it holds, and sums its own elements.
inline void add_product(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static unsigned shown[32][32][6];
    const unsigned lane = threadIdx.x % 32;
    auto& all = shown[threadIdx.x / 32];
    const unsigned own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(all[lane], own, sizeof(own));
    __syncwarp();
    for (unsigned i = 0; i < 2; ++i)
        for (unsigned j = 0; j < 2; ++j)
            for (unsigned k = 0; k < 16; ++k) {
                const unsigned from = k % 8 / 2, shift = k % 2 * 16;
                const unsigned left = all[lane / 4 * 4 + from][k / 8 * 2 + i] >> shift & 0xffff;
                const unsigned right = all[(lane % 4 * 2 + j) * 4 + from][4 + k / 8] >> shift & 0xffff;
                c[2 * i + j] += half_to_float(left) * half_to_float(right);
            }
    __syncwarp();
}
#define SHARED_POOL static uint4 pool[1 << 14]  // 256 KiB, of one block at a time
