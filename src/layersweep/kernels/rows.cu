// Operations on rows of hidden states; a row's result depends on that row alone. Row lengths are
// multiples of 8 and rows lie at 16-byte-aligned addresses.
#include "common.cuh"

// out[i] = weight * T(x[r] / rms(x[r])), r = rows[i] or i; or, OFFSET,
// T((offset + weight) * x[r] / rms(x[r])). One block per row, which may be out[i] itself.
template <bool OFFSET>
__device__ void norm_row(
    const T* x, const T* weight, const i64* rows, T* out, i64 stride, int width, float eps,
    float offset
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
        for (int i = 0; i < 8; ++i) {
            if (OFFSET) value[i] = value[i] * scale * (offset + share[i]);
            else value[i] = share[i] * rounded(value[i] * scale);
        }
        store(out + at, value);
    }
}
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    const T* x, const T* weight, const i64* rows, T* out, i64 stride, int width, float eps
) {
    norm_row<false>(x, weight, rows, out, stride, width, eps, 0.0f);
}
extern "C" __global__ void __launch_bounds__(256) rms_norm_offset(
    const T* x, const T* weight, const i64* rows, T* out, i64 stride, int width, float eps,
    float offset
) {
    norm_row<true>(x, weight, rows, out, stride, width, eps, offset);
}

// The same for rows of up to 256 numbers, heads for example: a warp each.
extern "C" __global__ void __launch_bounds__(256) rms_norm_narrow(
    const T* x, const T* weight, const i64* rows, T* out, i64 stride, int width, float eps,
    float offset, int count
) {
    const int index = (int)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int own = index < count ? index : count - 1;  // the last warps work for nothing
    const T* row = x + (rows ? rows[own] : (i64)own) * stride;
    const int at = 8 * (threadIdx.x % 32);
    float value[8], sum = 0.0f;
    if (at < width) {
        load(row + at, value);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += value[i] * value[i];
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (at >= width || index >= count) return;
    const float scale = rsqrtf(divide_by_number(sum, (float)width) + eps);
    float share[8];
    load(weight + at, share);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float scaled = value[i] * scale;
        value[i] = offset != 0.0f ? scaled * (offset + share[i]) : share[i] * rounded(scaled);
    }
    store(out + (i64)own * width + at, value);
}

// The activations of maths.glu_, in its order of roundings; NaN stays NaN.
enum Act { silu, gelu_tanh, gelu, relu2, swiglu_clamped };

template <Act ACT>
__device__ __forceinline__ float gated(float gate, float up, float limit) {
    if (ACT == silu) return rounded(gate / (1.0f + expf(-gate))) * up;
    if (ACT == gelu_tanh) {
        const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
        return rounded(0.5f * gate * (1.0f + tanhf(inner))) * up;
    }
    if (ACT == gelu) return rounded(0.5f * gate * (1.0f + erff(gate * 0.7071067812f))) * up;
    if (ACT == relu2) {
        const float positive = gate <= 0.0f ? 0.0f : gate;
        return rounded(positive * positive) * up;
    }
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    const float slope = rounded(gate * 1.702f);
    const float open = rounded(gate * rounded(1.0f / (1.0f + expf(-slope))));
    return rounded(up + 1.0f) * open;
}

// gate = T(T(act(gate)) * up) in rows of [gate | up]; a block takes 8 blockDim columns of a row.
template <Act ACT>
__device__ void glu_halves(T* gate_up, int inner, float limit) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= inner) return;
    T* row = gate_up + (i64)blockIdx.x * 2 * inner + at;
    float gate[8], up[8];
    load(row, gate);
    load(row + inner, up);
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = gated<ACT>(gate[i], up[i], limit);
    store(row, gate);
}

// The same in rows of [gate, up, gate, up ...]. One block per row: it writes where it has read
// in this step or an earlier one, for what it writes lies in the first half.
template <Act ACT>
__device__ void glu_pairs(T* gate_up, int inner, float limit) {
    T* row = gate_up + (i64)blockIdx.x * 2 * inner;
    const int step = 8 * blockDim.x;
    for (int start = 0; start < inner; start += step) {
        const int at = start + 8 * threadIdx.x;
        float both[2][8], result[8];
        if (at < inner) {
            load(row + 2 * at, both[0]);
            load(row + 2 * at + 8, both[1]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int gate = 2 * i % 8;
                result[i] = gated<ACT>(both[i / 4][gate], both[i / 4][gate + 1], limit);
            }
        }
        __syncthreads();
        if (at < inner) store(row + at, result);
    }
}

#define GLU_KERNELS(ACT)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) glu_##ACT(                                \
        T* gate_up, int inner, float limit                                                      \
    ) {                                                                                         \
        glu_halves<ACT>(gate_up, inner, limit);                                                 \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) glu_pairs_##ACT(                          \
        T* gate_up, int inner, float limit                                                      \
    ) {                                                                                         \
        glu_pairs<ACT>(gate_up, inner, limit);                                                  \
    }
GLU_KERNELS(silu)
GLU_KERNELS(gelu_tanh)
GLU_KERNELS(gelu)
GLU_KERNELS(relu2)
GLU_KERNELS(swiglu_clamped)

// update[rows[i]] += T(y[i] * weight[i]); rows are unique, so no two blocks meet.
extern "C" __global__ void __launch_bounds__(256) add_rows(
    T* update, const i64* rows, const T* y, const float* weight, int width
) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= width) return;
    T* row = update + rows[blockIdx.x] * width + at;
    const float share = weight[blockIdx.x];
    float sum[8], add[8];
    load(row, sum);
    load(y + (i64)blockIdx.x * width + at, add);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += rounded(add[i] * share);
    store(row, sum);
}

// update[n] += T(y[p - first] * weight[p - first]) for each p of places[n] that is in range, in
// their order: as add_rows would, once per k. One block row per n, so no two blocks meet.
extern "C" __global__ void __launch_bounds__(256) add_places(
    T* update, const int* places, const T* y, const float* weight, int width, int first, int count,
    int per_row
) {
    const int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
    if (at >= width) return;
    T* row = update + (i64)blockIdx.x * width + at;
    float sum[8], add[8];
    bool read = false;
    for (int k = 0; k < per_row; ++k) {
        const int place = places[(i64)blockIdx.x * per_row + k] - first;
        if (place < 0 || place >= count) continue;
        if (!read) load(row, sum);
        read = true;
        load(y + (i64)place * width + at, add);
        const float share = weight[place];
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = rounded(sum[i] + rounded(add[i] * share));
    }
    if (read) store(row, sum);
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
