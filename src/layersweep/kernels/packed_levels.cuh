// From the codes of a token to levels as operands of tensor cores: two half numbers to a word.
#pragma once
#include "trellis_windows.cuh"

SHARED_POOL;

namespace {

constexpr int L = 8;             // bits of a state
constexpr int STEPS = DIM / 16;  // depth of a product over a head, in steps of the tensor cores
constexpr int WIDE = 64;         // numbers of a head that a warp of packed_sums takes

__device__ __forceinline__ u32 twice(float value) { return float_to_half(value) * 0x10001u; }
// The first half of a, the second of b.
__device__ __forceinline__ u32 two(u32 a, u32 b) { return choose(0xffffu, a, b); }
__device__ __forceinline__ u32 half_pair(float low, float high) {
    return float_to_half(low) | (u32)float_to_half(high) << 16;
}

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
    place = (place & ((1u << BITS) - 1) << 7) | lane_id() * 4;
    return *(const u32*)((const u8*)table + place);
}

// COUNT levels of one token, from number `first` on, in both halves of a word each. The stream is a
// ring: before its first word comes the last.
template <int K, int COUNT>
__device__ __forceinline__ void read_levels(const u8* codes, int first, const u32* table, u32 (&found)[COUNT]) {
    using W = Windows<L, K>;
    constexpr int ALL_WORDS = DIM * K / 32, MORE = W::BITS - K;  // bits of a window before its own
    constexpr int WORDS = (31 + COUNT * K + MORE) / 32 + 1;
    const u32* row = (const u32*)codes;
    const int start = first * K - MORE, word = start >> 5;
    u32 words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const int at = word + i < ALL_WORDS ? word + i : ALL_WORDS - 1;  // beyond: of no window
        words[i] = row[at < 0 ? ALL_WORDS - 1 : at];
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = from_bit(words[i], i + 1 < WORDS ? words[i + 1] : 0, start & 31);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) found[i] = level_at<W::BITS>(words, i * K, table);
}

}  // namespace
