// Attention of one new token per sequence that reads trellis codes where they lie: kv/packed_attention.py
// derives the formulas. Legend: B sequences, Q query heads, G key heads, DIM numbers of each.
//
//   packed_scores  codes of keys -> weights, each relative to the maximum of its chunk
//   packed_sums    codes, weights -> sums of scaled levels, for each query head
//   packed_join    these and the exact columns -> what one small product makes the result of
//
// Needs sm_80: tensor cores that multiply 16 x 16 by 16 x 8 half numbers, and add in float.
#include "packed_sums.cuh"

struct JoinIn {
    const float* q;                             // as in ScoresIn
    const T *k, *v;                             // exact columns [B, G, columns, DIM], keys in pairs
    const float *sinks, *stats;                 // [Q] powers of two, or null
    const float *value_parts, *key_parts;       // of packed_sums
    const float *value_sizes, *key_sizes;       // [B, G]
    const float* offsets;                       // [B, G, 4, DIM]
    const int* exact;                           // [B]: how many of the columns
    float *base, *sums;                         // [G, B group, DIM], [G, B group, DIM or (1 + G) DIM]
    int groups, group, heads, chunks, columns, value_count, key_count;
    float cap;
};

namespace {

// Scores of the exact columns, and the maximum over them and over `others`. By a block.
__device__ __forceinline__ float exact_scores(
    const float* q, const T* k, float* scores, int count, float others, float cap
) {
    const int lane = threadIdx.x % 32;
    float highest = others;
    for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
        float sum = 0.0f;
        for (int d = lane; d < DIM; d += 32) sum = fmaf(q[d], to_float(k[(i64)i * DIM + d]), sum);
        sum = reduce_warp(sum, Add());
        const float score = cap == 0.0f ? sum : cap * tanhf(sum);
        highest = Max()(highest, score);
        if (lane == 0) scores[i] = score;
    }
    return reduce_block(highest, NEVER, Max());
}

// The sum of number `d` of a line of packed_sums over its parts.
__device__ __forceinline__ float add_parts(
    const float* parts, i64 of, int count, int lines, int line, int d
) {
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += parts[((of * count + i) * lines + line) * DIM + d];
    return sum;
}

// Block (query head, sequence): the softmax over all columns is complete. base: exact values, and what
// coded ones add for the mean or the sink that they, or the keys that tell of them, are coded around.
// sums: of levels, values first, then each key head's. Both are laid out for one product per key head.
__device__ __forceinline__ void join(const JoinIn& in) {
    float* scores = (float*)pool;
    const int head = blockIdx.x, batch = blockIdx.y, g = head / in.group, line = head % in.group;
    const i64 pair = (i64)batch * in.groups + g, row = (i64)batch * in.heads + head;
    const int count = in.exact[batch];
    const float* stats = in.stats + row * in.chunks * 4;
    const T* k = in.k + pair * in.columns * DIM;
    const T* v = in.v + pair * in.columns * DIM;
    const float coded = highest_of(stats, in.chunks), sink = in.sinks ? in.sinks[head] : NEVER;
    const float highest = exact_scores(in.q + row * DIM, k, scores, count, Max()(coded, sink), in.cap);

    float all[4] = {};  // of exact columns, of codes, of those whose key, whose value is near a sink
    for (int i = threadIdx.x; i < count; i += blockDim.x) all[0] += scores[i] = exp2f(scores[i] - highest);
    for (int i = threadIdx.x; i < in.chunks; i += blockDim.x) {
        const float lower = exp2f(stats[4 * i] - highest);
        for (int j = 1; j < 4; ++j) all[j] = fmaf(lower, stats[4 * i + j], all[j]);
    }
    for (int j = 0; j < 4; ++j) all[j] = reduce_block(all[j], 0.0f, Add());
    const float share = 1.0f / (all[0] + all[1] + exp2f(sink - highest));

    const i64 place = ((i64)g * gridDim.y + batch) * in.group + line;
    const float shares[4] = {all[1] - all[3], all[3], all[1] - all[2], all[2]};
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float found = 0.0f;
        for (int i = 0; i < count; ++i) found = fmaf(scores[i], to_float(v[(i64)i * DIM + d]), found);
        for (int j = 0; j < 4; ++j) found = fmaf(shares[j], in.offsets[(pair * 4 + j) * DIM + d], found);
        in.base[place * DIM + d] = found * share;
    }
    const int width = (1 + (in.key_count ? in.groups : 0)) * DIM;
    const float lower = exp2f(coded - highest) * share;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const int d = i % DIM;
        const i64 of = i < DIM ? pair : (i64)batch * in.groups + i / DIM - 1;
        const float sum = i < DIM ? add_parts(in.value_parts, of, in.value_count, in.group, line, d)
                                  : add_parts(in.key_parts, of, in.key_count, in.heads, head, d);
        in.sums[place * width + i] = sum * lower * (i < DIM ? in.value_sizes : in.key_sizes)[of];
    }
}

}  // namespace

#define SUMS(K, TILES)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) packed_sums_##K##_##TILES(SumsIn in) {    \
        sums<K, TILES>(in);                                                                        \
    }
#define PACKED(K)                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * SCORING) packed_scores_##K(ScoresIn in) {    \
        scores<K>(in);                                                                             \
    }                                                                                              \
    SUMS(K, 1)                                                                                     \
    SUMS(K, 2)
PACKED(2)
PACKED(3)
PACKED(4)

extern "C" __global__ void __launch_bounds__(256) packed_join(JoinIn in) { join(in); }
