// Weights and codes -> sums of levels -> what is exact joins them; see packed.cu.
#pragma once
#include "packed_scores.cuh"

struct SumsIn {
    const u8 *codes, *scales;
    const float *levels, *factors;
    const int* spans;
    const uint2* weights;
    const float* stats;
    float* out;  // [B, G, parts, query heads that see the codes, DIM]
    i64 code_batch, code_head, scale_batch, scale_head;
    int heads, each;  // each: query heads of a key head, 0: all see the codes of each
    int chunks, rows;  // rows: blocks that share the query heads of a key head
};

namespace {

constexpr int SUMMING = 8;                                     // warps of a block
constexpr int SLICES = DIM / WIDE, PARTS = SUMMING / SLICES;  // side by side, one after another

// The greatest of the chunks' maxima. By a warp; every lane gets it.
__device__ __forceinline__ float highest_of(const float* stats, int chunks) {
    float highest = NEVER;
    for (int i = threadIdx.x % 32; i < chunks; i += 32) highest = Max()(highest, stats[4 * i]);
    return reduce_warp(highest, Max());
}

// 16 tokens as the lanes of a product have them: of tokens 2 c, + 1 and + 8, + 9, numbers 8 r + n of a
// slice in level[n], and their scales. Tokens after `last` are copies of it, of weight 0.
struct Tokens {
    u32 level[WIDE / 8][2], scale[2];
};

template <bool WHOLE, class R>
__device__ __forceinline__ void load_tokens(
    Tokens& tokens, const R& run, const u8* codes, const u8* scales, const u32* factor, int last
) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 one[2][WIDE / 8], scale[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int token = 8 * half + j;
            if (!WHOLE && token > last) token = last;
            run.read(codes + token * R::ROW, (const u32*)pool, one[j]);
            scale[j] = factor[scales[token]];
        }
#pragma unroll
        for (int n = 0; n < WIDE / 8; ++n) tokens.level[n][half] = two(one[0][n], one[1][n]);
        tokens.scale[half] = two(scale[0], scale[1]);
    }
}

// sum += weights x levels, heads by numbers. `lower` brings weights down to the greatest maximum.
template <int TILES>
__device__ __forceinline__ void add_tokens(
    float (&sum)[TILES][WIDE / 8][4], const Tokens& tokens, const uint2* const (&weights)[2 * TILES],
    const u32 (&lower)[2 * TILES], int step
) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        u32 weight[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint2 both = weights[2 * i + j][32 * step];
            weight[j] = fma_two(fma_two(both.x, lower[2 * i + j], 0), tokens.scale[0], 0);
            weight[2 + j] = fma_two(fma_two(both.y, lower[2 * i + j], 0), tokens.scale[1], 0);
        }
#pragma unroll
        for (int n = 0; n < WIDE / 8; ++n) {
            add_product(sum[i][n], weight, tokens.level[n][0], tokens.level[n][1]);
        }
    }
}

// Block (part of the chunks, key head and 16 TILES query heads, sequence): sums of levels times scales
// (without what those are relative to) times weights, relative to the greatest maximum of each head.
template <int K, int TILES>
__device__ __forceinline__ void sums(const SumsIn& in) {
    constexpr int ROWS = 16 * TILES;
    u32* factor = fill_levels<K>((u32*)pool, in.levels);  // of each byte
    float* highest = (float*)(factor + 256);              // [ROWS]
    for (int i = threadIdx.x; i < 256; i += blockDim.x) factor[i] = twice(in.factors[i]);
    const int warp = warp_id(), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int slice = warp % SLICES, part = warp / SLICES, batch = blockIdx.z, g = blockIdx.y / in.rows;
    const int first = g * in.each, seen = in.each ? in.each : in.heads;         // heads that see the codes
    const int begin = first / 8 * 8 + blockIdx.y % in.rows * ROWS;              // the block's first
    const int tokens = in.spans[2 * batch + 1], octets = (in.heads + 7) / 8;
    const u8* codes = in.codes + batch * in.code_batch + g * in.code_head;
    const u8* scales = in.scales + batch * in.scale_batch + g * in.scale_head;
    const float* stats = in.stats + (i64)batch * in.heads * in.chunks * 4;
    for (int i = warp; i < ROWS && begin + i < in.heads; i += SUMMING) {
        highest[i] = highest_of(stats + (begin + i) * in.chunks * 4, in.chunks);
    }
    __syncthreads();

    const Run<K, 8> run(slice * WIDE + 8 * r);
    float sum[TILES][WIDE / 8][4] = {};
    for (int chunk = blockIdx.x; chunk * CHUNK < tokens; chunk += gridDim.x) {
        u32 lower[2 * TILES];
        const uint2* weights[2 * TILES];
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int head = begin + r + 8 * i, octet = head / 8 < octets ? head / 8 : 0;
            const bool real = head >= first && head < first + seen;
            lower[i] = real ? twice(exp2f(stats[(head * in.chunks + chunk) * 4] - highest[r + 8 * i])) : 0;
            const i64 of = ((i64)batch * octets + octet) * in.chunks + chunk;
            weights[i] = in.weights + of * (2 * CHUNK) + lane;
        }
        const int left = tokens - chunk * CHUNK, place = chunk * CHUNK + 2 * c;
        for (int step = part; 16 * step < left && step < CHUNK / 16; step += PARTS) {
            Tokens some;
            const int first = place + 16 * step;
            const u8 *row = codes + (i64)first * run.ROW, *scale = scales + first;
            if (16 * step + 16 <= left) load_tokens<true>(some, run, row, scale, factor, 0);
            else load_tokens<false>(some, run, row, scale, factor, tokens - 1 - first);
            add_tokens<TILES>(sum, some, weights, lower, step);
        }
    }
    __syncthreads();
    float* total = (float*)pool;  // [ROWS][DIM], in place of the levels
    for (int turn = 0; turn < PARTS; ++turn, __syncthreads()) {
        if (turn != part) continue;
#pragma unroll
        for (int i = 0; i < TILES * WIDE / 2; ++i) {
            const int tile = i / (WIDE / 2), n = i / 4 % (WIDE / 8), j = i % 4;
            float& at = total[(16 * tile + r + 8 * (j / 2)) * DIM + slice * WIDE + 8 * (2 * c + j % 2) + n];
            at = sum[tile][n][j] + (turn ? at : 0.0f);
        }
    }
    const i64 of = ((i64)batch * (gridDim.y / in.rows) + g) * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < ROWS * DIM; i += blockDim.x) {
        const int head = begin + i / DIM - first;
        if (head >= 0 && head < seen) in.out[(of * seen + head) * DIM + i % DIM] = total[i];
    }
}

}  // namespace
