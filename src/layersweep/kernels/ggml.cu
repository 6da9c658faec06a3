// GGML's blocks to T, bit for bit as checkpoint/storage/ggml_blocks.py: the same products and sums
// in float, then one rounding to T. A thread makes eight neighbours of a row; blocks lie at even
// places, most at multiples of four, so bytes come in words of 2 or 4.
#include "common.cuh"

#define EIGHTS 2  // of a thread
#define ALIKE 32  // weights of one launch, as in weights.py

__device__ __forceinline__ float half_at(const u8* at) { return half_to_float(*(const u16*)at); }

// Eight bytes of a block of BYTES bytes.
template <int BYTES>
__device__ __forceinline__ void bytes_at(const u8* at, u32 (&byte)[8]) {
    if (BYTES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) byte[i] = ((const u32*)at)[i / 4] >> (8 * (i % 4)) & 255u;
    } else if (BYTES % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) byte[i] = (u32)((const u16*)at)[i / 2] >> (8 * (i % 2)) & 255u;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) byte[i] = at[i];
    }
}

// Numbers `at` to `at` + 7 of BITS bits out of runs of RUN bytes: the lowest bits of a run's bytes
// are its first numbers.
template <int BYTES, int RUN, int BITS>
__device__ __forceinline__ void fields_at(const u8* packed, int at, u32 (&number)[8]) {
    const int each = 8 / BITS, run = at / (RUN * each), field = at / RUN % each;
    bytes_at<BYTES>(packed + run * RUN + at % RUN, number);
#pragma unroll
    for (int i = 0; i < 8; ++i) number[i] = number[i] >> (field * BITS) & ((1u << BITS) - 1u);
}
template <int BYTES, int RUN, int BITS>
__device__ __forceinline__ void add_fields(
    const u8* packed, int at, int shift, u32 (&number)[8]
) {
    u32 more[8];
    fields_at<BYTES, RUN, BITS>(packed, at, more);
#pragma unroll
    for (int i = 0; i < 8; ++i) number[i] |= more[i] << shift;
}

// The fifth bits of 32 numbers, lowest first.
__device__ __forceinline__ void add_fifth(const u8* word, int at, u32 (&number)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) number[i] |= ((u32)word[at / 8] >> i & 1u) << 4;
}

__device__ __forceinline__ void scaled(
    float scale, const u32 (&number)[8], int zero, float (&value)[8]
) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = __fmul_rn(scale, (float)((int)number[i] - zero));
}
__device__ __forceinline__ void plus(float offset, float (&value)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = __fadd_rn(value[i], offset);
}

// Sixteen levels of a byte each.
struct Levels {
    u64 low, high;
    __device__ __forceinline__ void look_up(float scale, const u32 (&number)[8], float (&value)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u64 half = number[i] & 8u ? high : low;
            const signed char level = (signed char)(half >> (8 * (number[i] & 7u)));
            value[i] = __fmul_rn(scale, (float)level);
        }
    }
};

struct Q4_0 {
    enum { ELEMENTS = 32, BYTES = 18 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 2, at, number);
        scaled(half_at(block), number, 8, value);
    }
};
struct Q4_1 {
    enum { ELEMENTS = 32, BYTES = 20 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 4, at, number);
        scaled(half_at(block), number, 0, value);
        plus(half_at(block + 2), value);
    }
};
struct Q5_0 {
    enum { ELEMENTS = 32, BYTES = 22 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 6, at, number);
        add_fifth(block + 2, at, number);
        scaled(half_at(block), number, 16, value);
    }
};
struct Q5_1 {
    enum { ELEMENTS = 32, BYTES = 24 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 8, at, number);
        add_fifth(block + 4, at, number);
        scaled(half_at(block), number, 0, value);
        plus(half_at(block + 2), value);
    }
};
struct Q8_0 {
    enum { ELEMENTS = 32, BYTES = 34 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        bytes_at<BYTES>(block + 2 + at, number);
#pragma unroll
        for (int i = 0; i < 8; ++i) number[i] ^= 128u;  // two's complement, counted from -128
        scaled(half_at(block), number, 128, value);
    }
};
struct Q2_K {
    enum { ELEMENTS = 256, BYTES = 84 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 32, 2>(block + 16, at, number);
        const u32 scales = block[at / 16];
        scaled(__fmul_rn(half_at(block + 80), (float)(scales & 15u)), number, 0, value);
        plus(-__fmul_rn(half_at(block + 82), (float)(scales >> 4)), value);
    }
};
struct Q3_K {
    enum { ELEMENTS = 256, BYTES = 110 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 32, 2>(block + 32, at, number);
        add_fields<BYTES, 32, 1>(block, at, 2, number);
        const int index = at / 16;
        const u32 low = (u32)block[96 + index % 8] >> (4 * (index / 8)) & 15u;
        const u32 high = (u32)block[104 + index % 4] >> (2 * (index / 4)) & 3u;
        const float scale = (float)((int)(low | high << 4) - 32);
        scaled(__fmul_rn(half_at(block + 108), scale), number, 4, value);
    }
};
// A scale and a lowest value of 6 bits for each 32 numbers, eight pairs in 12 bytes.
struct Pair {
    float scale, lowest;
    __device__ __forceinline__ Pair(const u8* block, int index) {
        const u8* packed = block + 4;
        u32 first = packed[index % 4], second = packed[4 + index % 4];
        if (index >= 4) {
            const u32 third = packed[8 + index % 4];
            first = (third & 15u) | first >> 6 << 4;
            second = third >> 4 | second >> 6 << 4;
        }
        scale = __fmul_rn(half_at(block), (float)(first & 63u));
        lowest = __fmul_rn(half_at(block + 2), (float)(second & 63u));
    }
};
struct Q4_K {
    enum { ELEMENTS = 256, BYTES = 144 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 32, 4>(block + 16, at, number);
        const Pair pair(block, at / 32);
        scaled(pair.scale, number, 0, value);
        plus(-pair.lowest, value);
    }
};
struct Q5_K {
    enum { ELEMENTS = 256, BYTES = 176 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 32, 4>(block + 48, at, number);
        add_fields<BYTES, 32, 1>(block + 16, at, 4, number);
        const Pair pair(block, at / 32);
        scaled(pair.scale, number, 0, value);
        plus(-pair.lowest, value);
    }
};
struct Q6_K {
    enum { ELEMENTS = 256, BYTES = 210 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 64, 4>(block, at, number);
        add_fields<BYTES, 32, 2>(block + 128, at, 4, number);
        const float scale = (float)(signed char)block[192 + at / 16];
        scaled(__fmul_rn(half_at(block + 208), scale), number, 32, value);
    }
};
// -127 -104 -83 -65 -49 -35 -22 -10 | 1 13 25 38 53 69 89 113
#define IQ4_LEVELS {0xf6eaddcfbfad9881ull, 0x7159453526190d01ull}
struct IQ4_NL {
    enum { ELEMENTS = 32, BYTES = 18 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 2, at, number);
        const Levels levels = IQ4_LEVELS;
        levels.look_up(half_at(block), number, value);
    }
};
struct IQ4_XS {
    enum { ELEMENTS = 256, BYTES = 136 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 8, at, number);
        const int index = at / 32;
        const u32 low = (u32)block[4 + index / 2] >> (4 * (index % 2)) & 15u;
        const u32 high = (u32)block[2 + index / 4] >> (2 * (index % 4)) & 3u;
        const float scale = (float)((int)(low | high << 4) - 32);
        const Levels levels = IQ4_LEVELS;
        levels.look_up(__fmul_rn(half_at(block), scale), number, value);
    }
};
// 0 1 2 3 4 6 8 12 | 0 -1 -2 -3 -4 -6 -8 -12: doubled, for scales that are halved
struct MXFP4 {
    enum { ELEMENTS = 32, BYTES = 17 };
    __device__ static void eight(const u8* block, int at, float (&value)[8]) {
        u32 number[8];
        fields_at<BYTES, 16, 4>(block + 1, at, number);
        const u32 power = block[0];
        const float scale = __uint_as_float(power < 2u ? 0x00200000u << power : (power - 1u) << 23);
        const Levels levels = {0x0c08060403020100ull, 0xf4f8fafcfdfeff00ull};
        levels.look_up(scale, number, value);
    }
};

// Weights that lie alike: number y lies shift[y] bytes after the first.
struct Shifts {
    i64 shift[ALIKE];
};

// Where element `at` of a weight of `columns` columns belongs, whose heads of `head` rows have
// RoPE's pairs side by side: half a head apart.
__device__ __forceinline__ i64 turned_place(i64 at, i64 columns, int head) {
    const i64 row = at / columns, first = row / head * head;
    const int own = (int)(row - first);
    return (first + own % 2 * (head / 2) + own / 2) * columns + at % columns;
}

template <class Q>
__device__ __forceinline__ void dequantize(
    const u8* data, T* out, i64 count, i64 columns, int head, i64 step, const Shifts& shifts
) {
    data += shifts.shift[blockIdx.y];
    out += blockIdx.y * step;
    const i64 first = ((i64)blockIdx.x * EIGHTS * blockDim.x + threadIdx.x) * 8;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
        const i64 at = first + (i64)i * blockDim.x * 8;
        if (at >= count) return;
        float value[8];
        const u64 block = (u64)at / Q::ELEMENTS;
        Q::eight(data + block * Q::BYTES, (int)((u64)at % Q::ELEMENTS), value);
        store(out + (head ? turned_place(at, columns, head) : at), value);
    }
}

#define KERNEL(name, Q)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) ggml_##name(                             \
        const u8* data, T* out, i64 count, i64 columns, int head, i64 step, Shifts shifts      \
    ) {                                                                                        \
        dequantize<Q>(data, out, count, columns, head, step, shifts);                          \
    }
KERNEL(q4_0, Q4_0)
KERNEL(q4_1, Q4_1)
KERNEL(q5_0, Q5_0)
KERNEL(q5_1, Q5_1)
KERNEL(q8_0, Q8_0)
KERNEL(q2_k, Q2_K)
KERNEL(q3_k, Q3_K)
KERNEL(q4_k, Q4_K)
KERNEL(q5_k, Q5_K)
KERNEL(q6_k, Q6_K)
KERNEL(iq4_nl, IQ4_NL)
KERNEL(iq4_xs, IQ4_XS)
KERNEL(mxfp4, MXFP4)
