// kv/lloyd.py's encoder and decoder for head size DIM, bit for bit as torch computes them. The 8 codes
// that share `bits` bytes lie side by side in the lanes.
#include "rotation.cuh"

namespace {

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

}  // namespace

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
