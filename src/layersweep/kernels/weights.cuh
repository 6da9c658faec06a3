// What kernels share that make weights of other quantizers dense; see checkpoint/storage/.
#pragma once
#include "common.cuh"

#define EIGHTS 2  // eight neighbours each, of a thread
#define ALIKE 32  // weights of one launch, as in scaled.py

// Weights that lie alike: number y lies shift[y] bytes after the first.
struct Shifts {
    i64 shift[ALIKE];
};
template <class V>
__device__ __forceinline__ const V* moved(const V* pointer, const Shifts& shifts) {
    return pointer ? (const V*)((const char*)pointer + shifts.shift[blockIdx.y]) : pointer;
}

// Scales in the dtype of the file: SCALAR's numbers.
__device__ __forceinline__ float scale_at(const void* scales, i64 at, int kind) {
    if (kind == 2) return ((const float*)scales)[at];
    const u16 bits = ((const u16*)scales)[at];
    return kind == 0 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}

// A half has 8 more in its exponent than e4m3; 0x7f is NaN, and there is no infinity.
__device__ __forceinline__ float e4m3_to_float(u32 byte) {
    const u32 size = byte & 127u;
    if (size == 127u) return __uint_as_float(0x7fc00000u);
    return __fmul_rn(half_to_float((u16)((byte & 128u) << 8 | size << 7)), 256.0f);
}
