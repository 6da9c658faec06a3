// Rotary positions as model/maths.py has them, each operation rounded to T. A thread turns WIDTH
// dimensions of the first half and their partners in the second, so out may be x itself.
#include "common.cuh"

template <int WIDTH, class In>
__device__ void turn(
    const In* x, T* out, const T* cosines, const T* sines, i64 x_batch, i64 x_head, i64 x_token,
    i64 out_batch, i64 out_head, i64 out_token, int tokens, int dim, i64 first
) {
    const u32 half = dim / 2, per_token = half / WIDTH;
    const u32 item = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 token = item / per_token, at = item % per_token * WIDTH;
    if (token >= (u32)tokens) return;
    x += blockIdx.z * x_batch + blockIdx.y * x_head + token * x_token + at;
    out += blockIdx.z * out_batch + blockIdx.y * out_head + token * out_token + at;
    cosines += (first + token) * dim + at;
    sines += (first + token) * dim + at;
    float low[WIDTH], high[WIDTH], cosine[WIDTH], sine[WIDTH], result[WIDTH];
    load(x, low);
    load(x + half, high);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        low[i] = rounded(low[i]);  // does nothing to a T, rounds a float
        high[i] = rounded(high[i]);
    }
    load(cosines, cosine);
    load(sines, sine);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        result[i] = rounded(low[i] * cosine[i]) + rounded(-high[i] * sine[i]);
    }
    store(out, result);
    load(cosines + half, cosine);
    load(sines + half, sine);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        result[i] = rounded(high[i] * cosine[i]) + rounded(low[i] * sine[i]);
    }
    store(out + half, result);
}

#define ROPE_KERNEL(NAME, WIDTH, IN)                                                            \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                     \
        const IN* x, T* out, const T* cosines, const T* sines, i64 x_batch, i64 x_head,         \
        i64 x_token, i64 out_batch, i64 out_head, i64 out_token, int tokens, int dim, i64 first \
    ) {                                                                                         \
        turn<WIDTH, IN>(                                                                        \
            x, out, cosines, sines, x_batch, x_head, x_token, out_batch, out_head, out_token,   \
            tokens, dim, first                                                                  \
        );                                                                                      \
    }
ROPE_KERNEL(rope_wide, 8, T)
ROPE_KERNEL(rope_wide_f32, 8, float)
ROPE_KERNEL(rope_any, 1, T)
ROPE_KERNEL(rope_any_f32, 1, float)
