// Attention with capped scores, for GPUs and types that Triton does not serve. Scores stay in shared
// memory: a block keeps the running maximum and sum of 64 queries of one head (Dao, 2023,
// arXiv:2307.08691). DIM: head size, a multiple of 8. Sums are float32, by fmaf, which -fmad=false
// leaves alone.
#include "common.cuh"

const int TILE = 64, CHUNK = 32, CHUNKS = (DIM + CHUNK - 1) / CHUNK;
// A row of a chunk and of weights, in float4; one more than they hold, so that banks do not clash.
const int CHUNK_ROW = CHUNK / 4 + 1, WEIGHT_ROW = TILE / 4 + 1;

// Numbers `start` .. `start + CHUNK` of TILE heads, 0 beyond DIM and beyond `count` heads. All
// threads; each brings 8 numbers.
__device__ void load_chunk(
    float4 (*tile)[CHUNK_ROW], const T* heads, i64 step, int count, int start
) {
    const int row = threadIdx.x / 4, at = threadIdx.x % 4 * 8;
    float value[8] = {};
    if (row < count && start + at < DIM) load(heads + row * step + start + at, value);
    float4* out = tile[row] + at / 4;
    out[0] = {value[0], value[1], value[2], value[3]};
    out[1] = {value[4], value[5], value[6], value[7]};
}

__device__ __forceinline__ float add_products(float sum, float4 a, float4 b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Over the 16 threads of a row, which are half a warp.
template <class Combine>
__device__ __forceinline__ float reduce_row(float value, Combine combine) {
#pragma unroll
    for (int step = 8; step; step /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    return value;
}

// out [B, Q, T, DIM], T queries that are the last of S keys; `group` query heads share keys. With a
// mask [T, S] that says what is seen, else each query sees the newest `window` keys up to itself.
// Thread (y, x) of 16 x 16 has queries 4y + i, keys x + 16j, and numbers x + 16j of the output.
extern "C" __global__ void __launch_bounds__(256) attend_capped(
    const T* q, const T* k, const T* v, T* out, const u8* mask, const float* sinks,
    i64 q_batch, i64 q_head, i64 q_token, i64 k_batch, i64 k_head, i64 k_token,
    i64 v_batch, i64 v_head, i64 v_token, i64 out_batch, i64 out_head, i64 out_token,
    int queries, int keys, int window, int group, float scale, float softcap
) {
    __shared__ float4 left[TILE][CHUNK_ROW], right[TILE][CHUNK_ROW], weights[TILE][WEIGHT_ROW];
    const float NEVER = __uint_as_float(0xff800000u);  // minus infinity
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, head = blockIdx.y;
    const int start = blockIdx.x * TILE, past = keys - queries;
    q += blockIdx.z * q_batch + head * q_head + start * q_token;
    k += blockIdx.z * k_batch + head / group * k_head;
    v += blockIdx.z * v_batch + head / group * v_head;
    out += blockIdx.z * out_batch + head * out_head + start * out_token;
    float best[4], total[4] = {}, found[CHUNKS][4][2] = {};
    for (int i = 0; i < 4; ++i) best[i] = NEVER;
    const int oldest = past + start - window + 1, newest = past + start + TILE;
    const int first = mask || oldest < 0 ? 0 : oldest / TILE * TILE;
    const int last = mask || newest > keys ? keys : newest;

    for (int begin = first; begin < last; begin += TILE) {
        float score[4][4] = {};
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            __syncthreads();
            load_chunk(left, q, q_token, queries - start, chunk * CHUNK);
            load_chunk(right, k + begin * k_token, k_token, keys - begin, chunk * CHUNK);
            __syncthreads();
#pragma unroll
            for (int at = 0; at < CHUNK / 4; ++at) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        score[i][j] =
                            add_products(score[i][j], left[4 * y + i][at], right[x + 16 * j][at]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = start + 4 * y + i;
            float highest = best[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = begin + x + 16 * j, behind = past + row - key;
                bool seen = row < queries && key < keys;
                if (mask) seen = seen && mask[(i64)row * keys + key];
                else seen = seen && behind >= 0 && behind < window;
                score[i][j] = seen ? softcap * tanhf(score[i][j] * scale / softcap) : NEVER;
                highest = score[i][j] > highest ? score[i][j] : highest;
            }
            highest = reduce_row(highest, Max());
            const float base = highest == NEVER ? 0.0f : highest;  // nothing seen yet
            const float kept = expf(best[i] - base);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float share = expf(score[i][j] - base);
                ((float*)weights[4 * y + i])[x + 16 * j] = share;
                sum += share;
            }
            total[i] = total[i] * kept + reduce_row(sum, Add());
            best[i] = highest;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                for (int j = 0; j < 2; ++j) found[chunk][i][j] *= kept;
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            __syncthreads();
            load_chunk(right, v + begin * v_token, v_token, keys - begin, chunk * CHUNK);
            __syncthreads();
#pragma unroll 4
            for (int at = 0; at < TILE / 4; ++at) {
                float4 value[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int col = x + 16 * j;
                    value[j] = {
                        ((float*)right[4 * at])[col], ((float*)right[4 * at + 1])[col],
                        ((float*)right[4 * at + 2])[col], ((float*)right[4 * at + 3])[col]
                    };
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        found[chunk][i][j] =
                            add_products(found[chunk][i][j], weights[4 * y + i][at], value[j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float share = 1.0f / total[i];
        if (sinks) {  // as one more key, whose value is 0
            const float higher = sinks[head] > best[i] ? sinks[head] : best[i];
            const float kept = expf(best[i] - higher);
            share = kept / (total[i] * kept + expf(sinks[head] - higher));
        }
        if (start + 4 * y + i >= queries) continue;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int col = chunk * CHUNK + x + 16 * j;
                if (col < DIM) put(out + (4 * y + i) * out_token + col, found[chunk][i][j] * share);
            }
    }
}
