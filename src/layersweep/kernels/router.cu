// The experts of each row and their weights (choose), and the rows of each expert: a counting sort
// in two launches. count_rows counts the rows of every expert, block by block; sort_rows adds up
// what the blocks before it counted, so it knows where its own rows go. Integers alone are added,
// in any order, and rows keep theirs: the same ids are sorted alike in every run.
//
// DIM is the number of experts.
#include "common.cuh"

constexpr int EXPERTS = DIM, SLOTS = (EXPERTS + 31) / 32, THREADS = 256, WARPS = THREADS / 32;

// Softmax of `count` numbers that a warp holds, number i in slot i / 32 of lane i % 32. It adds in
// the order of torch's kernel for so few numbers.
template <int HELD>
__device__ __forceinline__ void softmax(float (&x)[HELD], int count) {
    const int lane = threadIdx.x % 32;
    float top = __uint_as_float(0xff800000u), total = 0.0f;  // -inf
#pragma unroll
    for (int at = 0; at < HELD; ++at) {
        if (32 * at + lane < count) top = Max()(top, x[at]);
    }
    top = reduce_warp(top, Max());  // may pass over NaN, which the sum does not
#pragma unroll
    for (int at = 0; at < HELD; ++at) {
        x[at] = 32 * at + lane < count ? expf(x[at] - top) : 0.0f;
        total += x[at];
    }
    total = reduce_warp(total, Add());
#pragma unroll
    for (int at = 0; at < HELD; ++at) x[at] /= total;
}

// See Kernels.choose_experts. A warp takes a row; lane k has its k-th best expert in the end.
template <class Logit>
__device__ __forceinline__ void choose(
    const Logit* logits, const float* bias, float* weights, int* chosen, int rows, int top_k,
    int over_chosen, int normalize, int rounds, float scale
) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    float score[SLOTS];
#pragma unroll
    for (int at = 0; at < SLOTS; ++at) {
        const int expert = 32 * at + lane;
        score[at] = expert < EXPERTS ? to_float(logits[(i64)row * EXPERTS + expert]) : 0.0f;
        if (bias && expert < EXPERTS) score[at] += bias[expert];
    }
    if (!over_chosen) softmax(score, EXPERTS);
    u64 rank[SLOTS], mine = 0;  // 0: not an expert, or taken
#pragma unroll
    for (int at = 0; at < SLOTS; ++at) {
        const int expert = 32 * at + lane;
        rank[at] = expert < EXPERTS ? rank_of(score[at], expert) : 0;
    }
    for (int k = 0; k < top_k; ++k) {
        u64 best = 0;
#pragma unroll
        for (int at = 0; at < SLOTS; ++at) best = Max()(best, rank[at]);
        best = reduce_warp(best, Max());
#pragma unroll
        for (int at = 0; at < SLOTS; ++at) {
            if (rank[at] == best) rank[at] = 0;
        }
        if (lane == k) mine = best;
    }
    float weight[1] = {lane < top_k ? ranked_value(mine) : 0.0f};
    if (over_chosen) {
        softmax(weight, top_k);
    } else if (normalize) {
        float total = weight[0];  // neighbours first, as torch adds so few on a GPU
        for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        weight[0] /= total;  // not 0: the best of a softmax is at least 1 / experts
    }
    if (lane >= top_k) return;
    weight[0] *= scale;
    weights[(i64)row * top_k + lane] = rounds ? rounded(weight[0]) : weight[0];
    chosen[(i64)row * top_k + lane] = ranked_index(mine);
}

extern "C" __global__ void __launch_bounds__(THREADS) choose_experts(
    const T* logits, const float* bias, float* weights, int* chosen, int rows, int top_k,
    int over_chosen, int normalize, int rounds, float scale
) {
    choose(logits, bias, weights, chosen, rows, top_k, over_chosen, normalize, rounds, scale);
}
extern "C" __global__ void __launch_bounds__(THREADS) choose_experts_f32(
    const float* logits, const float* bias, float* weights, int* chosen, int rows, int top_k,
    int over_chosen, int normalize, int rounds, float scale
) {
    choose(logits, bias, weights, chosen, rows, top_k, over_chosen, normalize, rounds, scale);
}

// counts[block, e]: how many of a block's THREADS rows go to expert e. experts [N, K].
extern "C" __global__ void __launch_bounds__(THREADS) count_rows(
    const int* experts, int* counts, int rows, int top_k
) {
    __shared__ int count[EXPERTS];
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) count[e] = 0;
    __syncthreads();
    const int first = blockIdx.x * THREADS, own = Min()(THREADS, rows - first);
    experts += (i64)first * top_k;
    for (int at = threadIdx.x; at < own * top_k; at += THREADS) atomicAdd(count + experts[at], 1);
    __syncthreads();
    counts += (i64)blockIdx.x * EXPERTS;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) counts[e] = count[e];
}

// See Kernels.sort_by_expert. A thread takes a row, or an expert; a row's experts are distinct.
extern "C" __global__ void __launch_bounds__(THREADS) sort_rows(
    const int* experts, const float* weights, const int* counts, i64* by_expert,
    float* weight_by_expert, i64* ends, int* places, int rows, int top_k
) {
    __shared__ u32 goes[WARPS][EXPERTS];   // which rows of a warp go to an expert, a bit each
    __shared__ int place[WARPS][EXPERTS];  // of the first of them
    __shared__ int total[EXPERTS], before[EXPERTS];  // rows of all blocks, of those before
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = blockIdx.x, blocks = gridDim.x;
    const int row = own * THREADS + threadIdx.x, count = row < rows ? top_k : 0;
    experts += (i64)row * top_k, weights += (i64)row * top_k, places += (i64)row * top_k;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        total[e] = before[e] = 0;
        for (int w = 0; w < WARPS; ++w) goes[w][e] = 0;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < blocks * EXPERTS; at += THREADS) {
        const int found = counts[at], e = at % EXPERTS;
        atomicAdd(total + e, found);
        if (at < own * EXPERTS) atomicAdd(before + e, found);
    }
    for (int k = 0; k < count; ++k) atomicOr(&goes[warp][experts[k]], 1u << lane);
    __syncthreads();
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) {
        int start = 0;
        for (int other = 0; other < e; ++other) start += total[other];
        if (own == 0) ends[e] = start + total[e];
        start += before[e];
        for (int w = 0; w < WARPS; ++w) {
            place[w][e] = start;
            start += __popc(goes[w][e]);
        }
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
        const int e = experts[k];
        const int at = place[warp][e] + __popc(goes[warp][e] & ((1u << lane) - 1));
        by_expert[at] = row;
        weight_by_expert[at] = weights[k];
        int lower = 0;  // the row's places ascend with its experts
        for (int other = 0; other < top_k; ++other) lower += experts[other] < e;
        places[lower] = at;
    }
}
