// Attention of one new token per sequence that reads trellis codes where they lie: kv/packed_attention.py
// derives the formulas. Legend: B sequences, Q query heads, G key heads, DIM numbers of each.
//
//   packed_scores  codes of keys -> weights [B, Q, columns], each relative to the maximum of its chunk
//   packed_sums    codes, weights -> sums of scaled levels, for each query head
//   packed_join    these and the exact columns -> what one small product makes the result of
//
// Needs sm_80: tensor cores that multiply 16 x 16 by 16 x 8 half numbers, c in float.
#include "packed_levels.cuh"

namespace {

constexpr int CHUNK = 512, TILE = 32;   // keys that share a maximum; keys of a warp at once
constexpr int BLOCK = 8;                // warps, and query heads that packed_scores takes together
constexpr int TURN_ROW = DIM / 2 + 8;   // words; rows lie so that 8 lanes of a column read other banks
constexpr int SCORE_ROW = CHUNK + 4;    // likewise
constexpr int SLICES = DIM / WIDE, PARTS = BLOCK / SLICES;  // warps side by side, and one after another

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

template <int K>
__device__ __forceinline__ void read_key(const u8* codes, const u32* table, Keys& keys, int row) {
    u32 found[DIM / 4];
    read_levels<K>(codes, threadIdx.x % 4 * (DIM / 4), table, found);
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
__device__ __forceinline__ void turn_query(const float2* q, const float* cosines, const float* sines, int s, u32 (&query)[2]) {
    const int lane = threadIdx.x % 32, at = 8 * s + lane % 4 * 2;
    const float2 low = q[2 * s * 32 + lane], high = q[(2 * s + 1) * 32 + lane];
    const float2 cosine = *(const float2*)(cosines + at), sine = *(const float2*)(sines + at);
    query[0] = half_pair(fmaf(low.x, cosine.x, high.x * sine.x), fmaf(low.y, cosine.y, high.y * sine.y));
    query[1] = half_pair(fmaf(high.x, cosine.x, -low.x * sine.x), fmaf(high.y, cosine.y, -low.y * sine.y));
}

// Two numbers of a key in its own coordinates. `around` holds the mean, and DIM further on the sink.
__device__ __forceinline__ u32 key_pair(const Keys& keys, int row, float one, float other, const float* around) {
    float2 base = *(const float2*)around;
    if (keys.any && keys.near[row]) base = *(const float2*)(around + DIM);
    return half_pair(fmaf(one, keys.scale[row], base.x), fmaf(other, keys.scale[row], base.y));
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
        const float* base = around + 8 * s + 2 * c;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 turned[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = 2 * i + j;
                const u32 a = key_pair(keys, row, low[i][2 * j], low[i][2 * j + 1], base);
                const u32 b = key_pair(keys, row, high[i][2 * j], high[i][2 * j + 1], base + DIM / 2);
                const uint2 turn = *(const uint2*)(turns + (r + 8 * row) * TURN_ROW + 8 * s + 2 * c);
                turned[j] = fma_two(b, turn.y ^ 0x80008000u, fma_two(a, turn.x, 0));
                turned[2 + j] = fma_two(a, turn.y, fma_two(b, turn.x, 0));
            }
            add_product(score[i], turned, query[0], query[1]);
        }
    }
}

// Weights of one head over a chunk, and what they come to: maximum, sum, sums over the tokens whose key
// or value is coded around a sink. By a warp.
__device__ __forceinline__ void weigh_chunk(
    const float* scores, int count, const u8* key_flags, const u8* value_flags, int first, u16* weights, float* stats
) {
    const int lane = threadIdx.x % 32;
    float highest = NEVER, sums[3] = {};
    for (int i = lane; i < count; i += 32) highest = Max()(highest, scores[i]);
    highest = reduce_warp(highest, Max());
    for (int i = lane; i < CHUNK; i += 32) {
        const float weight = i < count ? exp2f(scores[i] - highest) : 0.0f;
        weights[i] = float_to_half(weight);
        if (i >= count) continue;
        sums[0] += weight;
        if (flag_at(key_flags, first + i)) sums[1] += weight;
        if (flag_at(value_flags, first + i)) sums[2] += weight;
    }
    for (int i = 0; i < 3; ++i) sums[i] = reduce_warp(sums[i], Add());
    if (lane == 0) stats[0] = highest;
    if (lane == 0) for (int i = 0; i < 3; ++i) stats[1 + i] = sums[i];
}

template <int K>
__device__ __forceinline__ void scores(
    const u8* codes, const u8* scales, const u8* key_flags, const u8* value_flags, const float* levels,
    const float* factors, const float* sizes, const float* around, const uint4* matrix, const u32* near,
    const float* cosines, const float* sines, const float* q, const int* spans, u16* weights, float* stats,
    i64 code_batch, i64 code_head, i64 scale_batch, i64 scale_head, i64 key_flag, i64 value_flag,
    int groups, int group, int chunks, float cap
) {
    SHARED_POOL;
    u32* turns = fill_levels<K>((u32*)pool, levels);
    float2* query = (float2*)(turns + TILE * TURN_ROW);  // [STEPS][low, high][32]
    float* score_of = (float*)(query + 2 * STEPS * 32);
    for (int i = threadIdx.x; i < TILE * DIM / 2; i += blockDim.x) turns[i / (DIM / 2) * TURN_ROW + i % (DIM / 2)] = near[i];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, batch = blockIdx.z;
    const int octets = (group + BLOCK - 1) / BLOCK, g = blockIdx.y / octets, octet = blockIdx.y % octets * BLOCK;
    const int pair = batch * groups + g, count = group - octet < BLOCK ? group - octet : BLOCK;
    const int position = spans[2 * batch], tokens = spans[2 * batch + 1];
    const i64 head = (i64)pair * group + octet;
    codes += batch * code_batch + g * code_head;
    scales += batch * scale_batch + g * scale_head;
    if (key_flags) key_flags += batch * key_flag;
    if (value_flags) value_flags += batch * value_flag;
    matrix += g * STEPS * STEPS * 32;
    around += pair * 2 * DIM;
    for (int i = threadIdx.x; i < BLOCK * DIM; i += blockDim.x) {  // zeros for heads that are not there
        const int head_at = i / 8 % 8, at = i / 128 * 8 + i / 64 % 2 * (DIM / 2) + i % 8;
        ((float*)query)[i] = head_at < count ? q[(head + head_at) * DIM + at] : 0.0f;
    }
    const float size = sizes[pair];
    __syncthreads();

    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int first = chunk * CHUNK, here = tokens - first < CHUNK ? tokens - first : CHUNK;
        for (int at = warp * TILE; at < here; at += BLOCK * TILE) {
            Keys keys;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int token = first + at + r + 8 * i;
                token = token < tokens ? token : tokens - 1;
                read_key<K>(codes + (i64)token * (DEEP * K), (const u32*)pool, keys, i);
                keys.scale[i] = factors[scales[token]] * size;
                keys.near[i] = flag_at(key_flags, token);
            }
            keys.any = __any_sync(ALL, keys.near[0] || keys.near[1] || keys.near[2] || keys.near[3]);
            const i64 turn = (i64)(position + first + at) * (DIM / 2);
            float score[2][4] = {};
            score_keys(keys, matrix, around, turns, query, cosines + turn, sines + turn, score);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float found = score[i / 4][i % 4];
                const float capped = cap == 0.0f ? found : cap * tanhf(found);
                score_of[(2 * c + i % 2) * SCORE_ROW + at + r + 8 * (i / 2)] = capped;
            }
        }
        __syncthreads();
        if (warp < count) {
            const i64 row = (head + warp) * chunks + chunk;
            weigh_chunk(
                score_of + warp * SCORE_ROW, here, key_flags, value_flags, first, weights + row * CHUNK, stats + 4 * row
            );
        }
        __syncthreads();
    }
}

// The greatest of the chunks' maxima. By a warp; every lane gets it.
__device__ __forceinline__ float highest_of(const float* stats, int chunks) {
    float highest = NEVER;
    for (int i = threadIdx.x % 32; i < chunks; i += 32) highest = Max()(highest, stats[4 * i]);
    return reduce_warp(highest, Max());
}

// Sums of levels times scales (without their level) times weights, relative to the greatest maximum, of
// TILES x 16 heads: heads `each` x g .. + `each` of all of them see the codes of key head g; 0: all do.
template <int K, int TILES>
__device__ __forceinline__ void sums(
    const u8* codes, const u8* scales, const float* levels, const float* factors, const int* spans,
    const u16* weights, const float* stats, float* out, i64 code_batch, i64 code_head, i64 scale_batch,
    i64 scale_head, int heads, int each, int chunks, int tiles
) {
    SHARED_POOL;
    constexpr int ROWS = 16 * TILES;
    const u32* table = (const u32*)pool;
    u32* factor = fill_levels<K>((u32*)pool, levels);  // of each byte
    float* highest = (float*)(factor + 256);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) factor[i] = twice(factors[i]);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int slice = warp % SLICES, part = warp / SLICES, batch = blockIdx.z;
    const int g = blockIdx.y / tiles, begin = blockIdx.y % tiles * ROWS, seen = each ? each : heads;
    const int count = seen - begin < ROWS ? seen - begin : ROWS, tokens = spans[2 * batch + 1];
    const i64 head = (i64)batch * heads + g * each + begin;
    codes += batch * code_batch + g * code_head;
    scales += batch * scale_batch + g * scale_head;
    weights += head * chunks * CHUNK;
    stats += head * chunks * 4;
    for (int i = warp; i < count; i += BLOCK) highest[i] = highest_of(stats + i * chunks * 4, chunks);
    __syncthreads();

    float sum[TILES][WIDE / 8][4] = {};
    for (int chunk = blockIdx.x; chunk * CHUNK < tokens; chunk += gridDim.x) {
        u32 lower[2 * TILES];  // by how much the chunk's maximum lies below the greatest
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int row = r + 8 * i;
            lower[i] = row < count ? twice(exp2f(stats[(row * chunks + chunk) * 4] - highest[row])) : 0;
        }
        const int stop = tokens < (chunk + 1) * CHUNK ? tokens : (chunk + 1) * CHUNK;
        for (int at = chunk * CHUNK + 16 * part; at < stop; at += 16 * PARTS) {
            u32 level[WIDE / 8][2], scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 one[2][WIDE / 8], its_scale[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    int token = at + 2 * c + 8 * half + j;
                    token = token < tokens ? token : tokens - 1;  // of weight 0
                    read_levels<K>(codes + token * (DEEP * K), slice * WIDE + 8 * r, table, one[j]);
                    its_scale[j] = factor[scales[token]];
                }
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n) level[n][half] = two(one[0][n], one[1][n]);
                scale[half] = two(its_scale[0], its_scale[1]);
            }
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                u32 weight[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int row = 16 * i + r + 8 * (j % 2), real = row < count ? row : 0;
                    const u32 two_of = *(const u32*)(weights + (i64)real * chunks * CHUNK + at + 2 * c + 8 * (j / 2));
                    weight[j] = fma_two(fma_two(two_of, lower[2 * i + j % 2], 0), scale[j / 2], 0);
                }
#pragma unroll
                for (int n = 0; n < WIDE / 8; ++n) add_product(sum[i][n], weight, level[n][0], level[n][1]);
            }
        }
    }
    __syncthreads();
    float* total = (float*)pool;  // [ROWS][DIM], in place of the levels
    for (int turn = 0; turn < PARTS; ++turn, __syncthreads()) {
        if (turn != part) continue;
#pragma unroll
        for (int i = 0; i < TILES * WIDE / 8 * 4; ++i) {
            const int tile = i / (WIDE / 2), n = i / 4 % (WIDE / 8), j = i % 4;
            float& at = total[(16 * tile + r + 8 * (j / 2)) * DIM + slice * WIDE + 8 * (2 * c + j % 2) + n];
            at = sum[tile][n][j] + (turn ? at : 0.0f);
        }
    }
    const i64 of = ((i64)batch * (gridDim.y / tiles) + g) * gridDim.x + blockIdx.x;
    out += (of * seen + begin) * DIM;
    for (int i = threadIdx.x; i < count * DIM; i += blockDim.x) out[i] = total[i];
}

// Scores of the exact columns, and the maximum over them, the codes' and the sink's. By a block.
__device__ __forceinline__ float exact_scores(const float* q, const T* k, float* scores, int count, float highest, float cap) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float own = NEVER;
    for (int i = warp; i < count; i += BLOCK) {
        float sum = 0.0f;
        for (int d = lane; d < DIM; d += 32) sum = fmaf(q[d], to_float(k[(i64)i * DIM + d]), sum);
        sum = reduce_warp(sum, Add());
        const float score = cap == 0.0f ? sum : cap * tanhf(sum);
        own = Max()(own, score);
        if (lane == 0) scores[i] = score;
    }
    return reduce_block(Max()(own, highest), NEVER, Max());
}

// Of the query head (y, x): the softmax over all columns is complete. base: exact values and what each
// coded token adds for being coded around a mean or a sink, `offsets` [B, G, 4, DIM]; sums: of levels,
// values first, then each key head's. Both are laid for one product per key head.
__device__ __forceinline__ void join(
    const float* q, const T* k, const T* v, const float* sinks, const float* stats, const float* value_parts,
    const float* key_parts, const float* value_sizes, const float* key_sizes, const float* offsets,
    const int* exact, float* base, float* sums, int groups, int group, int chunks, int columns,
    int value_count, int key_count, float cap
) {
    SHARED_POOL;
    float* scores = (float*)pool;
    const int head = blockIdx.x, batch = blockIdx.y, heads = groups * group, g = head / group;
    const i64 pair = (i64)batch * groups + g, row = (i64)batch * heads + head;
    const int count = exact[batch];
    stats += row * chunks * 4;
    const float coded = highest_of(stats, chunks), sink = sinks ? sinks[head] : NEVER;
    k += pair * columns * DIM;
    v += pair * columns * DIM;
    const float highest = exact_scores(q + row * DIM, k, scores, count, Max()(coded, sink), cap);

    float all[4] = {};  // of exact columns, of codes, of those whose key, whose value is near a sink
    for (int i = threadIdx.x; i < count; i += blockDim.x) all[0] += scores[i] = exp2f(scores[i] - highest);
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
        const float lower = exp2f(stats[4 * i] - highest);
        for (int j = 1; j < 4; ++j) all[j] = fmaf(lower, stats[4 * i + j], all[j]);
    }
    for (int j = 0; j < 4; ++j) all[j] = reduce_block(all[j], 0.0f, Add());
    const float share = 1.0f / (all[0] + all[1] + exp2f(sink - highest)), lower = exp2f(coded - highest) * share;

    const i64 place = (i64)g * gridDim.y * group + batch * group + head % group;
    const float shares[4] = {all[1] - all[3], all[3], all[1] - all[2], all[2]};
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {
        float found = 0.0f;
        for (int i = 0; i < count; ++i) found = fmaf(scores[i], to_float(v[(i64)i * DIM + d]), found);
        for (int j = 0; j < 4; ++j) found = fmaf(shares[j], offsets[(pair * 4 + j) * DIM + d], found);
        base[place * DIM + d] = found * share;
    }
    const int told = key_count ? groups : 0, width = (1 + told) * DIM;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const int from = i / DIM - 1, d = i % DIM, parts = from < 0 ? value_count : key_count;
        const i64 of = (i64)batch * groups + (from < 0 ? g : from), line = from < 0 ? head % group : head;
        const float* part = (from < 0 ? value_parts : key_parts) + d;
        const i64 step = (i64)(from < 0 ? group : heads) * DIM;
        float sum = 0.0f;
        for (int j = 0; j < parts; ++j) sum += part[(of * parts + j) * step + line * DIM];
        sums[place * width + i] = sum * lower * (from < 0 ? value_sizes : key_sizes)[of];
    }
}

}  // namespace

#define PACKED(K)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) packed_scores_##K(                        \
        const u8* codes, const u8* scales, const u8* key_flags, const u8* value_flags,             \
        const float* levels, const float* factors, const float* sizes, const float* around,        \
        const uint4* matrix, const u32* near, const float* cosines, const float* sines,            \
        const float* q, const int* spans, u16* weights, float* stats, i64 code_batch,              \
        i64 code_head, i64 scale_batch, i64 scale_head, i64 key_flag, i64 value_flag,              \
        int groups, int group, int chunks, float cap                                               \
    ) {                                                                                            \
        scores<K>(                                                                                 \
            codes, scales, key_flags, value_flags, levels, factors, sizes, around, matrix, near,   \
            cosines, sines, q, spans, weights, stats, code_batch, code_head, scale_batch,          \
            scale_head, key_flag, value_flag, groups, group, chunks, cap                           \
        );                                                                                         \
    }                                                                                              \
    SUMS(K, 1)                                                                                     \
    SUMS(K, 2)
#define SUMS(K, TILES)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) packed_sums_##K##_##TILES(                \
        const u8* codes, const u8* scales, const float* levels, const float* factors,              \
        const int* spans, const u16* weights, const float* stats, float* out, i64 code_batch,      \
        i64 code_head, i64 scale_batch, i64 scale_head, int heads, int each, int chunks, int tiles \
    ) {                                                                                            \
        sums<K, TILES>(                                                                            \
            codes, scales, levels, factors, spans, weights, stats, out, code_batch, code_head,     \
            scale_batch, scale_head, heads, each, chunks, tiles                                    \
        );                                                                                         \
    }
PACKED(2)
PACKED(3)
PACKED(4)

extern "C" __global__ void __launch_bounds__(256) packed_join(
    const float* q, const T* k, const T* v, const float* sinks, const float* stats,
    const float* value_parts, const float* key_parts, const float* value_sizes, const float* key_sizes,
    const float* offsets, const int* exact, float* base, float* sums, int groups, int group, int chunks,
    int columns, int value_count, int key_count, float cap
) {
    join(
        q, k, v, sinks, stats, value_parts, key_parts, value_sizes, key_sizes, offsets, exact, base, sums,
        groups, group, chunks, columns, value_count, key_count, cap
    );
}
