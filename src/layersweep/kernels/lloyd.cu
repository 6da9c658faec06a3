// kv/lloyd.py's encoder and decoder for head size DIM, bit for bit as torch computes them.
//
// 8 lanes share a vector: lane l holds elements 8 e + l for all e. Strides 1, 2 and 4 of the
// Hadamard transform cross lanes, larger ones stay in registers; the sum tree of rotate.add_rows
// folds registers first and lanes last; and the 8 codes that share `bits` bytes lie side by side.
#include "common.cuh"

#ifndef DIM
#define DIM 128
#endif
#define DEEP (DIM / 8)
#define ALL 0xffffffffu

constexpr int ODD = DEEP / (DEEP & -DEEP);  // its odd factor
constexpr int VECTORS = 32;  // per block of 256 threads

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

// How many boundaries lie below each magnitude; one by one up to 16 levels, else by halves.
__device__ __forceinline__ void count_below(
    const float (&magnitude)[DEEP], const float* edges, int levels, u32 (&index)[DEEP]
) {
#pragma unroll
    for (int e = 0; e < DEEP; ++e) index[e] = 0;
    if (levels <= 16) {
        for (int k = 0; k < levels - 1; ++k) {
            const float edge = edges[k];
#pragma unroll
            for (int e = 0; e < DEEP; ++e) index[e] += magnitude[e] > edge;
        }
        return;
    }
    for (int step = levels / 2; step; step /= 2) {
#pragma unroll
        for (int e = 0; e < DEEP; ++e) {
            if (magnitude[e] > edges[index[e] + step - 1]) index[e] += step;
        }
    }
}

__device__ __forceinline__ void put_bytes(u8* at, u64 word, int bits) {
    if (bits == 4) {
        *(u32*)at = (u32)word;
    } else if (bits == 2) {
        *(u16*)at = (u16)word;
    } else {
        for (int i = 0; i < bits; ++i) at[i] = (u8)(word >> 8 * i);
    }
}

// 8 codes of 8 lanes become `bits` bytes. For 8 registers at a time, three exchanges leave lane k
// with the whole word of register k; `row` null: a vector past the end, which only takes part.
template <class Word>
__device__ __forceinline__ void put_codes(const u32 (&code)[DEEP], u8* row, int bits, int lane) {
#pragma unroll
    for (int start = 0; start < DEEP; start += 8) {
        Word word[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            word[k] = start + k < DEEP ? (Word)code[(start + k) % DEEP] << (bits * lane) : 0;
        }
#pragma unroll
        for (int step = 4; step; step /= 2) {
#pragma unroll
            for (int k = 0; k < step; ++k) {
                const Word keep = lane & step ? word[k + step] : word[k];
                const Word give = lane & step ? word[k] : word[k + step];
                word[k] = keep | __shfl_xor_sync(ALL, give, step);
            }
        }
        if (row && start + lane < DEEP) put_bytes(row + (start + lane) * bits, word[0], bits);
    }
}

template <class In>
__device__ __forceinline__ void encode(
    const In* x, const float* weights, const float* middles, const float* nearest, u8* codes,
    u16* scales, i64 count, int bits
) {
    __shared__ float edges[128], levels[128];
    const int size = 1 << (bits - 1), lane = threadIdx.x % 8;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        levels[i] = nearest[i];
        if (i < size - 1) edges[i] = middles[i];
    }
    __syncthreads();
    const i64 vector = (i64)blockIdx.x * VECTORS + threadIdx.x / 8;
    const bool real = vector < count;
    x += (real ? vector : 0) * DIM;
    float y[DEEP], work[DEEP];
    u32 code[DEEP];
#pragma unroll
    for (int e = 0; e < DEEP; ++e) y[e] = to_float(x[8 * e + lane]) * weights[8 * e + lane];
    transform(y, lane);
#pragma unroll
    for (int e = 0; e < DEEP; ++e) work[e] = y[e] * y[e];
    const float mean_square = divide_by_number(add_all<DEEP>(work, lane), (float)DIM);
    // Comparisons that are false for NaN: it must come through, as through torch.clamp.
    const float inverse = rsqrtf(mean_square < 1e-36f ? 1e-36f : mean_square);
#pragma unroll
    for (int e = 0; e < DEEP; ++e) {
        y[e] *= inverse;
        work[e] = fabsf(y[e]);
    }
    count_below(work, edges, size, code);
#pragma unroll
    for (int e = 0; e < DEEP; ++e) {
        work[e] *= levels[code[e]];
        code[e] |= __float_as_uint(y[e]) >> 31 << (bits - 1);
    }
    float dot = add_all<DEEP>(work, lane);
    dot = dot < 1e-3f ? 1e-3f : dot;
    // torch divides a number by a tensor as a product with the reciprocal.
    const float scale = mean_square * inverse * (1.0f / dot * (float)DIM);
    if (real && lane == 0) scales[vector] = float_to_half(scale);
    u8* row = real ? codes + vector * (DEEP * bits) : nullptr;
    if (bits <= 4) {
        put_codes<u32>(code, row, bits, lane);
    } else {
        put_codes<u64>(code, row, bits, lane);
    }
}

template <class Out>
__device__ __forceinline__ void decode(
    const u8* codes, const u16* scales, const float* weights, const float* levels, Out* out,
    i64 count, int bits
) {
    __shared__ float table[256];
    for (int i = threadIdx.x; i < 1 << bits; i += blockDim.x) table[i] = levels[i];
    __syncthreads();
    const int lane = threadIdx.x % 8, start = bits * lane, shift = start % 8;
    const i64 vector = (i64)blockIdx.x * VECTORS + threadIdx.x / 8;
    const bool real = vector < count;
    codes += (real ? vector : 0) * (DEEP * bits) + start / 8;
    const float scale = half_to_float(scales[real ? vector : 0]);
    float y[DEEP];
#pragma unroll
    for (int e = 0; e < DEEP; ++e) {
        u32 word = codes[e * bits];
        if (shift + bits > 8) word |= (u32)codes[e * bits + 1] << 8;
        y[e] = table[word >> shift & ((1u << bits) - 1)] * scale;
    }
    transform(y, lane);
    if (!real) return;
    out += vector * DIM;
#pragma unroll
    for (int e = 0; e < DEEP; ++e) put(out + 8 * e + lane, y[e] * weights[8 * e + lane]);
}

#define LLOYD_KERNELS(SUFFIX, TYPE)                                                               \
    extern "C" __global__ void __launch_bounds__(256) lloyd_encode##SUFFIX(                       \
        const TYPE* x, const float* weights, const float* middles, const float* nearest,          \
        u8* codes, u16* scales, i64 count, int bits                                               \
    ) {                                                                                           \
        encode(x, weights, middles, nearest, codes, scales, count, bits);                         \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) lloyd_decode##SUFFIX(                       \
        const u8* codes, const u16* scales, const float* weights, const float* levels, TYPE* out, \
        i64 count, int bits                                                                       \
    ) {                                                                                           \
        decode(codes, scales, weights, levels, out, count, bits);                                 \
    }
LLOYD_KERNELS(, T)
LLOYD_KERNELS(_f32, float)
