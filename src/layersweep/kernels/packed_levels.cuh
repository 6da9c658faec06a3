// From the codes of a token to levels as operands of tensor cores: two half numbers to a word.
#pragma once
#include "trellis_windows.cuh"

SHARED_POOL;

namespace {

constexpr int L = 8;             // bits of a state
constexpr int STEPS = DIM / 16;  // depth of a product over a head, in steps of the tensor cores
constexpr int WIDE = 64;         // numbers of a head that a warp of packed_sums takes

// Alike in all lanes, and the compiler sees that.
__device__ __forceinline__ int warp_id() { return __shfl_sync(ALL, (int)threadIdx.x / 32, 0); }

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

// COUNT numbers of a token from `first` on, a multiple of COUNT: where their bits lie in its codes. The
// stream is a ring: before its first word comes the last.
template <int K, int COUNT>
struct Run {
    using W = Windows<L, K>;
    static constexpr int ROW = DEEP * K, MORE = W::BITS - K;  // bits of a window before its own
    static constexpr int SKIP = COUNT * K % 32 ? 31 : 32 - MORE;  // bits before them in a word, at most
    static constexpr int WORDS = (SKIP + MORE + COUNT * K + 31) / 32;
    int offset[WORDS], shift;

    __device__ __forceinline__ explicit Run(int first) {
        const int start = first * K - MORE;
        shift = start & 31;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const int word = (start >> 5) + i, last = ROW / 4 - 1;
            offset[i] = 4 * (word < 0 || word > last ? last : word);  // beyond: of no window
        }
    }

    // Their levels, in both halves of a word each.
    __device__ __forceinline__ void read(const u8* row, const u32* table, u32 (&found)[COUNT]) const {
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = *(const u32*)(row + offset[i]);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            words[i] = from_bit(words[i], i + 1 < WORDS ? words[i + 1] : 0, shift);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) found[i] = level_at<W::BITS>(words, i * K, table);
    }
};

}  // namespace
