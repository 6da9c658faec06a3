// Where the codes of a vector's elements lie: a state is the last L bits of the stream of K-bit symbols,
// which is a ring. See trellis.cu.
#pragma once
#include "rotation.cuh"

namespace {

template <int L, int K>
struct Windows {
    static constexpr int SYMBOLS = (L + K - 1) / K, BITS = SYMBOLS * K;  // that make a state
    static constexpr int ROW = DEEP * K;                                // bytes of a vector
    static constexpr int WORDS = (ROW + 3) / 4;

    // The state of BITS bits as they are stored: the newest symbol is the highest.
    __device__ static constexpr int state_of(int window) {
        int state = 0;
        for (int i = 0; i < SYMBOLS; ++i) state = state << K | (window >> i * K & ((1 << K) - 1));
        return state & ((1 << L) - 1);
    }

    // The vector's last 4 bytes, then all of it.
    __device__ static __forceinline__ void load_codes(const u8* codes, u32 (&words)[WORDS + 3]) {
        if constexpr (ROW % 16 == 0) {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 four = *(const uint4*)(codes + 4 * i);
                words[i + 1] = four.x;
                words[i + 2] = four.y;
                words[i + 3] = four.z;
                words[i + 4] = four.w;
            }
        } else if constexpr (ROW % 4 == 0) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) words[i + 1] = *(const u32*)(codes + 4 * i);
        } else {
#pragma unroll
            for (int i = 0; i <= WORDS; ++i) {
                words[i] = 0;
                for (int b = 0; b < 4; ++b) {
                    words[i] |= (u32)codes[(4 * i + b - 4 + 4 * ROW) % ROW] << 8 * b;
                }
            }
        }
        if constexpr (ROW % 4 == 0) words[0] = words[WORDS];
        words[WORDS + 1] = words[WORDS + 2] = 0;
    }

    // The window that ends with element 8 e + lane.
    __device__ static __forceinline__ u32 window(const u32 (&words)[WORDS + 3], int e, int lane) {
        const int start = 32 + 8 * K * e - (SYMBOLS - 1) * K, at = start / 32, shift = start % 32;
        u64 bits = (u64)words[at + 1] << 32 | words[at];
        int skip = shift + lane * K;
        if (shift + 7 * K + BITS > 64) {
            bits = bits >> shift | (u64)words[at + 2] << (63 - shift) << 1;
            skip = lane * K;
        }
        return (u32)(bits >> skip) & ((1u << BITS) - 1);
    }
};

}  // namespace
