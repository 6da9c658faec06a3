// Four-bit integers to T, bit for bit as checkpoint/storage/int4.py: (number - zero) * scale in
// float, then one rounding. Words hold eight numbers, the lowest bits first.
#include "weights.cuh"

#define SIDE 64            // of a tile, in elements of the weight
#define STRIDE (SIDE + 2)  // of its rows: an odd number of words, so that columns do not conflict
#define MIDDLE 8           // the zero point where none are stored

// Scales [groups, rows] or [rows, groups], zero points in words. `index`: the group of a column,
// or null, where `group` columns in order share one.
struct Groups {
    const void* scales;
    const u32* zeros;
    const int* index;
    int kind, group, less;
    __device__ __forceinline__ int of(int column) const {
        return index ? index[column] : column / group;
    }
    __device__ __forceinline__ float scale(i64 at) const { return scale_at(scales, at, kind); }
    __device__ __forceinline__ int zero(i64 word, int place) const {
        return zeros ? (int)(zeros[word] >> (4 * place) & 15u) + less : MIDDLE;
    }
};
__device__ __forceinline__ float value_of(u32 word, int place, int zero, float scale) {
    return __fmul_rn((float)((int)(word >> (4 * place) & 15u) - zero), scale);
}
__device__ __forceinline__ Groups groups_of(
    const void* scales, const u32* zeros, const int* index, int kind, int group, int less,
    const Shifts& shifts
) {
    return {
        moved((const char*)scales, shifts), moved(zeros, shifts), moved(index, shifts),
        kind, group, less,
    };
}

// Words along rows; eight rows' zero points share a word.
extern "C" __global__ void __launch_bounds__(256) int4_rows(
    const u32* words, const void* scales, const u32* zeros, const int* index, T* out, int rows,
    int columns, int kind, int group, int groups, int less, i64 step, Shifts shifts
) {
    words = moved(words, shifts);
    const Groups own = groups_of(scales, zeros, index, kind, group, less, shifts);
    out += blockIdx.y * step;
    const u32 across = columns / 8, eights = rows * across;
    const u32 first = blockIdx.x * EIGHTS * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
        const u32 eight = first + i * blockDim.x;
        if (eight >= eights) return;
        const u32 row = eight / across, word = words[eight];
        const int column = (int)(eight - row * across) * 8;
        float value[8], scale = 0.0f;
        int zero = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (k == 0 || index) {  // groups in order hold whole words
                const int at = own.of(column + k);
                scale = own.scale((i64)row * groups + at);
                zero = own.zero((i64)(row / 8) * groups + at, row % 8);
            }
            value[k] = value_of(word, k, zero, scale);
        }
        store(out + (i64)eight * 8, value);
    }
}

// Words that lie turned go through a tile in shared memory, so that both sides meet whole sectors.
__device__ __forceinline__ void write_tile(
    const T (&tile)[SIDE][STRIDE], T* out, int row0, int column0, int rows, int columns
) {
    __syncthreads();
    for (int i = threadIdx.x; i < SIDE * SIDE / 8; i += blockDim.x) {
        const int row = i / (SIDE / 8), column = i % (SIDE / 8) * 8;
        if (row0 + row >= rows || column0 + column >= columns) continue;
        float value[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) value[k] = to_float(tile[row][column + k]);
        store(out + (i64)(row0 + row) * columns + column0 + column, value);
    }
}

// words [columns / 8, rows]: eight columns of a row.
extern "C" __global__ void __launch_bounds__(256) int4_gptq(
    const u32* words, const void* scales, const u32* zeros, const int* index, T* out, int rows,
    int columns, int kind, int group, int groups, int less, i64 step, Shifts shifts
) {
    __shared__ T tile[SIDE][STRIDE];
    words = moved(words, shifts);
    const Groups own = groups_of(scales, zeros, index, kind, group, less, shifts);
    const int across = (columns + SIDE - 1) / SIDE;
    const int row0 = blockIdx.x / across * SIDE, column0 = blockIdx.x % across * SIDE;
    for (int i = threadIdx.x; i < SIDE * SIDE / 8; i += blockDim.x) {
        const int row = i % SIDE, column = i / SIDE * 8;
        if (row0 + row >= rows || column0 + column >= columns) continue;
        const u32 word = words[(i64)(column0 + column) / 8 * rows + row0 + row];
        float scale = 0.0f;
        int zero = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (k == 0 || index) {
                const i64 at = own.of(column0 + column + k);
                scale = own.scale(at * rows + row0 + row);
                zero = own.zero(at * (rows / 8) + (row0 + row) / 8, row % 8);
            }
            tile[row][column + k] = from_float(value_of(word, k, zero, scale));
        }
    }
    write_tile(tile, out + blockIdx.y * step, row0, column0, rows, columns);
}

// words [columns, rows / 8]: eight rows of a column. Row i lies at place i / 2, or 4 + i / 2.
extern "C" __global__ void __launch_bounds__(256) int4_awq(
    const u32* words, const void* scales, const u32* zeros, const int* index, T* out, int rows,
    int columns, int kind, int group, int groups, int less, i64 step, Shifts shifts
) {
    __shared__ T tile[SIDE][STRIDE];
    words = moved(words, shifts);
    const Groups own = groups_of(scales, zeros, index, kind, group, less, shifts);
    const int across = (columns + SIDE - 1) / SIDE;
    const int row0 = blockIdx.x / across * SIDE, column0 = blockIdx.x % across * SIDE;
    for (int i = threadIdx.x; i < SIDE * SIDE / 8; i += blockDim.x) {
        const int row = i % (SIDE / 8) * 8, column = i / (SIDE / 8);
        if (row0 + row >= rows || column0 + column >= columns) continue;
        const i64 at = own.of(column0 + column), eight = (row0 + row) / 8;
        const u32 word = words[(i64)(column0 + column) * (rows / 8) + eight];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int place = k % 2 * 4 + k / 2;
            const float scale = own.scale(at * rows + row0 + row + k);
            const int zero = own.zero(at * (rows / 8) + eight, place);
            tile[row + k][column] = from_float(value_of(word, place, zero, scale));
        }
    }
    write_tile(tile, out + blockIdx.y * step, row0, column0, rows, columns);
}
