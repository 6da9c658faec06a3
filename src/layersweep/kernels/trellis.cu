// Search and decoder of a tail-biting bitshift trellis code: element t is TABLE[s_t] with
// s_t = (s_(t-1) << K | b_t) mod 2^L and s_(-1) = s_(D-1); the K-bit symbols b are what is stored.
#include "rotation.cuh"

#define WARPS 2  // of a block of the search: 48 KB hold L = 10 and 256 elements, too

namespace {

// Viterbi. A lane keeps 2^R of a vector's states for good, so that their TABLE values stay in
// registers: bits of a state are, from the top, K bits `high` and X bits `low` of the register's
// number around the bits `row` of the lane:
//     state = high << (L - K) | row << X | low
// The 2^K states that lead to one group g = state mod 2^(L-K) differ in `high` alone: their
// minimum is the lane's own affair. It goes through shared memory to where its successors
// g << K | b live. Row bits are put into lane bits (PLACES: from the top row bit on, one hex
// digit each, from the right) such that a lane finds four minima side by side, and such that
// neither stores nor loads of a phase of lanes meet in a bank. Left-over lane bits: more vectors.
template <bool WIDE>
struct Eight {
    typedef u32 Codes;
};
template <>
struct Eight<true> {
    typedef u64 Codes;
};
template <int L, int K>
struct Search {
    typedef typename Eight<(K > 4)>::Codes Codes;  // holds 8 codes
    static constexpr int R = K > 4 ? K : L == 8 ? 4 : 5, X = R - K, ROW_BITS = L - R;
    static constexpr int STATES = 1 << R, LOW = 1 << X, HIGH = 1 << K, ROWS = 1 << ROW_BITS;
    static constexpr u32 PLACES = ROW_BITS == 5 ? (K == 3   ? 0x24310
                                                   : K == 4 ? 0x42130
                                                            : 0x43210)
                                  : K == 3      ? 0x4130
                                                : 0x4310;
    static constexpr int VECTORS = WARPS * 32 / ROWS;  // of a block
    static constexpr int GROUP_MASK = (1 << (L - K)) - 1;
    static constexpr int ENTRY = K * LOW <= 8 ? 8 : 16;  // bits: decisions of a lane in a step
    static constexpr int PER_WORD = 32 / ENTRY;
    static constexpr int WORDS = DIM / PER_WORD;  // of a lane in a pass
    static_assert(L - K >= X && K * LOW <= ENTRY, "too few registers");

    __device__ static constexpr int place(int row) {
        int lane = 0;
        for (int i = 0; i < ROW_BITS; ++i) {
            lane |= (row >> (ROW_BITS - 1 - i) & 1) << (PLACES >> 4 * i & 15);
        }
        return lane;
    }
    // Of the minimum of a group, in words; the lane bits of the vector come on top.
    __device__ static constexpr int address(int group) {
        return (group & (LOW - 1)) * 32 + place(group >> X);
    }
    __device__ static constexpr int state_of(int reg) { return reg >> X << (L - K) | (reg & (LOW - 1)); }

    int lane, row, vector;  // vector: in its warp
    float table[STATES], cost[STATES];
    float* minima;       // of the warp, two buffers of 32 LOW
    const float* found;  // what this lane's states need, in the first of them
    u32* trail;          // decisions of the warp: WORDS rows of 32 words, ordered by vector, row

    __device__ __forceinline__ Search(const float* values, float* minima_of_warp, u32* trail_of_warp) {
        lane = threadIdx.x % 32;
        row = vector = 0;
        int rest = lane, bit = 0;
        for (int i = 0; i < ROW_BITS; ++i) {
            const int at = PLACES >> 4 * i & 15;
            row |= (lane >> at & 1) << (ROW_BITS - 1 - i);
            rest &= ~(1 << at);
        }
        for (int at = 0; at < 5; ++at) {
            bool taken = false;
            for (int i = 0; i < ROW_BITS; ++i) taken = taken || (PLACES >> 4 * i & 15) == at;
            if (!taken) vector |= (lane >> at & 1) << bit++;
        }
        minima = minima_of_warp;
        found = minima_of_warp + rest + address((row << X) >> K);
        trail = trail_of_warp;
#pragma unroll
        for (int r = 0; r < STATES; ++r) table[r] = values[state_of(r) | row << X];
    }

    // One element. `shift`: where its decisions start in the word that collects them.
    template <bool RECORD>
    __device__ __forceinline__ void step(float u, int buffer, u32& word, int shift) {
#pragma unroll
        for (int low = 0; low < LOW; ++low) {
            float best[HIGH];
            u32 which[HIGH];
#pragma unroll
            for (int high = 0; high < HIGH; ++high) {
                best[high] = cost[high << X | low];
                which[high] = (u32)high << (shift + K * low);
            }
#pragma unroll
            for (int apart = 1; apart < HIGH; apart *= 2) {
#pragma unroll
                for (int high = 0; high < HIGH; high += 2 * apart) {
                    if (RECORD && best[high + apart] < best[high]) which[high] = which[high + apart];
                    best[high] = fminf(best[high], best[high + apart]);
                }
            }
            minima[buffer * 32 * LOW + low * 32 + lane] = best[0];
            if (RECORD) word |= which[0];
        }
        __syncwarp();  // two buffers in turn: one barrier is enough
#pragma unroll
        for (int r = 0; r < STATES; ++r) {
            const int at = buffer * 32 * LOW + address(state_of(r) >> K);
            float least;  // states of one group load the same words: the compiler loads them once
            if (K == 1) {
                const u64 two = *(const u64*)(found + (at & ~1));
                least = __uint_as_float((u32)(at & 1 ? two >> 32 : two));
            } else {
                const uint4 four = *(const uint4*)(found + (at & ~3));
                least = __uint_as_float(at & 2 ? (at & 1 ? four.w : four.z) : at & 1 ? four.y : four.x);
            }
            const float gap = u - table[r];
            cost[r] = least + gap * gap;
        }
    }

    // `count` elements, a multiple of 4. Decisions go to the trail from its start on.
    template <bool RECORD>
    __device__ __forceinline__ void walk(const float* u, int count) {
        u32* to = trail + vector * ROWS + row;
#pragma unroll 1
        for (int at = 0; at < count; at += 4) {
            const uint4 four = *(const uint4*)(u + at);
            const u32 bits[4] = {four.x, four.y, four.z, four.w};
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                step<RECORD>(__uint_as_float(bits[i]), i % 2, word, i % PER_WORD * ENTRY);
                if (RECORD && (i + 1) % PER_WORD == 0) {
                    *to = word;
                    to += 32;
                    word = 0;
                }
            }
        }
        __syncwarp();
    }

    // The state of least cost, the lowest of several; of those that end in `group` if that is >= 0.
    __device__ __forceinline__ int best_end(int group) {
        u64 best = ~0ull;
#pragma unroll
        for (int r = 0; r < STATES; ++r) {
            const u32 state = state_of(r) | row << X;
            // Costs are not negative: their bits have their order. NaN comes last.
            const u64 rank = (u64)(__float_as_uint(cost[r]) & 0x7fffffffu) << 32 | state;
            if ((group < 0 || (state & GROUP_MASK) == group) && rank < best) best = rank;
        }
        for (int i = 0; i < ROW_BITS; ++i) {
            const u64 other = __shfl_xor_sync(ALL, best, 1 << (PLACES >> 4 * i & 15));
            best = other < best ? other : best;
        }
        return (u32)best & ((1 << L) - 1);
    }

    // The state before `state`, which was reached with element `at` of the last walk.
    __device__ __forceinline__ int before(int state, int at) {
        const int word = at / PER_WORD * 32 + vector * ROWS + (state >> R);
        u32 entry;
        if (ENTRY == 8) {
            entry = ((const u8*)trail)[4 * word + at % 4];
        } else {
            entry = ((const u16*)trail)[2 * word + at % 2];
        }
        const u32 high = entry >> (K * (state >> K & (LOW - 1))) & (HIGH - 1);
        return high << (L - K) | state >> K;
    }

    __device__ __forceinline__ void run(const float* u, u8* codes) {
#pragma unroll
        for (int r = 0; r < STATES; ++r) cost[r] = 0.0f;
        walk<false>(u + DIM / 2, DIM / 2);
        walk<true>(u, DIM / 2);
        int state = best_end(-1);
        for (int at = DIM / 2 - 1; at >= 0; --at) state = before(state, at);
        const int start = state & GROUP_MASK;
#pragma unroll
        for (int r = 0; r < STATES; ++r) {
            const int group = (state_of(r) | row << X) & GROUP_MASK;
            cost[r] = group == start ? 0.0f : __uint_as_float(0x7f800000u);
        }
        __syncwarp();  // all have read the trail
        walk<true>(u, DIM);
        state = best_end(start);
#pragma unroll 1
        for (int eight = DEEP - 1; eight >= 0; --eight) {
            Codes word = 0;
#pragma unroll
            for (int i = 7; i >= 0; --i) {
                word = word << K | (state & (HIGH - 1));
                state = before(state, 8 * eight + i);
            }
            if (codes && row == eight % ROWS) {
                for (int i = 0; i < K; ++i) codes[eight * K + i] = (u8)(word >> 8 * i);
            }
        }
    }
};

template <int L, int K>
__device__ __forceinline__ void encode(const float* u, const float* values, u8* codes, i64 count) {
    using S = Search<L, K>;
    alignas(16) __shared__ float inputs[S::VECTORS * DIM];
    alignas(16) __shared__ float minima[WARPS * 2 * 32 * S::LOW];
    __shared__ u32 trail[WARPS * S::WORDS * 32];
    const i64 first = (i64)blockIdx.x * S::VECTORS;
    for (int at = 4 * threadIdx.x; at < S::VECTORS * DIM; at += 4 * WARPS * 32) {
        if (first + at / DIM < count) *(uint4*)(inputs + at) = *(const uint4*)(u + first * DIM + at);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    S search(values, minima + warp * 2 * 32 * S::LOW, trail + warp * S::WORDS * 32);
    const int vector = warp * (S::VECTORS / WARPS) + search.vector;
    const bool real = first + vector < count;
    search.run(inputs + vector * DIM, real ? codes + (first + vector) * (DEEP * K) : nullptr);
}

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

// TABLE by windows of bits, in shared memory.
template <int L, int K>
__device__ __forceinline__ void fill_table(float* table, const float* values) {
    using W = Windows<L, K>;
    for (int i = threadIdx.x; i < 1 << W::BITS; i += blockDim.x) table[i] = values[W::state_of(i)];
    __syncthreads();
}

// A row of `mean` serves `tokens` vectors: DIM means and the level. Without it the level is 1.
__device__ __forceinline__ const u16* mean_of(const u16* mean, i64 vector, i64 tokens) {
    return mean + vector / tokens * (DIM + 1);
}
__device__ __forceinline__ float level_of(const u16* mean, i64 vector, i64 tokens) {
    return mean ? half_to_float(mean_of(mean, vector, tokens)[DIM]) : 1.0f;
}

// How many of the 255 limits, times reach, are not above size. NaN goes to the end.
__device__ __forceinline__ int reached(float size, const float* limits, float reach) {
    int code = 0;
#pragma unroll
    for (int step = 128; step; step /= 2) {
        if (!(size < limits[code + step - 1] * reach)) code += step;
    }
    return code;
}

// Before the search: u = v y with y = rotated(x - mean), and v <y, y>. v is inverse[code] / level for
// the number of thresholds, in squared levels, that <y, y> reaches; 255 has u = 0.
template <class In>
__device__ __forceinline__ void scale(
    const In* x, const u16* mean, const float* weights, const float* thresholds,
    const float* inverse, float* u, float* sizes, i64 count, i64 tokens
) {
    __shared__ float limits[255], factors[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        factors[i] = inverse[i];
        if (i < 255) limits[i] = thresholds[i];
    }
    __syncthreads();
    const int lane = threadIdx.x % 8;
    const i64 vector = (i64)blockIdx.x * VECTORS + threadIdx.x / 8;
    const bool real = vector < count;
    const i64 some = real ? vector : 0;
    x += some * DIM;
    float y[DEEP], work[DEEP];
#pragma unroll
    for (int e = 0; e < DEEP; ++e) y[e] = to_float(x[8 * e + lane]);
    const float level = level_of(mean, some, tokens);
    if (mean) {
        mean = mean_of(mean, some, tokens);
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] -= half_to_float(mean[8 * e + lane]);
    }
#pragma unroll
    for (int e = 0; e < DEEP; ++e) y[e] *= weights[8 * e + lane];
    transform(y, lane);
#pragma unroll
    for (int e = 0; e < DEEP; ++e) work[e] = y[e] * y[e];
    const float square = add_all<DEEP>(work, lane);
    const int code = reached(square, limits, level * level);
    const float v = factors[code] / level;
    if (!real) return;
    if (lane == 0) sizes[vector] = square * v;
    u += vector * DIM + lane;
#pragma unroll
    for (int e = 0; e < DEEP; ++e) u[8 * e] = code == 255 ? 0.0f : y[e] * v;
}

// After it: code of the scale v <y, y> / <u, c>, the number of thresholds, in levels, that it reaches.
template <int L, int K>
__device__ __forceinline__ void gain(
    const float* u, const u8* codes, const float* sizes, const u16* mean, const float* values,
    const float* thresholds, u8* scales, i64 count, i64 tokens
) {
    using W = Windows<L, K>;
    __shared__ float table[1 << W::BITS], limits[255];
    for (int i = threadIdx.x; i < 255; i += blockDim.x) limits[i] = thresholds[i];
    fill_table<L, K>(table, values);
    const int lane = threadIdx.x % 8;
    for (i64 first = (i64)blockIdx.x * VECTORS; first < count; first += (i64)gridDim.x * VECTORS) {
        const i64 vector = first + threadIdx.x / 8, some = vector < count ? vector : 0;
        u32 words[W::WORDS + 3];
        W::load_codes(codes + some * W::ROW, words);
        const float* from = u + some * DIM + lane;
        float work[DEEP];
#pragma unroll
        for (int e = 0; e < DEEP; ++e) work[e] = table[W::window(words, e, lane)] * from[8 * e];
        const float dot = fmaxf(add_all<DEEP>(work, lane), 0.25f * DIM);
        const int code = reached(sizes[some], limits, level_of(mean, some, tokens) * dot);
        if (lane == 0 && vector < count) scales[vector] = (u8)code;
    }
}

// Blocks take 32 vectors at a time, and several times so many: each builds its own table.
template <int L, int K>
__device__ __forceinline__ void decode(
    const u8* codes, const u8* scales, const u16* mean, const float* values, const float* factors,
    const float* weights, float* out, i64 count, i64 tokens
) {
    using W = Windows<L, K>;
    __shared__ float table[1 << W::BITS];
    fill_table<L, K>(table, values);
    const int lane = threadIdx.x % 8;
    for (i64 first = (i64)blockIdx.x * VECTORS; first < count; first += (i64)gridDim.x * VECTORS) {
        const i64 vector = first + threadIdx.x / 8;
        const bool real = vector < count;
        u32 words[W::WORDS + 3];
        const i64 some = real ? vector : 0;
        W::load_codes(codes + some * W::ROW, words);
        const float factor = factors[scales[some]] * level_of(mean, some, tokens);
        float y[DEEP];
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] = table[W::window(words, e, lane)] * factor;
        transform(y, lane);
        if (!real) continue;
#pragma unroll
        for (int e = 0; e < DEEP; ++e) y[e] *= weights[8 * e + lane];
        if (mean) {
            const u16* add = mean_of(mean, vector, tokens) + lane;
#pragma unroll
            for (int e = 0; e < DEEP; ++e) y[e] += half_to_float(add[8 * e]);
        }
        float* to = out + vector * DIM + lane;
#pragma unroll
        for (int e = 0; e < DEEP; ++e) to[8 * e] = y[e];
    }
}

}  // namespace

#define SCALE(NAME, TYPE)                                                                      \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                    \
        const TYPE* x, const u16* mean, const float* weights, const float* thresholds,         \
        const float* inverse, float* u, float* sizes, i64 count, i64 tokens                    \
    ) {                                                                                        \
        scale(x, mean, weights, thresholds, inverse, u, sizes, count, tokens);                 \
    }
SCALE(trellis_scale, T)
SCALE(trellis_scale_f32, float)

#define TRELLIS(L, K)                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) trellis_encode_##L##_##K(         \
        const float* u, const float* values, u8* codes, i64 count                              \
    ) {                                                                                        \
        encode<L, K>(u, values, codes, count);                                                 \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) trellis_gain_##L##_##K(                  \
        const float* u, const u8* codes, const float* sizes, const u16* mean,                  \
        const float* values, const float* thresholds, u8* scales, i64 count, i64 tokens        \
    ) {                                                                                        \
        gain<L, K>(u, codes, sizes, mean, values, thresholds, scales, count, tokens);          \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) trellis_decode_##L##_##K(                \
        const u8* codes, const u8* scales, const u16* mean, const float* values,               \
        const float* factors, const float* weights, float* out, i64 count, i64 tokens          \
    ) {                                                                                        \
        decode<L, K>(codes, scales, mean, values, factors, weights, out, count, tokens);       \
    }
TRELLIS(8, 1)
TRELLIS(8, 2)
TRELLIS(8, 3)
TRELLIS(8, 4)
TRELLIS(10, 1)
TRELLIS(10, 2)
TRELLIS(10, 3)
TRELLIS(10, 4)
