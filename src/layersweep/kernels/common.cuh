// Shared by every kernel. No header file is included anywhere: NVRTC on a user's machine has none.
//
// SCALAR chooses the compute type T of a module: 0 half, 1 bfloat16, 2 float. Arithmetic happens
// in float; results equal torch's, which rounds after every operation, so modules are compiled
// with -fmad=false. LAYERSWEEP_ON_CPU: tests/cuda_on_cpu/emulator.h stands in for the GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef LAYERSWEEP_ON_CPU
__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// Two half numbers in a word: the arithmetic of cuda_fp16.h, every operation rounded once.
__device__ __forceinline__ u32 sub_two(u32 a, u32 b) {
    u32 word;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}
__device__ __forceinline__ u32 fma_two(u32 a, u32 b, u32 c) {
    u32 word;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
    return word;
}
// All bits of a half are ones where a < b.
__device__ __forceinline__ u32 less_two(u32 a, u32 b) {
    u32 mask;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
    return mask;
}
__device__ __forceinline__ u32 low_twice(u32 word) {
    u32 two;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(two) : "r"(word));
    return two;
}
__device__ __forceinline__ u32 high_twice(u32 word) {
    u32 two;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(two) : "r"(word));
    return two;
}
// The compiler knows nothing of it, so an address that holds it is not taken apart.
__device__ __forceinline__ u32 lane_id() {
    u32 lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
// What lies there will be read soon.
__device__ __forceinline__ void expect(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// The 32 bits of high:low from bit `shift` on.
__device__ __forceinline__ u32 from_bit(u32 low, u32 high, int shift) {
    return __funnelshift_r(low, high, shift);
}
// c += a b in tensor cores (sm_80 on), by all lanes of a warp: a [16, 16] and b [16, 8] half numbers, two
// to a word, c [16, 8]. With r = lane / 4 and q = 2 (lane % 4), a lane holds a[r + 8 i][q + 8 j, + 1] in
// a[2 j + i], b[q + 8 j, + 1][r] in bj, and c[r + 8 i][q + j] in c[2 i + j].
__device__ __forceinline__ void add_product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#define SHARED_POOL extern __shared__ uint4 pool[]  // as much as a launch asks for
// torch divides by a host number as a product with its reciprocal on the GPU, not on the CPU.
__device__ __forceinline__ float divide_by_number(float value, float number) {
    return __fmul_rn(value, 1.0f / number);
}
#endif

// Bits of a where mask has ones, of b elsewhere.
__device__ __forceinline__ u32 choose(u32 mask, u32 a, u32 b) { return (mask & a) | (~mask & b); }

// The smaller of each half; b among equals.
__device__ __forceinline__ u32 min_two(u32 a, u32 b) {
#if !defined(LAYERSWEEP_ON_CPU) && __CUDA_ARCH__ >= 800
    u32 word;
    asm("min.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
#else
    return choose(less_two(a, b), a, b);
#endif
}

// By integers, not cvt.rn.bf16.f32: that needs sm_80. Nearest even; NaN stays NaN.
__device__ __forceinline__ u16 float_to_bfloat(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if SCALAR == 0
typedef u16 T;
__device__ __forceinline__ float to_float(T value) { return half_to_float(value); }
__device__ __forceinline__ T from_float(float value) { return float_to_half(value); }
#elif SCALAR == 1
typedef u16 T;
__device__ __forceinline__ float to_float(T value) { return __uint_as_float((u32)value << 16); }
__device__ __forceinline__ T from_float(float value) { return float_to_bfloat(value); }
#else
typedef float T;
__device__ __forceinline__ T from_float(float value) { return value; }
#endif
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float rounded(float value) { return to_float(from_float(value)); }

__device__ __forceinline__ void put(float* at, float value) { *at = value; }
__device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// Two neighbours in one word: one instruction from sm_80 on.
__device__ __forceinline__ u32 pack_two(float low, float high) {
#if !defined(LAYERSWEEP_ON_CPU) && SCALAR < 2 && __CUDA_ARCH__ >= 800
    u32 word;
#if SCALAR == 0
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
#else
    return (u32)from_float(low) | (u32)from_float(high) << 16;
#endif
}

// Eight elements at a 16-byte-aligned address.
__device__ __forceinline__ void load(const float* at, float (&value)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 word = ((const uint4*)at)[half];
        value[4 * half] = __uint_as_float(word.x);
        value[4 * half + 1] = __uint_as_float(word.y);
        value[4 * half + 2] = __uint_as_float(word.z);
        value[4 * half + 3] = __uint_as_float(word.w);
    }
}
__device__ __forceinline__ void store(float* at, const float (&value)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 word;
        word.x = __float_as_uint(value[4 * half]);
        word.y = __float_as_uint(value[4 * half + 1]);
        word.z = __float_as_uint(value[4 * half + 2]);
        word.w = __float_as_uint(value[4 * half + 3]);
        ((uint4*)at)[half] = word;
    }
}
#if SCALAR < 2
__device__ __forceinline__ void put(T* at, float value) { *at = from_float(value); }
__device__ __forceinline__ void load(const T* at, float (&value)[8]) {
    const uint4 word = *(const uint4*)at;
    const u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        value[2 * pair] = to_float((T)(words[pair] & 0xffffu));
        value[2 * pair + 1] = to_float((T)(words[pair] >> 16));
    }
}
__device__ __forceinline__ void store(T* at, const float (&value)[8]) {
    uint4 word;
    word.x = pack_two(value[0], value[1]);
    word.y = pack_two(value[2], value[3]);
    word.z = pack_two(value[4], value[5]);
    word.w = pack_two(value[6], value[7]);
    *(uint4*)at = word;
}
__device__ __forceinline__ void load(const T* at, float (&value)[1]) { value[0] = to_float(*at); }
__device__ __forceinline__ void store(T* at, const float (&value)[1]) { put(at, value[0]); }
#endif
__device__ __forceinline__ void load(const float* at, float (&value)[1]) { value[0] = *at; }
__device__ __forceinline__ void store(float* at, const float (&value)[1]) { *at = value[0]; }

struct Add {
    template <class V>
    __device__ V operator()(V a, V b) const { return a + b; }
};
struct Max {
    template <class V>
    __device__ V operator()(V a, V b) const { return a > b ? a : b; }
};

struct Min {
    template <class V>
    __device__ V operator()(V a, V b) const { return a < b ? a : b; }
};

// Order of floats, then lowest index first; NaN is above everything, as in torch.argmax.
__device__ __forceinline__ u64 rank_of(float value, u32 index) {
    const u32 bits = __float_as_uint(value + 0.0f);  // -0 equals 0
    u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) order = 0xffffffffu;
    return (u64)order << 32 | (0xffffffffu - index);
}
__device__ __forceinline__ u32 ranked_index(u64 rank) { return 0xffffffffu - (u32)rank; }
__device__ __forceinline__ float ranked_value(u64 rank) {
    const u32 order = (u32)(rank >> 32);
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

template <class V, class Combine>
__device__ V reduce_warp(V value, Combine combine) {
    for (int step = 16; step; step /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    return value;
}
// Every thread gets the result, combined in an order that blockDim alone decides. `identity` is
// combined in for the warps that are not there.
template <class V, class Combine>
__device__ V reduce_block(V value, V identity, Combine combine) {
    __shared__ V partial[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = reduce_warp(value, combine);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? partial[lane] : identity;
    value = reduce_warp(value, combine);
    __syncthreads();  // the next call writes `partial`
    return value;
}
