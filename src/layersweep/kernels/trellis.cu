// Search and decoder of a tail-biting bitshift trellis code: element t is TABLE[s_t] with
// s_t = (s_(t-1) << K | b_t) mod 2^L and s_(-1) = s_(D-1); the K-bit symbols b are what is stored.
#include "rotation.cuh"
#include "trellis_search.cuh"
#include "trellis_windows.cuh"

namespace {

template <int L, int K>
__device__ __forceinline__ void encode(const float* u, const float* values, u8* codes, i64 count) {
    using S = Search<L, K>;
    alignas(16) __shared__ u16 inputs[S::VECTORS * DIM];
    alignas(16) __shared__ u16 minima[WARPS * 2 * S::MINIMA];
    __shared__ u32 trail[WARPS * (S::WORDS + 1) * 32];
    const i64 first = (i64)blockIdx.x * S::VECTORS;
    for (int at = 4 * threadIdx.x; at < S::VECTORS * DIM; at += 4 * WARPS * 32) {
        if (first + at / DIM >= count) break;
        const uint4 four = *(const uint4*)(u + first * DIM + at);
        const u32 bits[4] = {four.x, four.y, four.z, four.w};
        for (int i = 0; i < 4; ++i) inputs[at + i] = float_to_half(__uint_as_float(bits[i]));
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    S search(minima + warp * 2 * S::MINIMA, trail + warp * (S::WORDS + 1) * 32);
    const int vector = warp * S::TOGETHER + search.vector;
    const bool real = first + vector < count;
    search.run(inputs + vector * DIM, values, real ? codes + (first + vector) * (DEEP * K) : nullptr);
}

// TABLE by windows of bits, in shared memory.
template <int L, int K>
__device__ __forceinline__ void fill_table(float* table, const float* values) {
    using W = Windows<L, K>;
    for (int i = threadIdx.x; i < 1 << W::BITS; i += blockDim.x) table[i] = values[W::state_of(i)];
    __syncthreads();
}

// A row of `mean` serves `tokens` vectors: DIM means and the level. Without it the level is 1.
__device__ __forceinline__ const u16* mean_of(const u16* mean, i64 vector, i64 tokens) {
    return mean + vector / tokens * (DIM + 1);
}
__device__ __forceinline__ float level_of(const u16* mean, i64 vector, i64 tokens) {
    return mean ? half_to_float(mean_of(mean, vector, tokens)[DIM]) : 1.0f;
}

// How many of the 255 limits, times reach, are not above size. NaN goes to the end.
__device__ __forceinline__ int reached(float size, const float* limits, float reach) {
    int code = 0;
#pragma unroll
    for (int step = 128; step; step /= 2) {
        if (!(size < limits[code + step - 1] * reach)) code += step;
    }
    return code;
}

// Before the search: u = v y with y = rotated(x - mean), and v <y, y>. v is inverse[code] / level for
// the number of thresholds, in squared levels, that <y, y> reaches; 255 has u = 0.
template <class In>
__device__ __forceinline__ void scale(
    const In* x, const u16* mean, const float* weights, const float* thresholds,
    const float* inverse, float* u, float* sizes, i64 count, i64 tokens
) {
    __shared__ float limits[255], factors[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        factors[i] = inverse[i];
        if (i < 255) limits[i] = thresholds[i];
    }
    __syncthreads();
    const int lane = threadIdx.x % 8;
    const i64 vector = (i64)blockIdx.x * VECTORS + threadIdx.x / 8;
    const bool real = vector < count;
    const i64 some = real ? vector : 0;
    x += some * DIM;
    float y[DEEP], work[DEEP];
#pragma unroll
    for (int e = 0; e < DEEP; ++e) y[e] = to_float(x[8 * e + lane]);
    const float level = level_of(mean, some, tokens);
    if (mean) {
        mean = mean_of(mean, some, tokens);
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] -= half_to_float(mean[8 * e + lane]);
    }
#pragma unroll
    for (int e = 0; e < DEEP; ++e) y[e] *= weights[8 * e + lane];
    transform(y, lane);
#pragma unroll
    for (int e = 0; e < DEEP; ++e) work[e] = y[e] * y[e];
    const float square = add_all<DEEP>(work, lane);
    const int code = reached(square, limits, level * level);
    const float v = factors[code] / level;
    if (!real) return;
    if (lane == 0) sizes[vector] = square * v;
    u += vector * DIM + lane;
#pragma unroll
    for (int e = 0; e < DEEP; ++e) u[8 * e] = code == 255 ? 0.0f : y[e] * v;
}

// After it: code of the scale v <y, y> / <u, c>, the number of thresholds, in levels, that it reaches.
template <int L, int K>
__device__ __forceinline__ void gain(
    const float* u, const u8* codes, const float* sizes, const u16* mean, const float* values,
    const float* thresholds, u8* scales, i64 count, i64 tokens
) {
    using W = Windows<L, K>;
    __shared__ float table[1 << W::BITS], limits[255];
    for (int i = threadIdx.x; i < 255; i += blockDim.x) limits[i] = thresholds[i];
    fill_table<L, K>(table, values);
    const int lane = threadIdx.x % 8;
    for (i64 first = (i64)blockIdx.x * VECTORS; first < count; first += (i64)gridDim.x * VECTORS) {
        const i64 vector = first + threadIdx.x / 8, some = vector < count ? vector : 0;
        u32 words[W::WORDS + 3];
        W::load_codes(codes + some * W::ROW, words);
        const float* from = u + some * DIM + lane;
        float work[DEEP];
#pragma unroll
        for (int e = 0; e < DEEP; ++e) work[e] = table[W::window(words, e, lane)] * from[8 * e];
        const float dot = fmaxf(add_all<DEEP>(work, lane), 0.25f * DIM);
        const int code = reached(sizes[some], limits, level_of(mean, some, tokens) * dot);
        if (lane == 0 && vector < count) scales[vector] = (u8)code;
    }
}

// Blocks take 32 vectors at a time, and several times so many: each builds its own table.
template <int L, int K>
__device__ __forceinline__ void decode(
    const u8* codes, const u8* scales, const u16* mean, const float* values, const float* factors,
    const float* weights, float* out, i64 count, i64 tokens
) {
    using W = Windows<L, K>;
    __shared__ float table[1 << W::BITS];
    fill_table<L, K>(table, values);
    const int lane = threadIdx.x % 8;
    for (i64 first = (i64)blockIdx.x * VECTORS; first < count; first += (i64)gridDim.x * VECTORS) {
        const i64 vector = first + threadIdx.x / 8;
        const bool real = vector < count;
        u32 words[W::WORDS + 3];
        const i64 some = real ? vector : 0;
        W::load_codes(codes + some * W::ROW, words);
        const float factor = factors[scales[some]] * level_of(mean, some, tokens);
        float y[DEEP];
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] = table[W::window(words, e, lane)] * factor;
        transform(y, lane);
        if (!real) continue;
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] *= weights[8 * e + lane];
        if (mean) {
            const u16* add = mean_of(mean, vector, tokens) + lane;
#pragma unroll
            for (int e = 0; e < DEEP; ++e) y[e] += half_to_float(add[8 * e]);
        }
        float* to = out + vector * DIM + lane;
#pragma unroll
        for (int e = 0; e < DEEP; ++e) to[8 * e] = y[e];
    }
}

}  // namespace

#define SCALE(NAME, TYPE)                                                                      \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                    \
        const TYPE* x, const u16* mean, const float* weights, const float* thresholds,         \
        const float* inverse, float* u, float* sizes, i64 count, i64 tokens                    \
    ) {                                                                                        \
        scale(x, mean, weights, thresholds, inverse, u, sizes, count, tokens);                 \
    }
SCALE(trellis_scale, T)
SCALE(trellis_scale_f32, float)

#define TRELLIS(L, K)                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) trellis_encode_##L##_##K(         \
        const float* u, const float* values, u8* codes, i64 count                              \
    ) {                                                                                        \
        encode<L, K>(u, values, codes, count);                                                 \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) trellis_gain_##L##_##K(                  \
        const float* u, const u8* codes, const float* sizes, const u16* mean,                  \
        const float* values, const float* thresholds, u8* scales, i64 count, i64 tokens        \
    ) {                                                                                        \
        gain<L, K>(u, codes, sizes, mean, values, thresholds, scales, count, tokens);          \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) trellis_decode_##L##_##K(                \
        const u8* codes, const u8* scales, const u16* mean, const float* values,               \
        const float* factors, const float* weights, float* out, i64 count, i64 tokens          \
    ) {                                                                                        \
        decode<L, K>(codes, scales, mean, values, factors, weights, out, count, tokens);       \
    }
TRELLIS(8, 1)
TRELLIS(8, 2)
TRELLIS(8, 3)
TRELLIS(8, 4)
TRELLIS(10, 1)
TRELLIS(10, 2)
TRELLIS(10, 3)
TRELLIS(10, 4)
