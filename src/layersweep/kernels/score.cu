// Scores of next-token logits, which are read once: a warp takes PART logits of a position under
// the exact branch and some arms, and score_join makes the scores of what its warps found.
//
// KL(exact || arm) = sum exp(e) (e - a) / sum exp(e) - log(sum exp(e) / sum exp(a)). Equal rows take
// equal steps, so theirs is 0 exactly.
#include "common.cuh"

constexpr int RUN = 8;  // logits of a row that a thread loads at once; its float sums end with them
constexpr int CHUNK = 32 * RUN, PART = 8192, THREADS = 256;
constexpr float LOWEST = -3.402823466e38f;  // finite, so that -inf less a maximum is -inf

// A thread's or a part's sums in units of exp(top): `mass` of exp(logit), and `gap`, in the exact
// row's units, of its exp(logit) (logit - the arm's). `from`: the chunk where `top` came first.
struct Sums {
    float top = LOWEST;
    int from = 0;
    double mass = 0.0, gap = 0.0;
};
// What a warp leaves. `best` ranks the first of the greatest logits; `wanted` is the target's
// logit, 0 in the parts that do not have it.
struct Part {
    double mass, gap;
    u64 best;
    float top, wanted;
};
template <int ROWS>
struct Branches {
    const float* of[ROWS];  // [T, V] each, the exact one first
};

__device__ __forceinline__ u64 best_of(const float* row, int from, int end) {
    u64 best = 0;
    for (int at = from + threadIdx.x % 32; at < end; at += 32) {
        best = Max()(best, rank_of(row[at], at));
    }
    return reduce_warp(best, Max());
}

// A thread's share of a chunk: four neighbours at a time, or one where rows are not aligned.
__device__ __forceinline__ void load_share(const float* chunk, bool wide, float (&x)[RUN]) {
    const int lane = threadIdx.x % 32;
    if (wide) {
#pragma unroll
        for (int at = 0; at < RUN; at += 4) {
            const float4 four = ((const float4*)chunk)[8 * at + lane];
            x[at] = four.x, x[at + 1] = four.y, x[at + 2] = four.z, x[at + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int at = 0; at < RUN; ++at) x[at] = chunk[32 * at + lane];
    }
}

template <int ROWS, int COUNT>
__device__ __forceinline__ void add(const float (&x)[ROWS][COUNT], int from, Sums (&sums)[ROWS]) {
    float chance[COUNT];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float top = x[r][0];
#pragma unroll
        for (int k = 1; k < COUNT; ++k) top = fmaxf(top, x[r][k]);
        Sums& own = sums[r];
        if (top > own.top) {
            const float scale = expf(own.top - top);
            own.mass *= scale;
            if (r == 0) {
#pragma unroll
                for (int arm = 1; arm < ROWS; ++arm) sums[arm].gap *= scale;
            }
            own.top = top, own.from = from;
        }
        float mass = 0.0f, gap = 0.0f;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const float value = expf(x[r][k] - own.top);
            mass += value;
            if (r == 0) chance[k] = value;
            if (r > 0) gap += chance[k] * (x[0][k] - x[r][k]);
        }
        own.mass += mass;
        own.gap += gap;
    }
}

template <int ROWS>
__device__ __forceinline__ void score_parts(
    Branches<ROWS> branches, const i64* target, Part* parts, int positions, int width, int wide
) {
    const int lane = threadIdx.x % 32, count = (width + PART - 1) / PART;
    const int warp = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, position = warp / count;
    if (position >= positions) return;
    const int begin = warp % count * PART, end = width - begin > PART ? begin + PART : width;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) branches.of[r] += (i64)position * width;

    Sums sums[ROWS];
    int from = begin;
    for (; end - from >= CHUNK; from += CHUNK) {
        float x[ROWS][RUN];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) load_share(branches.of[r] + from, wide, x[r]);
        add(x, from, sums);
    }
    for (int at = from + lane; at < end; at += 32) {
        float x[ROWS][1];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) x[r][0] = branches.of[r][at];
        add(x, from, sums);
    }

    const i64 sought = target[position];
    float exact_scale = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float* row = branches.of[r];
        Part part;
        part.top = reduce_warp(sums[r].top, Max());
        const float scale = expf(sums[r].top - part.top);
        if (r == 0) exact_scale = scale;
        part.mass = reduce_warp(sums[r].mass * scale, Add());
        part.gap = reduce_warp(sums[r].gap * exact_scale, Add());
        // The maximum passes over NaN and starts at LOWEST; such a part is looked at once more.
        const bool known = part.top > LOWEST && part.mass == part.mass;
        const int own = sums[r].top == part.top ? sums[r].from : end;
        const int first = known ? reduce_warp(own, Min()) : begin;
        part.best = best_of(row, first, known && end - first > CHUNK ? first + CHUNK : end);
        part.wanted = sought >= begin && sought < end ? row[sought] : 0.0f;
        if (lane == 0) parts[(i64)warp * ROWS + r] = part;
    }
}

// parts [T, parts of a row, ROWS]; a kernel for each number of rows that are read together.
#define SCORE_PARTS(ROWS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) score_parts_##ROWS(                    \
        Branches<ROWS> branches, const i64* target, Part* parts, int positions, int width,       \
        int wide                                                                                 \
    ) {                                                                                          \
        score_parts<ROWS>(branches, target, parts, positions, width, wide);                      \
    }
SCORE_PARTS(1)
SCORE_PARTS(2)
SCORE_PARTS(3)
SCORE_PARTS(4)
SCORE_PARTS(5)

// out[branch, position] = (loss of the target, KL(exact || branch), 1 where both have one best
// token), for the exact branch, and the arms from branch `first` on. A warp for each.
extern "C" __global__ void __launch_bounds__(32) score_join(
    const Part* parts, float* out, int count, int rows, int first
) {
    const int position = blockIdx.x, row = blockIdx.y, positions = gridDim.x;
    parts += (i64)position * count * rows;
    float exact_top = LOWEST, top = LOWEST;
    u64 exact_best = 0, best = 0;
    for (int at = threadIdx.x; at < count; at += 32) {
        const Part &exact = parts[at * rows], &own = parts[at * rows + row];
        exact_top = Max()(exact_top, exact.top), top = Max()(top, own.top);
        exact_best = Max()(exact_best, exact.best), best = Max()(best, own.best);
    }
    exact_top = reduce_warp(exact_top, Max()), top = reduce_warp(top, Max());
    exact_best = reduce_warp(exact_best, Max()), best = reduce_warp(best, Max());
    double exact_mass = 0.0, mass = 0.0, gap = 0.0, wanted = 0.0;
    for (int at = threadIdx.x; at < count; at += 32) {
        const Part &exact = parts[at * rows], &own = parts[at * rows + row];
        const double exact_scale = exp((double)exact.top - exact_top);
        exact_mass += exact.mass * exact_scale;
        gap += own.gap * exact_scale;
        mass += own.mass * exp((double)own.top - top);
        wanted += own.wanted;
    }
    exact_mass = reduce_warp(exact_mass, Add()), mass = reduce_warp(mass, Add());
    gap = reduce_warp(gap, Add()), wanted = reduce_warp(wanted, Add());
    if (threadIdx.x == 0) {
        out += 3 * ((i64)(row ? first + row - 1 : 0) * positions + position);
        out[0] = (float)(log(mass) - (wanted - top));
        const double shift = (double)exact_top - top;
        out[1] = (float)(gap / exact_mass - shift - log(exact_mass / mass));
        out[2] = (u32)exact_best == (u32)best ? 1.0f : 0.0f;
    }
}
