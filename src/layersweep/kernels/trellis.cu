// Search and decoder of a tail-biting bitshift trellis code: element t is TABLE[s_t] with
// s_t = (s_(t-1) << K | b_t) mod 2^L and s_(-1) = s_(D-1); the K-bit symbols b are what is stored.
#include "rotation.cuh"

#define WARPS 2  // of a block of the search: 48 KB hold 256 elements, too
#define NOTHING 0u  // to subtract

namespace {

// Bits of x where mask has them, side by side; and the way back.
__device__ constexpr int gather(int x, int mask) {
    int found = 0;
    for (int bit = 0, at = 0; bit < 16; ++bit) {
        if (mask >> bit & 1) found |= (x & 1 << bit) >> (bit - at++);
    }
    return found;
}
__device__ constexpr int scatter(int x, int mask) {
    int found = 0;
    for (int bit = 0, at = 0; bit < 16; ++bit) {
        if (mask >> bit & 1) found |= (x & 1 << at) << (bit - at), ++at;
    }
    return found;
}
__device__ constexpr int mirror(int x, int bits) {
    int found = 0;
    for (int bit = 0; bit < bits; ++bit) found |= (x >> bit & 1) << (bits - 1 - bit);
    return found;
}
__device__ constexpr int ones(int mask) { return mask ? 1 + ones(mask & (mask - 1)) : 0; }

// Viterbi, two states to a register: costs are half numbers, kept small by subtracting the least.
//
// The 2^K states that lead to one group g = state mod 2^(L-K) differ in the K bits `high` alone. A
// lane keeps 2^5 states of a vector for good, so that their TABLE values stay in registers: all
// values of `high` and of the bits OWN of the group. PAIR, one of OWN, tells the two halves of a
// register apart. The other bits of the group, `row`, choose the lane.
// The minimum over `high` is the lane's own affair. It goes through shared memory to where its
// successors g << K | b live. There NEAR are the bits of the group in which the minima that a lane
// needs differ: they lie side by side.
template <int L, int K>
struct Search {
    static constexpr int R = 5, X = R - K, GROUP_BITS = L - K, GROUP_MASK = (1 << GROUP_BITS) - 1;
    static constexpr int HIGH = 1 << K, SETS = 1 << (X - 1);
    static constexpr int OWN = K == 1 ? 15 : K == 2 ? 7 : L == 8 ? (K == 3 ? 6 : 1) : K == 3 ? 9 : 4;
    static constexpr int NEAR = (HIGH - 1) << (GROUP_BITS - K) | OWN >> K;
    static constexpr int PAIR = NEAR & OWN & -(NEAR & OWN), ROW = GROUP_MASK & ~OWN;
    static constexpr int ROWS = 1 << (L - R), TOGETHER = 32 / ROWS;  // vectors of a warp
    // Bits of the lane where the row stands, those of the vector fill up.
    static constexpr int LANE_ROW = ROW < 32 && ones(ROW) + ones(TOGETHER - 1) == 5 ? ROW : 31 & ~(TOGETHER - 1);
    static constexpr int VECTORS = WARPS * TOGETHER;                 // of a block
    static constexpr int STRIDE = 1 << (GROUP_BITS - ones(OWN & ~NEAR));
    static constexpr int MINIMA = TOGETHER << GROUP_BITS;  // of a warp
    // A word of decisions: from the top 2 halves, SETS, elements, K bits.
    static constexpr int SLOT = 16 / SETS, PER_WORD = SLOT / K;
    static constexpr int WORDS = DIM / PER_WORD;  // of a lane in a pass
    static constexpr int SEAM = DIM / 2;
    static_assert(ones(OWN) == X && PAIR < HIGH, "one half of the word for both of a pair");

    // Of the minimum of a group, in halves, without the vector's STRIDE. Bits: NEAR, the lane's own
    // ones first; row; vector; what is left of OWN.
    __device__ static constexpr int address(int group) {
        const int own = ones(NEAR & OWN), near = ones(NEAR), apart = OWN & ~NEAR;
        return gather(group, NEAR & OWN) | gather(group, NEAR & ~OWN) << own
            | gather(group, ROW & ~NEAR) << near | gather(group, apart) * STRIDE * TOGETHER;
    }
    // Bits of the first state of register `high` of a set that are not the row's.
    __device__ static constexpr int state_of(int set, int high) {
        return high << GROUP_BITS | scatter(set, OWN & ~PAIR);
    }

    int row, vector, lane_vector;  // vector: in its warp, and its bits of the lane
    u32 table[SETS][HIGH], cost[SETS][HIGH];
    u16* minima;       // where this lane's go, in the first of two buffers
    const u16* found;  // what its states need, likewise
    u32* trail;        // decisions of the warp: WORDS + 1 rows of 32 words
    u16* own_minima;

    __device__ __forceinline__ Search(u16* minima_of_warp, u32* trail_of_warp) {
        const int lane = threadIdx.x % 32;
        row = gather(lane, LANE_ROW);
        vector = gather(lane, 31 & ~LANE_ROW);
        lane_vector = lane & ~LANE_ROW;
        minima = minima_of_warp + vector * STRIDE + address(scatter(row, ROW));
        found = minima_of_warp + vector * STRIDE + address(scatter(row, ROW) >> K);
        trail = trail_of_warp;
        own_minima = minima_of_warp;
    }

    // `BACK`: of the trellis walked against the stream's order, whose states are mirrored.
    template <bool BACK>
    __device__ __forceinline__ void begin(const float* values) {
        const int own = scatter(row, ROW);
        values += BACK ? mirror(own, L) : own;
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
#pragma unroll
            for (int high = 0; high < HIGH; ++high) {
                const int state = state_of(set, high), other = state | PAIR;
                const float one = values[BACK ? mirror(state, L) : state];
                const float two = values[BACK ? mirror(other, L) : other];
                table[set][high] = float_to_half(one) | (u32)float_to_half(two) << 16;
                cost[set][high] = 0;
            }
        }
    }

    // Minimum of a set's costs over `high`. Bit i of the lowest one that has it goes to both halves
    // of the word, at `shift` + i.
    template <bool RECORD>
    __device__ __forceinline__ u32 minimum(const u32 (&costs)[HIGH], u32& word, int shift) {
        u32 best[HIGH], bits[HIGH][K];
#pragma unroll
        for (int high = 0; high < HIGH; ++high) best[high] = costs[high];
#pragma unroll
        for (int level = 0; level < K; ++level) {
#pragma unroll
            for (int high = 0; high < HIGH; high += 2 << level) {
                const int other = high + (1 << level);
                const u32 less = RECORD ? less_two(best[other], best[high]) : 0;
                best[high] = min_two(best[other], best[high]);
                bits[high][level] = less;
#pragma unroll
                for (int i = 0; i < level; ++i) {
                    bits[high][i] = choose(less, bits[other][i], bits[high][i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < K; ++i) {
            if (RECORD) word = choose(0x10001u << (shift + i), bits[0][i], word);
        }
        return best[0];
    }

    // One element, u in both halves. `less`: what to subtract from all costs.
    template <bool RECORD>
    __device__ __forceinline__ void step(
        u32 u, int buffer, u32& word, int shift, u32 (&least)[SETS], u32 floor
    ) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            least[set] = minimum<RECORD>(cost[set], word, shift + SLOT * set);
            if (floor != NOTHING) least[set] = sub_two(least[set], floor);
        }
        u16* to = minima + buffer * MINIMA;
        if constexpr (ones(NEAR & OWN) >= 3) {
#pragma unroll
            for (int set = 0; set < SETS; set += 4) {
                const uint4 four = {least[set], least[set + 1], least[set + 2], least[set + 3]};
                *(uint4*)(to + address(state_of(set, 0))) = four;
            }
        } else {
#pragma unroll
            for (int set = 0; set < SETS; ++set) *(u32*)(to + address(state_of(set, 0))) = least[set];
        }
        __syncwarp();  // two buffers in turn: one barrier is enough
        u32 near[1 << (ones(NEAR) - 1)];
#pragma unroll
        for (int at = 0; at < 1 << (ones(NEAR) - 1); at += 4) {
            const uint4 four = *(const uint4*)(found + buffer * MINIMA + 2 * at);
            near[at] = four.x;
            near[at + 1] = four.y;
            near[at + 2] = four.z;
            near[at + 3] = four.w;
        }
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
#pragma unroll
            for (int high = 0; high < HIGH; ++high) {
                const int at = address(state_of(set, high) >> K);
                const u32 before = at & 1 ? high_twice(near[at / 2]) : low_twice(near[at / 2]);
                const u32 gap = sub_two(u, table[set][high]);
                cost[set][high] = fma_two(gap, gap, before);
            }
        }
    }

    // The least of the vector's minima, in both halves.
    __device__ __forceinline__ u32 least_of_all(const u32 (&least)[SETS]) {
        u32 best = least[0];
#pragma unroll
        for (int set = 1; set < SETS; ++set) best = min_two(best, least[set]);
        best = min_two(best, best >> 16 | best << 16);
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) {
            if (apart & LANE_ROW) best = min_two(best, __shfl_xor_sync(ALL, best, apart));
        }
        return best;
    }

    // `count` elements, a multiple of 4. Decisions go to the trail from its start on.
    template <bool RECORD, bool BACK>
    __device__ __forceinline__ void walk(const u16* u, int count) {
        u32* to = trail + threadIdx.x % 32;
#pragma unroll 1
        for (int at = 0; at < count; at += 4) {
            const u64 four = *(const u64*)(u + (BACK ? count - 4 - at : at));
            const u32 two[2] = {(u32)four, (u32)(four >> 32)};
            u32 word = 0, floor = NOTHING, least[SETS];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = BACK ? 3 - i : i;
                const u32 one = e % 2 ? high_twice(two[e / 2]) : low_twice(two[e / 2]);
                step<RECORD>(one, i % 2, word, i % PER_WORD * K, least, i == 2 ? floor : NOTHING);
                if (i == 0) floor = least_of_all(least);
                if (RECORD && (i + 1) % PER_WORD == 0) {
                    *to = word;
                    to += 32;
                    word = 0;
                }
            }
        }
        __syncwarp();
    }

    // The group at the seam of the best path around it: costs of the ways there and from there.
    __device__ __forceinline__ int best_seam(const u32 (&from)[SETS]) {
        u32 none = 0, best = ~0u;
        u16* by_group = own_minima + (vector << GROUP_BITS);
        const int own = scatter(row, ROW);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int group = state_of(set, 0) | own;
            by_group[mirror(group, GROUP_BITS)] = (u16)from[set];
            by_group[mirror(group | PAIR, GROUP_BITS)] = (u16)(from[set] >> 16);
        }
        __syncwarp();
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int group = state_of(set, 0) | own;
            const u32 negative = (by_group[group] | (u32)by_group[group | PAIR] << 16) ^ 0x80008000u;
            const u32 sum = sub_two(minimum<false>(cost[set], none, 0), negative);
            // Costs are not negative: their bits have their order.
            const u32 low = (sum & 0x7fffu) << 16 | group, high = (sum & 0x7fff0000u) | group | PAIR;
            best = low < best ? low : best;
            best = high < best ? high : best;
        }
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) {
            if (!(apart & LANE_ROW)) continue;
            const u32 other = __shfl_xor_sync(ALL, best, apart);
            best = other < best ? other : best;
        }
        __syncwarp();
        return best & GROUP_MASK;
    }

    // The state before `state`, which was reached with element `at` of the last walk.
    __device__ __forceinline__ int before(int state, int at) {
        const int group = state >> K, lane = scatter(gather(group, ROW), LANE_ROW) | lane_vector;
        const u32 word = trail[at / PER_WORD * 32 + lane];
        const int slot = (group & PAIR ? 16 : 0) + SLOT * gather(group, OWN & ~PAIR);
        return (word >> slot >> at % PER_WORD * K & (HIGH - 1)) << GROUP_BITS | group;
    }

    __device__ __forceinline__ void run(const u16* u, const float* values, u8* codes) {
        u32 none = 0, from[SETS];
        begin<true>(values);
        walk<false, true>(u, SEAM);
#pragma unroll
        for (int set = 0; set < SETS; ++set) from[set] = minimum<false>(cost[set], none, 0);
        begin<false>(values);
        walk<false, false>(u + DIM - SEAM, SEAM);
        const int start = best_seam(from);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int group = state_of(set, 0) | scatter(row, ROW);
            const u32 infinite = 0x7c00u;
            const u32 two = (group == start ? 0 : infinite) | (group + PAIR == start ? 0 : infinite) << 16;
            for (int high = 0; high < HIGH; ++high) cost[set][high] = two;
        }
        walk<true, false>(u, DIM);
        // One step more than elements: the choice of the start's group is the last state.
        u32 word = 0;
        for (int set = 0; set < SETS; ++set) minimum<true>(cost[set], word, SLOT * set);
        trail[WORDS * 32 + threadIdx.x % 32] = word;
        __syncwarp();
        int state = before(start << K, DIM);
#pragma unroll 1
        for (int eight = DEEP - 1; eight >= 0; --eight) {
            u32 word = 0;
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
    alignas(16) __shared__ u16 inputs[S::VECTORS * DIM];
    alignas(16) __shared__ u16 minima[WARPS * 2 * S::MINIMA];
    __shared__ u32 trail[WARPS * (S::WORDS + 1) * 32];
    const i64 first = (i64)blockIdx.x * S::VECTORS;
    for (int at = 4 * threadIdx.x; at < S::VECTORS * DIM; at += 4 * WARPS * 32) {
        if (first + at / DIM >= count) break;
        const uint4 four = *(const uint4*)(u + first * DIM + at);
        const u32 bits[4] = {four.x, four.y, four.z, four.w};
        for (int i = 0; i < 4; ++i) inputs[at + i] = float_to_half(__uint_as_float(bits[i]));
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    S search(minima + warp * 2 * S::MINIMA, trail + warp * (S::WORDS + 1) * 32);
    const int vector = warp * S::TOGETHER + search.vector;
    const bool real = first + vector < count;
    search.run(inputs + vector * DIM, values, real ? codes + (first + vector) * (DEEP * K) : nullptr);
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
