// MXFP4 and NVFP4 to T, bit for bit as checkpoint/storage/e2m1.py: e2m1 * scale in float, then one
// rounding. Two numbers lie in a byte, the low one first.
#include "weights.cuh"

// A half has 14 more in its exponent than e2m1.
__device__ __forceinline__ float e2m1_to_float(u32 code) {
    return __fmul_rn(half_to_float((u16)((code & 8u) << 12 | (code & 7u) << 9)), 16384.0f);
}

// Groups of 32, a power of two each.
struct Power {
    enum { EIGHTS_OF_GROUP = 4 };
    const u8* scales;
    __device__ __forceinline__ float operator()(u32 group) const {
        const u32 power = scales[group];
        return __uint_as_float(power ? power << 23 : 0x00400000u);
    }
};
// Groups of 16, an e4m3 each, and one scale for all.
struct TwoScales {
    enum { EIGHTS_OF_GROUP = 2 };
    const u8* scales;
    float whole;
    bool divides;
    __device__ __forceinline__ float operator()(u32 group) const {
        const float own = e4m3_to_float(scales[group]);
        return divides ? own / whole : __fmul_rn(own, whole);
    }
};

template <class Scale>
__device__ __forceinline__ void dequantize(
    const u8* data, const Scale& scale, T* out, u32 eights
) {
    const u32 first = blockIdx.x * EIGHTS * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
        const u32 eight = first + i * blockDim.x;
        if (eight >= eights) return;
        const float own = scale(eight / Scale::EIGHTS_OF_GROUP);
        const u32 word = ((const u32*)data)[eight];
        float value[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) value[k] = __fmul_rn(e2m1_to_float(word >> (4 * k)), own);
        store(out + (i64)eight * 8, value);
    }
}

extern "C" __global__ void __launch_bounds__(256) mxfp4(
    const u8* data, const u8* scales, T* out, int eights, i64 step, Shifts shifts
) {
    const Power scale = {moved(scales, shifts)};
    dequantize(moved(data, shifts), scale, out + blockIdx.y * step, (u32)eights);
}

extern "C" __global__ void __launch_bounds__(256) nvfp4(
    const u8* data, const u8* scales, const float* whole, T* out, int eights, int divides,
    i64 step, Shifts shifts
) {
    const TwoScales scale = {moved(scales, shifts), *moved(whole, shifts), divides != 0};
    dequantize(moved(data, shifts), scale, out + blockIdx.y * step, (u32)eights);
}
