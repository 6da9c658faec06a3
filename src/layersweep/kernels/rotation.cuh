// rotate.py's transform and sums for head size DIM, in the registers of 8 lanes that share a vector:
// lane l holds elements 8 e + l for all e. Strides 1, 2 and 4 of the Hadamard transform cross lanes,
// larger ones stay in registers; the sum tree of rotate.add_rows folds registers first, lanes last.
#pragma once
#include "common.cuh"

#ifndef DIM
#define DIM 128
#endif
#define DEEP (DIM / 8)
#define ALL 0xffffffffu

namespace {  // arrays in shared memory of one name and several DIM meet in tests/cuda_on_cpu

constexpr int ODD = DEEP / (DEEP & -DEEP);  // the odd factor of a vector's eighth
constexpr int VECTORS = 32;                 // per block of 256 threads

// The unnormalized Sylvester transforms of sizes 8 BIT, ..., 8 that add up to DIM, from START on.
template <int START, int BIT>
__device__ __forceinline__ void transform_registers(float (&y)[DEEP]) {
    if constexpr ((DEEP & BIT) != 0) {
#pragma unroll
        for (int stride = 1; stride < BIT; stride *= 2) {
#pragma unroll
            for (int e = 0; e < BIT; ++e) {
                if (e & stride) continue;
                const float left = y[START + e], right = y[START + e + stride];
                y[START + e] = left + right;
                y[START + e + stride] = left - right;
            }
        }
    }
    if constexpr (BIT > 1) transform_registers<START + (DEEP & BIT), BIT / 2>(y);
}

__device__ __forceinline__ void transform(float (&y)[DEEP], int lane) {
#pragma unroll
    for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
        for (int e = 0; e < DEEP; ++e) {
            const float other = __shfl_xor_sync(ALL, y[e], stride);
            y[e] = lane & stride ? other - y[e] : y[e] + other;
        }
    }
    transform_registers<0, 32>(y);
}

// Sum of a vector as rotate.add_rows adds it; every lane gets it. Overwrites its input.
template <int COUNT>
__device__ __forceinline__ float add_all(float (&value)[DEEP], int lane) {
    if constexpr (COUNT % 2 == 0) {
#pragma unroll
        for (int e = 0; e < COUNT / 2; ++e) value[e] += value[e + COUNT / 2];
        return add_all<COUNT / 2>(value, lane);
    } else if constexpr (COUNT == 1) {
        float sum = value[0];
        for (int stride = 4; stride; stride /= 2) sum += __shfl_xor_sync(ALL, sum, stride);
        return sum;
    } else {  // halves no longer fall between registers: an odd multiple of 8 is left
        __shared__ float pool[VECTORS * 8 * ODD];
        float* part = pool + threadIdx.x / 8 * 8 * ODD;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) part[8 * e + lane] = value[e];
        __syncwarp();
        for (int count = 8 * COUNT; count > 1; count /= 2) {
            const int half = count / 2;
            for (int i = lane; i < half; i += 8) {
                part[i] += part[i + half];
                if (i == 0 && count % 2) part[0] += part[count - 1];
            }
            __syncwarp();
        }
        const float sum = part[0];
        __syncwarp();  // before the next sum overwrites it
        return sum;
    }
}

}  // namespace
