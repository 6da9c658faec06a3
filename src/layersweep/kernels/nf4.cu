// NF4 (and FP4) to T, bit for bit as checkpoint/nf4.py: scale = map[u8] * outer + offset in two
// roundings, value = code[nibble] * scale in float, then one rounding to T.
#include "common.cuh"

// Words of 8 elements per thread: enough loads in flight to reach the memory's rate.
#define WORDS 4
#define ALIKE 32  // weights of one launch, as in kernels.py

__device__ __forceinline__ float scale_of(
    const void* absmax, const float* map, const float* outer, float offset, i64 block, i64 outer_block
) {
    if (!map) return ((const float*)absmax)[block];
    const float level = map[((const u8*)absmax)[block]];
    return __fadd_rn(__fmul_rn(level, outer[outer_block]), offset);
}

__device__ __forceinline__ u32 nibble_of(const u8* packed, i64 element) {
    const u32 pair = packed[element / 2];
    return element % 2 ? pair & 15u : pair >> 4;
}

// Block sizes are powers of two, 8 or more: neighbouring threads write neighbouring 16 bytes.
__device__ __forceinline__ void decode_wide(
    const u8* packed, const void* absmax, const float* map, const float* outer, const float* code,
    T* out, i64 count, int block_shift, int outer_shift, float offset
) {
    __shared__ float levels[16];  // 16 banks: lookups of a warp never conflict
    if (threadIdx.x < 16) levels[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const i64 first = ((i64)blockIdx.x * WORDS * blockDim.x + threadIdx.x) * 8;
    const i64 step = (i64)blockDim.x * 8;
    u32 words[WORDS];
    float scales[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const i64 at = first + w * step;
        if (at >= count) continue;
        const i64 block = at >> block_shift;
        scales[w] = scale_of(absmax, map, outer, offset, block, block >> outer_shift);
        if (at + 8 <= count) words[w] = *(const u32*)(packed + at / 2);
    }
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const i64 at = first + w * step;
        if (at + 8 <= count) {
            float value[8];
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
                const u32 pair = words[w] >> (8 * byte);
                value[2 * byte] = __fmul_rn(levels[(pair >> 4) & 15u], scales[w]);
                value[2 * byte + 1] = __fmul_rn(levels[pair & 15u], scales[w]);
            }
            store(out + at, value);
        } else {
            for (i64 i = at; i < count; ++i) {
                put(out + i, __fmul_rn(levels[nibble_of(packed, i)], scales[w]));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) nf4_wide(
    const u8* packed, const void* absmax, const float* map, const float* outer, const float* code,
    T* out, i64 count, int block_shift, int outer_shift, float offset
) {
    decode_wide(packed, absmax, map, outer, code, out, count, block_shift, outer_shift, offset);
}

// Weights that lie alike: all that belongs to number y lies shift[y] bytes after that of the first.
struct Alike {
    i64 shift[ALIKE];
    float offset[ALIKE];
};

template <class V>
__device__ __forceinline__ const V* moved(const V* pointer, i64 bytes) {
    return pointer ? (const V*)((const char*)pointer + bytes) : pointer;
}

extern "C" __global__ void __launch_bounds__(256) nf4_alike(
    const u8* packed, const void* absmax, const float* map, const float* outer, const float* code,
    T* out, i64 count, int block_shift, int outer_shift, i64 step, Alike alike
) {
    const i64 shift = alike.shift[blockIdx.y];
    decode_wide(
        packed + shift, moved(absmax, shift), moved(map, shift), moved(outer, shift), code,
        out + blockIdx.y * step, count, block_shift, outer_shift, alike.offset[blockIdx.y]
    );
}

// Any block size and alignment: one thread per element.
extern "C" __global__ void __launch_bounds__(256) nf4_any(
    const u8* packed, const void* absmax, const float* map, const float* outer, const float* code,
    T* out, i64 count, i64 blocksize, i64 outer_blocksize, float offset
) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const i64 block = at / blocksize;
    const float scale = scale_of(absmax, map, outer, offset, block, block / outer_blocksize);
    put(out + at, __fmul_rn(code[nibble_of(packed, at)], scale));
}
