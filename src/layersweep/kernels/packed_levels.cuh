// From the codes of a token to levels as operands of tensor cores: two half numbers to a word.
#pragma once
#include "trellis_windows.cuh"

namespace {

constexpr int L = 8;             // bits of a state
constexpr int STEPS = DIM / 16;  // depth of a product over a head, in steps of the tensor cores
constexpr int WIDE = 64;         // numbers of a head that a warp of packed_sums takes

__device__ __forceinline__ u32 twice(float value) { return float_to_half(value) * 0x10001u; }
// The first half of a, the second of b.
__device__ __forceinline__ u32 two(u32 a, u32 b) { return choose(0xffffu, a, b); }
__device__ __forceinline__ u32 half_pair(float a, float b) { return float_to_half(a) | (u32)float_to_half(b) << 16; }

// The level of every window, in both halves of a word, once for each lane: a row is 128 bytes, so 32
// look-ups at random places touch 32 banks.
template <int K>
__device__ __forceinline__ u32* fill_levels(u32* table, const float* levels) {
    using W = Windows<L, K>;
    for (int i = threadIdx.x; i < 32 << W::BITS; i += blockDim.x) {
        table[i] = twice(levels[W::state_of(i / 32)]);
    }
    return table + (32 << W::BITS);
}

// The level whose window begins at bit `start`, a constant once loops are unrolled. Its place in the
// table is the window, shifted to the bytes of a row.
template <int BITS>
__device__ __forceinline__ u32 level_at(const u32* words, int start, const u32* table) {
    const int word = start / 32, bit = start % 32, shift = bit - 7;
    u32 place;
    if (bit + BITS > 32) place = from_bit(words[word], words[word + 1], shift);
    else place = shift < 0 ? words[word] << -shift : words[word] >> shift;
    place = (place & ((1u << BITS) - 1) << 7) | threadIdx.x % 32 * 4;
    return *(const u32*)((const u8*)table + place);
}

template <int COUNT>
__device__ __forceinline__ void shift_words(u32 (&words)[COUNT], int bits) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i] = from_bit(words[i], i + 1 < COUNT ? words[i + 1] : 0, bits);
}

// One key for a product over the head: of step s, numbers 16 s + 2 c, + 1 in pairs[s][0] and + 8, + 9 in
// pairs[s][1], where c counts the four lanes that share the key.
template <int K>
__device__ __forceinline__ void read_key(const u8* codes, const u32* table, u32 (&pairs)[STEPS][2]) {
    using W = Windows<L, K>;
    u32 words[W::WORDS + 3];
    W::load_codes(codes, words);
    shift_words(words, threadIdx.x % 4 * 2 * K);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int start = 32 + (16 * s + 8 * half - W::SYMBOLS + 1) * K;
            const u32 one = level_at<W::BITS>(words, start, table);
            pairs[s][half] = two(one, level_at<W::BITS>(words, start + K, table));
        }
    }
}

// WIDE numbers of one token, from `slice` x WIDE on: the lane's 8 n + r-th in found[n], r = lane / 4.
template <int K>
__device__ __forceinline__ void read_slice(const u8* codes, int slice, const u32* table, u32 (&found)[WIDE / 8]) {
    using W = Windows<L, K>;
    constexpr int COUNT = WIDE * K / 32, ALL_WORDS = DIM * K / 32;
    const u32* from = (const u32*)codes + slice * COUNT;
    u32 words[COUNT + 2];
    words[0] = slice ? from[-1] : from[ALL_WORDS - 1];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) words[i + 1] = from[i];
    words[COUNT + 1] = 0;
    shift_words(words, threadIdx.x % 32 / 4 * K);
#pragma unroll
    for (int n = 0; n < WIDE / 8; ++n) {
        found[n] = level_at<W::BITS>(words, 32 + (8 * n - W::SYMBOLS + 1) * K, table);
    }
}

}  // namespace
