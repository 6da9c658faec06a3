// Rotary positions as model/maths.py has them, each operation rounded to T. A thread turns WIDTH
// pairs of the first `dim` numbers of a head, so out may be x itself. A pair is numbers i and
// i + dim / 2, or 2i and 2i + 1 (INTERLEAVED). Tokens from `prefix` on are branches of `length`
// tokens, each of which continues the prefix.
#include "common.cuh"

template <int WIDTH, class In>
__device__ void load_interleaved(const In* at, float (&low)[WIDTH], float (&high)[WIDTH]) {
    float both[2][WIDTH];
    load(at, both[0]);
    load(at + WIDTH, both[1]);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        low[i] = both[2 * i / WIDTH][2 * i % WIDTH];
        high[i] = both[(2 * i + 1) / WIDTH][(2 * i + 1) % WIDTH];
    }
}

template <int WIDTH>
__device__ void store_interleaved(T* at, const float (&low)[WIDTH], const float (&high)[WIDTH]) {
    float both[2][WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        both[2 * i / WIDTH][2 * i % WIDTH] = low[i];
        both[(2 * i + 1) / WIDTH][(2 * i + 1) % WIDTH] = high[i];
    }
    store(at, both[0]);
    store(at + WIDTH, both[1]);
}

template <int WIDTH, bool INTERLEAVED, class In>
__device__ void turn(
    const In* x, T* out, const T* cosines, const T* sines, i64 x_batch, i64 x_head, i64 x_token,
    i64 out_batch, i64 out_head, i64 out_token, int tokens, int dim, i64 first, u32 prefix,
    u32 length
) {
    const u32 half = dim / 2, per_token = half / WIDTH;
    const u32 item = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 token = item / per_token, at = item % per_token * WIDTH;
    if (token >= (u32)tokens) return;
    x += blockIdx.z * x_batch + blockIdx.y * x_head + token * x_token;
    out += blockIdx.z * out_batch + blockIdx.y * out_head + token * out_token;
    const i64 place = first + (token < prefix ? token : prefix + (token - prefix) % length);
    cosines += place * dim + at;
    sines += place * dim + at;
    float low[WIDTH], high[WIDTH], cosine[WIDTH], sine[WIDTH], result[2][WIDTH];
    if constexpr (INTERLEAVED) {
        load_interleaved(x + 2 * at, low, high);
    } else {
        load(x + at, low);
        load(x + at + half, high);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        low[i] = rounded(low[i]);  // does nothing to a T, rounds a float
        high[i] = rounded(high[i]);
    }
    load(cosines, cosine);
    load(sines, sine);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        result[0][i] = rounded(low[i] * cosine[i]) + rounded(-high[i] * sine[i]);
    }
    if constexpr (!INTERLEAVED) {  // stored at once, for its registers
        store(out + at, result[0]);
        load(cosines + half, cosine);
        load(sines + half, sine);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        result[1][i] = rounded(high[i] * cosine[i]) + rounded(low[i] * sine[i]);
    }
    if constexpr (INTERLEAVED) {
        store_interleaved(out + 2 * at, result[0], result[1]);
    } else {
        store(out + at + half, result[1]);
    }
}

#define ROPE_KERNEL(NAME, WIDTH, INTERLEAVED, IN)                                               \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                     \
        const IN* x, T* out, const T* cosines, const T* sines, i64 x_batch, i64 x_head,         \
        i64 x_token, i64 out_batch, i64 out_head, i64 out_token, int tokens, int dim, i64 first, \
        int prefix, int length                                                                  \
    ) {                                                                                         \
        turn<WIDTH, INTERLEAVED, IN>(                                                           \
            x, out, cosines, sines, x_batch, x_head, x_token, out_batch, out_head, out_token,   \
            tokens, dim, first, prefix, length                                                  \
        );                                                                                      \
    }
ROPE_KERNEL(rope_wide, 8, false, T)
ROPE_KERNEL(rope_wide_f32, 8, false, float)
ROPE_KERNEL(rope_any, 1, false, T)
ROPE_KERNEL(rope_any_f32, 1, false, float)
ROPE_KERNEL(rope_pairs_wide, 8, true, T)
ROPE_KERNEL(rope_pairs_wide_f32, 8, true, float)
ROPE_KERNEL(rope_pairs_any, 1, true, T)
ROPE_KERNEL(rope_pairs_any_f32, 1, true, float)
