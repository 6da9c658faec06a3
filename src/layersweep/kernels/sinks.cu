// Tokens that look like the first of the text, and the same moved to around the mean or back; see
// kv/sinks.py. Heads [H, D] of a token are one vector here. Sums round as rotate.add_rows rounds
// them: its first three foldings happen in registers, the others in shared memory.
#include "common.cuh"

#define TOKENS 8     // whose flags share a byte; a warp of a block each
#define LONGEST 8192  // numbers of a token

namespace {

struct Heads {
    int heads, dim;
    i64 of_head;  // elements between heads

    // Calls visit(j, head, column) for numbers i + j step of a token, j < 8, step = heads dim / 8.
    template <class Visit>
    __device__ __forceinline__ void eight(int i, Visit visit) const {
        const int step = heads * dim / 8, whole = step / dim, rest = step % dim;
        int head = i / dim, column = i % dim;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            visit(j, head, column);
            head += whole;
            column += rest;
            if (column >= dim) {
                column -= dim;
                ++head;
            }
        }
    }
};

// Sum of value(head, column) over a token, by one warp; every lane gets it.
template <class Value>
__device__ float sum_of(const Heads& all, float* rows, int lane, Value value) {
    const int step = all.heads * all.dim / 8;
    for (int i = lane; i < step; i += 32) {
        float part[8];
        all.eight(i, [&](int j, int head, int column) { part[j] = value(head, column); });
#pragma unroll
        for (int apart = 4; apart; apart /= 2) {
#pragma unroll
            for (int j = 0; j < apart; ++j) part[j] += part[j + apart];
        }
        rows[i] = part[0];
    }
    __syncwarp();
    for (int count = step; count > 1; count /= 2) {
        const int half = count / 2;
        for (int i = lane; i < half; i += 32) {
            rows[i] += rows[i + half];
            if (i == 0 && count % 2) rows[0] += rows[count - 1];
        }
        __syncwarp();
    }
    return rows[0];
}

// A block has nine warps: one for each token of a byte, one for the middle between center and mean.
template <class X>
__device__ void find(
    const X* x, const u16* center, const u16* mean, u8* flags, i64 of_batch, i64 of_head,
    i64 of_token, int tokens, int heads, int dim, int columns
) {
    __shared__ float rows[TOKENS + 1][LONGEST / 8], sums[TOKENS + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * TOKENS, token = first + warp;
    const Heads all = {heads, dim, of_head};
    center += (i64)blockIdx.y * heads * dim;
    mean += (i64)blockIdx.y * heads * columns;
    if (warp == TOKENS) {
        sums[warp] = sum_of(all, rows[warp], lane, [&](int head, int column) {
            const float near = half_to_float(center[head * dim + column]);
            const float usual = half_to_float(mean[head * columns + column]);
            return usual * usual - near * near;
        });
    } else if (token < tokens) {
        const X* from = x + blockIdx.y * of_batch + token * of_token;
        sums[warp] = sum_of(all, rows[warp], lane, [&](int head, int column) {
            const float near = half_to_float(center[head * dim + column]);
            const float usual = half_to_float(mean[head * columns + column]);
            return to_float(from[head * of_head + column]) * (usual - near);
        });
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int byte = 0;
        for (int at = 0; at < TOKENS && first + at < tokens; ++at) {
            if (2.0f * sums[at] < sums[TOKENS]) byte |= 1 << at;
        }
        flags[(i64)blockIdx.y * gridDim.x + blockIdx.x] = (u8)byte;
    }
}

}  // namespace

#define FIND(NAME, TYPE)                                                                        \
    extern "C" __global__ void __launch_bounds__(288) NAME(                                     \
        const TYPE* x, const u16* center, const u16* mean, u8* flags, i64 of_batch, i64 of_head, \
        i64 of_token, int tokens, int heads, int dim, int columns                               \
    ) {                                                                                         \
        find(x, center, mean, flags, of_batch, of_head, of_token, tokens, heads, dim, columns); \
    }
FIND(find_sinks, T)
FIND(find_sinks_f32, float)

// x += sign (mean - center) where flags say so. A block per byte of flags: nearly all are 0.
extern "C" __global__ void __launch_bounds__(256) shift_sinks(
    float* x, const u16* center, const u16* mean, const u8* flags, i64 of_batch, i64 of_head,
    i64 of_token, i64 of_flags, int tokens, int heads, int dim, int columns, float sign
) {
    const int byte = flags[blockIdx.y * of_flags + blockIdx.x], first = blockIdx.x * TOKENS;
    if (byte == 0) return;
    center += (i64)blockIdx.y * heads * dim;
    mean += (i64)blockIdx.y * heads * columns;
    for (int at = 0; at < TOKENS && first + at < tokens; ++at) {
        if (!(byte >> at & 1)) continue;
        float* to = x + blockIdx.y * of_batch + (first + at) * of_token;
        for (int i = threadIdx.x; i < heads * dim; i += blockDim.x) {
            const int head = i / dim, column = i % dim;
            const float usual = half_to_float(mean[head * columns + column]);
            to[head * of_head + column] += sign * (usual - half_to_float(center[i]));
        }
    }
}
