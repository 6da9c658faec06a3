// Codes of keys -> weights, see packed.cu.
#pragma once
#include "packed_levels.cuh"

struct ScoresIn {
    const u8 *codes, *scales, *key_flags, *value_flags;
    const float *levels, *factors, *sizes;  // [256] by state and by byte; [B, G]
    const float* around;                    // [B, G, 2, DIM]: mean and sink of keys, in pairs
    const uint4* matrix;                    // [G, STEPS, STEPS, 32]: from levels to pairs of numbers
    const u32* near;                        // [TILE, DIM / 4, 2]: turns within a tile
    const float *cosines, *sines;           // [positions, DIM / 2]
    const float* q;                         // [B, Q, DIM] in pairs, scaled
    const int* spans;                       // [B, 2]: position of the first token, how many there are
    uint2* weights;                         // [B, Q / 8, chunks, CHUNK / 16, 32], as sums_in reads them
    float* stats;                           // [B, Q, chunks, 4]
    i64 code_batch, code_head, scale_batch, scale_head, key_flag, value_flag;
    int groups, group, chunks;
    float cap;
};

namespace {

constexpr int CHUNK = 1024, TILE = 32;  // keys that share a maximum; keys of a warp at once
constexpr int SCORING = DIM > 128 ? 8 : 16;  // warps of a block
constexpr int MATRIX = STEPS * STEPS * 32;  // uint4 of a key head
constexpr int TURN_ROW = DIM / 2 + 8;  // words; rows lie so that 8 lanes of a column read other banks
constexpr int SCORE_ROW = CHUNK + 4;   // likewise

#define NEVER __uint_as_float(0xff800000u)  // minus infinity

__device__ __forceinline__ bool flag_at(const u8* flags, int token) {
    return flags && (flags[token / 8] >> token % 8 & 1);
}

// What a warp knows of its 32 keys: of those in rows r + 8 i, r = lane / 4. Lane c of the four that share
// a key has the c-th quarter of its numbers: the matrix has them in the same order.
struct Keys {
    u32 levels[2][STEPS][4];
    float scale[4];
    bool near[4], any;  // coded around a sink, not around the mean; whether one of the 32 is
};

template <class R>
__device__ __forceinline__ void read_key(const R& run, const u8* codes, Keys& keys, int row) {
    u32 found[DIM / 4];
    run.read(codes, (const u32*)pool, found);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            keys.levels[row / 2][s][row % 2 + 2 * j] = two(found[4 * s + 2 * j], found[4 * s + 2 * j + 1]);
        }
    }
}

// What a product with keys is taken of: of 8 heads, pairs 8 s + 2 c and + 1, turned back to the first
// key. `q` holds both numbers of a pair for each lane.
__device__ __forceinline__ void turn_query(
    const float2* q, const float* cosines, const float* sines, int s, u32 (&query)[2]
) {
    const int lane = threadIdx.x % 32, at = 8 * s + lane % 4 * 2;
    const float2 low = q[2 * s * 32 + lane], high = q[(2 * s + 1) * 32 + lane];
    const float2 cosine = *(const float2*)(cosines + at), sine = *(const float2*)(sines + at);
    query[0] = half_pair(fmaf(low.x, cosine.x, high.x * sine.x), fmaf(low.y, cosine.y, high.y * sine.y));
    query[1] = half_pair(fmaf(high.x, cosine.x, -low.x * sine.x), fmaf(high.y, cosine.y, -low.y * sine.y));
}

// Two numbers of a key in its own coordinates, coded around `mean`, or what lies DIM after it.
__device__ __forceinline__ u32 key_pair(
    const Keys& keys, int row, float one, float other, float2 mean, const float* around
) {
    if (keys.any && keys.near[row]) mean = *(const float2*)(around + DIM);
    return half_pair(fmaf(one, keys.scale[row], mean.x), fmaf(other, keys.scale[row], mean.y));
}

// Products of 32 keys with 8 heads. Pair by pair, keys go from levels to their own coordinates and turn
// by their places in the tile.
__device__ __forceinline__ void score_keys(
    const Keys& keys, const uint4* matrix, const float* around, const u32* turns, const float2* q,
    const float* cosines, const float* sines, float (&score)[2][4]
) {
    const int lane = threadIdx.x % 32, c = lane % 4, r = lane / 4;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        float low[2][4] = {}, high[2][4] = {};
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const uint4 part = matrix[(s * STEPS + k) * 32 + lane];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                add_product(low[i], keys.levels[i][k], part.x, part.y);
                add_product(high[i], keys.levels[i][k], part.z, part.w);
            }
        }
        u32 query[2];
        turn_query(q, cosines, sines, s, query);
        const float *first = around + 8 * s + 2 * c, *second = first + DIM / 2;
        const float2 mean[2] = {*(const float2*)first, *(const float2*)second};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 turned[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = 2 * i + j;
                const u32 a = key_pair(keys, row, low[i][2 * j], low[i][2 * j + 1], mean[0], first);
                const u32 b = key_pair(keys, row, high[i][2 * j], high[i][2 * j + 1], mean[1], second);
                const uint2 turn = *(const uint2*)(turns + (r + 8 * row) * TURN_ROW + 8 * s + 2 * c);
                turned[j] = fma_two(b, turn.y ^ 0x80008000u, fma_two(a, turn.x, 0));
                turned[2 + j] = fma_two(a, turn.y, fma_two(b, turn.x, 0));
            }
            add_product(score[i], turned, query[0], query[1]);
        }
    }
}

// Four of the flags, from a multiple of 4 on.
__device__ __forceinline__ u32 four_flags(const u8* flags, int token) {
    return flags ? flags[token / 8] >> token % 8 & 15 : 0;
}

// What the weights of one head come to over a chunk: the maximum, which is returned, their sum, and their
// sums over the tokens whose key, whose value is coded around a sink. By a warp, while the others wait.
__device__ __forceinline__ float sum_weights(
    const float* scores, int count, const u8* key_flags, const u8* value_flags, int first, float* stats
) {
    constexpr int EACH = CHUNK / 128;
    const int lane = threadIdx.x % 32;
    float score[EACH][4], highest = NEVER, sums[3] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float4 four = *(const float4*)(scores + 128 * i + 4 * lane);
        const float values[4] = {four.x, four.y, four.z, four.w};
        for (int j = 0; j < 4; ++j) {
            score[i][j] = 128 * i + 4 * lane + j < count ? values[j] : NEVER;
            highest = Max()(highest, score[i][j]);
        }
    }
    highest = reduce_warp(highest, Max());
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int token = 128 * i + 4 * lane;
        if (token >= count) continue;
        const u32 of_key = four_flags(key_flags, first + token);
        const u32 of_value = four_flags(value_flags, first + token);
        for (int j = 0; j < 4; ++j) {
            const float weight = exp2f(score[i][j] - highest);
            sums[0] += weight;
            if (of_key >> j & 1) sums[1] += weight;
            if (of_value >> j & 1) sums[2] += weight;
        }
    }
    for (int i = 0; i < 3; ++i) sums[i] = reduce_warp(sums[i], Add());
    if (lane == 0) *(float4*)stats = {highest, sums[0], sums[1], sums[2]};
    return highest;
}

// Weights of a chunk, as lanes want them for a product over tokens: 16 tokens of 8 heads are together, and
// lane 4 r + c has head r's at tokens 2 c, + 1, + 8 and + 9. Heads come from `head` of all on.
__device__ __forceinline__ void store_weights(
    const ScoresIn& in, const float* scores, const float* highest, int count, int here, int head, int chunk
) {
    const int warp = warp_id(), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    if (r >= count) return;
    const int octets = (in.groups * in.group + 7) / 8, at = head + r;
    const i64 row = ((i64)blockIdx.z * octets + at / 8) * in.chunks + chunk;
    uint2* to = in.weights + row * (2 * CHUNK) + at % 8 * 4 + c;
    scores += r * SCORE_ROW;
    for (int step = warp; step < CHUNK / 16; step += SCORING) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = 16 * step + 2 * c + i % 2 + 8 * (i / 2);
            weight[i] = token < here ? exp2f(scores[token] - highest[r]) : 0.0f;
        }
        to[32 * step] = {half_pair(weight[0], weight[1]), half_pair(weight[2], weight[3])};
    }
}

template <class R>
__device__ __forceinline__ void load_keys(
    Keys& keys, const R& run, const u8* codes, const u8* scales, const u8* flags, const ScoresIn& in,
    float size, int first, int tokens
) {
    const int ahead = first + CHUNK * (int)gridDim.x + threadIdx.x % 32;
    if (ahead < tokens) expect(codes + (i64)ahead * R::ROW);  // then, all warps read at once
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int token = first + threadIdx.x % 32 / 4 + 8 * i;
        token = token < tokens ? token : tokens - 1;
        read_key(run, codes + (i64)token * R::ROW, keys, i);
        keys.scale[i] = in.factors[scales[token]] * size;
        keys.near[i] = flag_at(flags, token);
    }
    keys.any = __any_sync(ALL, keys.near[0] || keys.near[1] || keys.near[2] || keys.near[3]);
}

// Block (part of the chunks, key head and 8 of its query heads, sequence).
template <int K>
__device__ __forceinline__ void scores(const ScoresIn& in) {
    constexpr bool HELD = DIM <= 128;  // shared memory has room for the matrix
    uint4* held = (uint4*)fill_levels<K>((u32*)pool, in.levels);
    u32* turns = (u32*)(held + (HELD ? MATRIX : 0));        // [TILE][TURN_ROW]
    float2* query = (float2*)(turns + TILE * TURN_ROW);     // [STEPS][low, high][32]
    float* score_of = (float*)(query + 2 * STEPS * 32);     // [8][SCORE_ROW]
    float* highest = score_of + 8 * SCORE_ROW;              // [8]
    const int warp = warp_id(), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, batch = blockIdx.z;
    const int octets = (in.group + 7) / 8, g = blockIdx.y / octets, octet = blockIdx.y % octets * 8;
    const int pair = batch * in.groups + g, head = g * in.group + octet;
    const int count = in.group - octet < 8 ? in.group - octet : 8;
    const float* q = in.q + ((i64)batch * in.groups * in.group + head) * DIM;
    for (int i = threadIdx.x; i < 8 * DIM; i += blockDim.x) {  // zeros for heads that are not there
        const int its = i / 8 % 8, at = i / 128 * 8 + i / 64 % 2 * (DIM / 2) + i % 8;
        ((float*)query)[i] = its < count ? q[its * DIM + at] : 0.0f;
    }
    for (int i = threadIdx.x; i < TILE * DIM / 2; i += blockDim.x) {
        turns[i / (DIM / 2) * TURN_ROW + i % (DIM / 2)] = in.near[i];
    }
    const uint4* matrix = in.matrix + g * MATRIX;
    for (int i = threadIdx.x; HELD && i < MATRIX; i += blockDim.x) held[i] = matrix[i];
    if (HELD) matrix = held;
    const int position = in.spans[2 * batch], tokens = in.spans[2 * batch + 1];
    const u8* codes = in.codes + batch * in.code_batch + g * in.code_head;
    const u8* scales = in.scales + batch * in.scale_batch + g * in.scale_head;
    const u8* key_flags = in.key_flags ? in.key_flags + batch * in.key_flag : nullptr;
    const u8* value_flags = in.value_flags ? in.value_flags + batch * in.value_flag : nullptr;
    const Run<K, DIM / 4> run(c * (DIM / 4));
    __syncthreads();

    for (int chunk = blockIdx.x; chunk < in.chunks; chunk += gridDim.x) {
        const int first = chunk * CHUNK, here = tokens - first < CHUNK ? tokens - first : CHUNK;
        for (int at = warp * TILE; at < here; at += SCORING * TILE) {
            Keys keys;
            load_keys(keys, run, codes, scales, key_flags, in, in.sizes[pair], first + at, tokens);
            const i64 turn = (i64)(position + first + at) * (DIM / 2);
            float score[2][4] = {};
            score_keys(
                keys, matrix, in.around + pair * 2 * DIM, turns, query,
                in.cosines + turn, in.sines + turn, score
            );
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float found = score[i / 4][i % 4];
                const float capped = in.cap == 0.0f ? found : in.cap * tanhf(found);
                score_of[(2 * c + i % 2) * SCORE_ROW + at + r + 8 * (i / 2)] = capped;
            }
        }
        __syncthreads();
        if (warp < count) {
            const i64 row = ((i64)batch * in.groups * in.group + head + warp) * in.chunks + chunk;
            const float most = sum_weights(
                score_of + warp * SCORE_ROW, here, key_flags, value_flags, first, in.stats + 4 * row
            );
            if (lane == 0) highest[warp] = most;
        }
        __syncthreads();
        store_weights(in, score_of, highest, count, here, head, chunk);
        __syncthreads();
    }
}

}  // namespace
