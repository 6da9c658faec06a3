// Search of a tail-biting bitshift trellis code, see trellis.cu; for a lane of a warp.
#pragma once
#include "rotation.cuh"

#define WARPS 2  // of a block: 48 KB hold vectors of 256 elements, too

namespace {

// Bits of x where mask has them, side by side; the way back; bits of x in the opposite order.
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
    for (int bit = 0; bit < 16; ++bit) {
        if (bit < bits) found |= (x >> bit & 1) << (bits - 1 - bit);
    }
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
    static constexpr int R = 5, GROUP_BITS = L - K, GROUP_MASK = (1 << GROUP_BITS) - 1;
    static constexpr int HIGH = 1 << K, SETS = 1 << (R - K - 1);  // registers: 2^K for a set
    static constexpr int OWN = K == 1 ? 15 : K == 2 ? 7 : L == 8 ? (K == 3 ? 6 : 1) : K == 3 ? 9 : 4;
    static constexpr int NEAR = (HIGH - 1) << (GROUP_BITS - K) | OWN >> K;
    static constexpr int PAIR = NEAR & OWN & -(NEAR & OWN), ROW = GROUP_MASK & ~OWN;
    static constexpr int FAR = ROW & ~NEAR, APART = OWN & ~NEAR;
    static constexpr int ROWS = 1 << (L - R), TOGETHER = 32 / ROWS;  // vectors of a warp
    static constexpr int VECTORS = WARPS * TOGETHER;                 // of a block
    static constexpr int LANE_ROW = ROW < 32 ? ROW : 32 - TOGETHER;  // bits of the lane
    static constexpr int MINIMA = TOGETHER << GROUP_BITS;            // of a warp
    // A word of decisions: 2 halves, of SETS slots, of PER_WORD elements, of K bits.
    static constexpr int SLOT = 16 / SETS, PER_WORD = SLOT / K;
    static constexpr int WORDS = DIM / PER_WORD;  // of a lane
    static constexpr int SEAM = DIM / 2;          // elements looked at on either side
    static_assert(ones(OWN) == R - K && PAIR < HIGH, "a pair's successors need one minimum");

    // Of the minimum of a group, in half numbers: NEAR, the lane's own bits first; vector; FAR;
    // APART. So the lanes store side by side, and loads of a phase of lanes hardly meet in a bank.
    __device__ static constexpr int address(int group, int vector) {
        const int own = ones(NEAR & OWN), near = ones(NEAR), far = ones(FAR);
        const int others = gather(group, FAR) | gather(group, APART) << far;
        return gather(group, NEAR & OWN) | gather(group, NEAR & ~OWN) << own
            | (others * TOGETHER + vector) << near;
    }
    // Bits of the first state of register `high` of a set that are not the row's.
    __device__ static constexpr int state_of(int set, int high) {
        return high << GROUP_BITS | scatter(set, OWN & ~PAIR);
    }

    int lane, row, vector;  // vector: in its warp
    u32 table[SETS][HIGH], cost[SETS][HIGH];
    u16* minima;       // of the warp, two buffers
    u16* found;        // where those of this lane go, in the first of them
    const u16* needed; // what its states need, likewise
    u32* trail;        // decisions of the warp: WORDS + 1 rows of 32 words

    __device__ __forceinline__ Search(u16* minima_of_warp, u32* trail_of_warp) {
        lane = threadIdx.x % 32;
        row = gather(lane, LANE_ROW);
        vector = gather(lane, 31 & ~LANE_ROW);
        minima = minima_of_warp;
        found = minima + address(scatter(row, ROW), vector);
        needed = minima + address(scatter(row, ROW) >> K, vector);
        trail = trail_of_warp;
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

    // Minimum of a set's costs over `high`: cards from sm_90 on compare three at once.
    __device__ static __forceinline__ u32 minimum(const u32 (&costs)[HIGH]) {
        u32 least = min_two(costs[0], costs[1]);
#pragma unroll
        for (int high = 2; high < HIGH; high += 2) {
            least = min_two(min_two(costs[high], costs[high + 1]), least);
        }
        return least;
    }

    // As well, and into `word`, from bit `shift` of either half on: the lowest `high` that has it.
    __device__ static __forceinline__ u32 decide(const u32 (&costs)[HIGH], u32& word, int shift) {
        u32 best[HIGH], bits[HIGH][K];  // a bit fills its half
#pragma unroll
        for (int high = 0; high < HIGH; ++high) best[high] = costs[high];
#pragma unroll
        for (int level = 0; level < K; ++level) {
#pragma unroll
            for (int high = 0; high < HIGH; high += 2 << level) {
                const int other = high + (1 << level);
                const u32 less = less_two(best[other], best[high]);
                best[high] = min_two(best[other], best[high]);
                bits[high][level] = less;
#pragma unroll
                for (int i = 0; i < level; ++i) {
                    bits[high][i] = choose(less, bits[other][i], bits[high][i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < K; ++i) word = choose(0x10001u << (shift + i), bits[0][i], word);
        return best[0];
    }

    // One element, u in both halves. Its decisions go to `word`; `floor` leaves all costs.
    template <bool RECORD>
    __device__ __forceinline__ void step(
        u32 u, int buffer, u32& word, int shift, u32 floor, u32 (&least)[SETS]
    ) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            least[set] = RECORD ? decide(cost[set], word, shift + SLOT * set) : minimum(cost[set]);
            if (floor) least[set] = sub_two(least[set], floor);
        }
        u16* to = found + buffer * MINIMA;
        if constexpr (ones(NEAR & OWN) >= 3) {
#pragma unroll
            for (int set = 0; set < SETS; set += 4) {
                const uint4 four = {least[set], least[set + 1], least[set + 2], least[set + 3]};
                *(uint4*)(to + address(state_of(set, 0), 0)) = four;
            }
        } else {
#pragma unroll
            for (int set = 0; set < SETS; ++set) *(u32*)(to + address(state_of(set, 0), 0)) = least[set];
        }
        __syncwarp();  // two buffers in turn: one barrier is enough
        u32 near[1 << (ones(NEAR) - 1)];
#pragma unroll
        for (int at = 0; at < 1 << (ones(NEAR) - 1); at += 4) {
            const uint4 four = *(const uint4*)(needed + buffer * MINIMA + 2 * at);
            near[at] = four.x;
            near[at + 1] = four.y;
            near[at + 2] = four.z;
            near[at + 3] = four.w;
        }
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
#pragma unroll
            for (int high = 0; high < HIGH; ++high) {
                const int at = address(state_of(set, high) >> K, 0);
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
        u32* to = trail + lane;
#pragma unroll 1
        for (int at = 0; at < count; at += 4) {
            const u64 four = *(const u64*)(u + (BACK ? count - 4 - at : at));
            const u32 two[2] = {(u32)four, (u32)(four >> 32)};
            u32 word = 0, floor = 0, least[SETS];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int e = BACK ? 3 - i : i;
                const u32 one = e % 2 ? high_twice(two[e / 2]) : low_twice(two[e / 2]);
                step<RECORD>(one, i % 2, word, i % PER_WORD * K, i == 2 ? floor : 0, least);
                if (i == 0) floor = least_of_all(least);  // subtracted later: it takes its time
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
        u32 best = ~0u;
        u16* by_group = minima + (vector << GROUP_BITS);
        const int own = scatter(row, ROW), mirrored = mirror(own, GROUP_BITS);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int group = mirror(state_of(set, 0), GROUP_BITS) | mirrored;
            by_group[group] = (u16)from[set];
            by_group[group | mirror(PAIR, GROUP_BITS)] = (u16)(from[set] >> 16);
        }
        __syncwarp();
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int group = state_of(set, 0) | own;
            const u32 negative = (by_group[group] | (u32)by_group[group | PAIR] << 16) ^ 0x80008000u;
            const u32 sum = sub_two(minimum(cost[set]), negative);
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
        const int group = state >> K, its_row = scatter(gather(group, ROW), LANE_ROW);
        const u32 word = trail[at / PER_WORD * 32 + (its_row | (lane & ~LANE_ROW))];
        const int slot = (group & PAIR ? 16 : 0) + SLOT * gather(group, OWN & ~PAIR);
        return (word >> slot >> at % PER_WORD * K & (HIGH - 1)) << GROUP_BITS | group;
    }

    __device__ __forceinline__ void run(const u16* u, const float* values, u8* codes) {
        u32 from[SETS];
        begin<true>(values);
        walk<false, true>(u, SEAM);
#pragma unroll
        for (int set = 0; set < SETS; ++set) from[set] = minimum(cost[set]);
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
        for (int set = 0; set < SETS; ++set) decide(cost[set], word, SLOT * set);
        trail[WORDS * 32 + lane] = word;
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

}  // namespace
