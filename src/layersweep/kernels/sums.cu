// Channel means and levels. Sums over tokens round as rotate.add_rows rounds them: it folds halves
// onto each other, c rows to c / 2, and adds a row that is left over to the first. So row i of what
// k foldings have left is the sum of a subtree of 2^k rows, which a thread adds up by itself, one
// column each; only row 0 takes in what was left over. Foldings of fewer than LAST rows meet in
// shared memory.
#include "common.cuh"

#define COLUMNS 32  // of a block, one for each lane
#define WARPS 8
#define LAST 64
#define DEEPEST 16  // foldings before that

namespace {

struct Sums {
    float plain, squares;
    __device__ __forceinline__ void operator+=(Sums other) {
        plain += other.plain;
        squares += other.squares;
    }
};

template <class X>
struct Column {
    const X* first;
    i64 stride;
    int tokens;

    __device__ __forceinline__ int rows_left(int foldings) const { return tokens >> foldings; }

    // Row `row` of what `foldings` have left. Not row 0 below a row that was left over.
    __device__ Sums row_of(int row, int foldings) const {
        const int leaves = 1 << foldings;
        Sums waiting[DEEPEST], sum = {0.0f, 0.0f};
        for (int batch = 0; 8 * batch < leaves; ++batch) {  // bit j: the half of folding j
            int at = row;
            for (int j = 0; j + 3 < foldings; ++j) at += (batch >> j & 1) * rows_left(j + 4);
            Sums of[8];
#pragma unroll
            for (int leaf = 0; leaf < 8; ++leaf) {
                if (leaf >= leaves) break;
                int on = at + (leaf & 1) * rows_left(1);
                on += (leaf >> 1 & 1) * rows_left(2) + (leaf >> 2) * rows_left(3);
                const float value = to_float(first[on * stride]);
                of[leaf] = {value, value * value};
            }
#pragma unroll
            for (int apart = 1; apart < 8; apart *= 2) {
#pragma unroll
                for (int leaf = 0; leaf < 8; leaf += 2 * apart) {
                    if (leaf + apart < leaves) of[leaf] += of[leaf + apart];
                }
            }
            sum = of[0];
#pragma unroll
            for (int level = 0; level < DEEPEST; ++level) {
                if (!(batch >> level & 1)) {
                    waiting[level] = sum;
                    break;
                }
                sum += waiting[level];
            }
        }
        return sum;
    }
};

template <class X>
__device__ void sum_columns(
    const X* x, float* out, i64 of_batch, i64 of_head, i64 of_token, int tokens, int dim
) {
    __shared__ Sums rows[LAST][COLUMNS], right[DEEPEST][COLUMNS], over[DEEPEST][COLUMNS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = blockIdx.x * COLUMNS + lane;
    x += blockIdx.z * of_batch + blockIdx.y * of_head;
    x += mine < dim ? mine : dim - 1;  // nobody leaves before the barriers
    const Column<X> column = {x, of_token, tokens};
    int foldings = 0;
    while (column.rows_left(foldings) >= LAST) ++foldings;
    const int last = column.rows_left(foldings);
    for (int task = warp; task <= last; task += WARPS) {
        if (task == 0) {  // row 0 in its parts: what is folded onto it
            rows[0][lane] = column.row_of(0, 0);
            for (int k = 0; k < foldings; ++k) {
                right[k][lane] = column.row_of(column.rows_left(k + 1), k);
            }
        } else if (task == last) {  // and what is left over
            for (int k = 0; k < foldings; ++k) {
                const int left = column.rows_left(k);
                if (left % 2) over[k][lane] = column.row_of(left - 1, k);
            }
        } else {
            rows[task][lane] = column.row_of(task, foldings);
        }
    }
    __syncthreads();
    if (warp == 0) {
        Sums sum = rows[0][lane];
        for (int k = 0; k < foldings; ++k) {
            sum += right[k][lane];
            if (column.rows_left(k) % 2) sum += over[k][lane];
        }
        rows[0][lane] = sum;
    }
    for (int count = last; count > 1; count /= 2) {
        const int half = count / 2;
        __syncthreads();
        for (int row = warp; row < half; row += WARPS) {
            Sums sum = rows[row][lane];
            sum += rows[row + half][lane];
            if (row == 0 && count % 2) sum += rows[count - 1][lane];
            rows[row][lane] = sum;
        }
    }
    if (warp == 0 && mine < dim) {  // row 0 is this warp's own since the first barrier
        out += ((i64)blockIdx.z * gridDim.y + blockIdx.y) * dim + mine;
        out[0] = rows[0][lane].plain;
        out[(i64)gridDim.z * gridDim.y * dim] = rows[0][lane].squares;
    }
}

}  // namespace

// x [B, H, T, D] -> out [2, B, H, D]: sums of x and of its squares along T.
extern "C" __global__ void __launch_bounds__(256) column_sums(
    const T* x, float* out, i64 of_batch, i64 of_head, i64 of_token, int tokens, int dim
) {
    sum_columns(x, out, of_batch, of_head, of_token, tokens, dim);
}
extern "C" __global__ void __launch_bounds__(256) column_sums_f32(
    const float* x, float* out, i64 of_batch, i64 of_head, i64 of_token, int tokens, int dim
) {
    sum_columns(x, out, of_batch, of_head, of_token, tokens, dim);
}

// One row of sums [2, ROWS, D] -> means and the level, half [D + 1]; a block of 256 threads each,
// D up to 256. As kv.means.mean_for.
extern "C" __global__ void __launch_bounds__(256) mean_and_level(
    const float* sums, u16* out, int tokens, int dim
) {
    __shared__ float square[256], power[256];
    const int at = threadIdx.x;
    const i64 rows = gridDim.x, row = blockIdx.x;
    out += row * (dim + 1);
    if (at < dim) {
        const float mean = divide_by_number(sums[row * dim + at], (float)tokens);
        out[at] = float_to_half(mean);
        square[at] = mean * mean;
        power[at] = sums[(rows + row) * dim + at];
    }
    for (int count = dim; count > 1; count /= 2) {  // rotate.add_rows
        const int half = count / 2;
        __syncthreads();
        if (at < half) {
            square[at] += square[at + half];
            power[at] += power[at + half];
            if (at == 0 && count % 2) {
                square[0] += square[count - 1];
                power[0] += power[count - 1];
            }
        }
    }
    if (at == 0) {
        const float whole = divide_by_number(power[0], (float)tokens), least = whole / 256.0f;
        const float around = whole - square[0];
        float level = around != around || around > least ? around : least;  // NaN stays
        level = sqrtf(divide_by_number(level, (float)dim));
        if (level < 6.103515625e-05f) level = 6.103515625e-05f;  // half's smallest normal number
        out[dim] = float_to_half(level);
    }
}
