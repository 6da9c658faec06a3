// Operations on rows of hidden states; a row's result depends on that row alone. Row lengths are
// multiples of 8 and rows lie at 16-byte-aligned addresses.
#include "common.cuh"

// out[i] = weight * T(x[r] / rms(x[r])), r = rows[i] or i. One block per row.
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const T* x, const T* weight, const i64* rows, T* out, i64 stride, int width, float eps
) {
    const T* row = x + (rows ? rows[blockIdx.x] : (i64)blockIdx.x) * stride;
    out += (i64)blockIdx.x * width;
    float value[8], sum = 0.0f;
    for (int at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) {
        load(row + at, value);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += value[i] * value[i];
    }
    sum = reduce_block(sum, 0.0f, Add());
    const float scale = rsqrtf(divide_by_number(sum, (float)width) + eps);
    // The row is read again, from the cache: 16 more registers per thread would not pay.
    for (int at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) {
        float share[8];
        load(row + at, value);
        load(weight + at, share);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = share[i] * rounded(value[i] * scale);
        store(out + at, value);
    }
}

// gate = T(T(silu(gate)) * up) in rows of [gate | up]; a block takes 8 blockDim columns of a row.
extern "C" __global__ void __launch_bounds__(256) swiglu(T* gate_up, int inner) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= inner) return;
    T* row = gate_up + (i64)blockIdx.x * 2 * inner + at;
    float gate[8], up[8];
    load(row, gate);
    load(row + inner, up);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        gate[i] = rounded(gate[i] / (1.0f + expf(-gate[i]))) * up[i];
    }
    store(row, gate);
}

template <class Weight>
__device__ void add_row(T* update, const i64* rows, const T* y, const Weight* weight, int width) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= width) return;
    T* row = update + rows[blockIdx.x] * width + at;
    const float share = to_float(weight[blockIdx.x]);
    float sum[8], add[8];
    load(row, sum);
    load(y + (i64)blockIdx.x * width + at, add);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += rounded(add[i] * share);
    store(row, sum);
}

// update[rows[i]] += T(y[i] * weight[i]); rows are unique, so no two blocks meet.
extern "C" __global__ void __launch_bounds__(256) add_rows(
    T* update, const i64* rows, const T* y, const T* weight, int width
) {
    add_row(update, rows, y, weight, width);
}
extern "C" __global__ void __launch_bounds__(256) add_rows_f32(
    T* update, const i64* rows, const T* y, const float* weight, int width
) {
    add_row(update, rows, y, weight, width);
}

// hidden += update; update = 0; the first layer after which a unit was not finite is kept.
extern "C" __global__ void __launch_bounds__(256) leave_layer(
    T* hidden, T* update, const int* unit, int* first_bad, int width, int layer
) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= width) return;
    const i64 start = (i64)blockIdx.x * width + at;
    float sum[8], add[8];
    load(hidden + start, sum);
    load(update + start, add);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sum[i] = rounded(sum[i] + add[i]);
        add[i] = 0.0f;
        finite = finite && is_finite(sum[i]);
    }
    store(hidden + start, sum);
    store(update + start, add);
    if (!finite) atomicMin(first_bad + unit[blockIdx.x], layer);
}
