// Scores of next-token logits, one block per row. Sums of a row are kept in double: they differ
// by a millionth part between arms, and there are only a few per logit.
#include "common.cuh"

// Order of floats, then lowest index first; NaN is above everything, as in torch.argmax.
__device__ __forceinline__ u64 rank_of(float value, u32 index) {
    const u32 bits = __float_as_uint(value + 0.0f);  // -0 equals 0
    u32 order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) order = 0xffffffffu;
    return (u64)order << 32 | (0xffffffffu - index);
}
__device__ __forceinline__ u64 best_of(const float* row, int width) {
    u64 best = 0;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const u64 rank = rank_of(row[at], at);
        best = rank > best ? rank : best;
    }
    return reduce_block(best, (u64)0, Max());
}
__device__ __forceinline__ float value_of(const float* row, u64 rank) {
    return row[0xffffffffu - (u32)rank];
}

// out[r] = -log_softmax(exact[r])[target[r]]
extern "C" __global__ void __launch_bounds__(512) score_exact(
    const float* exact, const i64* target, float* out, int width
) {
    exact += (i64)blockIdx.x * width;
    const float top = value_of(exact, best_of(exact, width));
    double mass = 0.0;
    for (int at = threadIdx.x; at < width; at += blockDim.x) mass += expf(exact[at] - top);
    mass = reduce_block(mass, 0.0, Add());
    if (threadIdx.x == 0) {
        out[blockIdx.x] = (float)(log(mass) - (double)(exact[target[blockIdx.x]] - top));
    }
}

// out[r] = (loss of the target under arm, KL(exact || arm), 1 where both have one best token)
// With e and a less their row's maximum: KL = sum exp(e) (e - a) / sum exp(e) - log of the ratio
// of masses, which is 0 exactly for equal rows.
extern "C" __global__ void __launch_bounds__(512) score(
    const float* exact, const float* arm, const i64* target, float* out, int width
) {
    exact += (i64)blockIdx.x * width;
    arm += (i64)blockIdx.x * width;
    const u64 exact_best = best_of(exact, width), arm_best = best_of(arm, width);
    const float exact_top = value_of(exact, exact_best), arm_top = value_of(arm, arm_best);
    double exact_mass = 0.0, arm_mass = 0.0, gap = 0.0;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float e = exact[at] - exact_top, a = arm[at] - arm_top, chance = expf(e);
        exact_mass += chance;
        arm_mass += expf(a);
        gap += chance * (e - a);
    }
    exact_mass = reduce_block(exact_mass, 0.0, Add());
    arm_mass = reduce_block(arm_mass, 0.0, Add());
    gap = reduce_block(gap, 0.0, Add());
    if (threadIdx.x == 0) {
        out += 3 * (i64)blockIdx.x;
        out[0] = (float)(log(arm_mass) - (double)(arm[target[blockIdx.x]] - arm_top));
        out[1] = (float)(gap / exact_mass - log(exact_mass / arm_mass));
        out[2] = (u32)exact_best == (u32)arm_best ? 1.0f : 0.0f;
    }
}
