// FP8 to T, bit for bit as checkpoint/storage/fp8.py: e4m3 * scale in float, then one rounding.
#include "weights.cuh"

// Rows are `across` eights long; `height` rows and `width` eights share a scale, `grid` in a row.
extern "C" __global__ void __launch_bounds__(256) fp8_tiles(
    const u8* data, const void* scales, T* out, int eights, int across, int height, int width,
    int grid, int kind, i64 step, Shifts shifts
) {
    data = moved(data, shifts);
    scales = moved((const char*)scales, shifts);
    out += blockIdx.y * step;
    const u32 first = blockIdx.x * EIGHTS * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
        const u32 eight = first + i * blockDim.x;
        if (eight >= (u32)eights) return;
        const u32 row = eight / (u32)across, column = eight - row * across;
        const i64 tile = (i64)(row / (u32)height) * grid + column / (u32)width;
        const float scale = scale_at(scales, tile, kind);
        const u64 bytes = ((const u64*)data)[eight];
        float value[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            value[k] = __fmul_rn(e4m3_to_float((u32)(bytes >> (8 * k)) & 255u), scale);
        }
        store(out + (i64)eight * 8, value);
    }
}
