// Logits or the caller's choice -> sanitised ids, weights and the mask of ranks of each token.
//
// One warp per token. Selection runs in float64 on the ranking of RoutingRule.java: K passes, each
// the best expert not yet taken, ties to the lowest id, NaN below every number. CTA 0 of a rank also
// takes the snapshot of T and advances the epoch.
// A rank that is no member gets no rows: its bit is left out of home_mask, and the row is counted.
// Reads token_count, members, topk_ids and topk_weights or router_logits or logits. Writes home_tokens,
// home_ids, home_weights, home_mask, epoch, totals.
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../common/math.cuh"
#include "../layout/recv_buffer.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

constexpr int kTopKThreads = 128;
constexpr int kTopKWarps = kTopKThreads / 32;
constexpr int kHeld = 16;             // experts of a lane that stay in registers
constexpr int kHeldAtOnce = 4;
constexpr int kHeldExperts = kHeld * 32;  // experts past these are ranked anew in every pass
constexpr int kMaxGroups = 1024;

// Rankings as numbers of the same order: a warp finds the greatest of 32 bits in one instruction. NaN is below
// every number, and kNothing below NaN. A logit needs the upper half alone.
using Order = uint64_t;
constexpr Order kNothing = 0;
constexpr Order kNaN = 1ull << 32;
constexpr Order kLowest = 0x000fffffffffffffull;  // of -infinity, in float64

__device__ __forceinline__ Order order_of(double ranking) {
    const uint64_t bits = __double_as_longlong(__dadd_rn(ranking, 0.0));  // why: -0 equals 0
    return isnan(ranking) ? kNaN : (bits >> 63 != 0 ? ~bits : bits | 1ull << 63);
}

__device__ __forceinline__ double ranking_of(Order order) {
    return __longlong_as_double(order >> 63 != 0 ? order & ~(1ull << 63) : ~order);
}

__device__ __forceinline__ uint32_t upper_order_of(float logit) {
    const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    return isnan(logit) ? static_cast<uint32_t>(kNaN >> 32) : (bits >> 31 != 0 ? ~bits : bits | 1u << 31);
}

__device__ __forceinline__ double sigmoid_f64(double x) {
    return __drcp_rn(__dadd_rn(1.0, exp(-x)));  // a reciprocal rounds as 1.0 / x does
}

struct Ranked {
    Order order;
    int id;

    // Strictly above, equal ones by the lower id.
    __device__ __forceinline__ bool is_above(const Ranked& other) const {
        return order > other.order || (order == other.order && id < other.id);
    }
};

// The greatest of a warp, of those the lowest id. whole: orders differ in the lower half, too.
__device__ __forceinline__ Ranked warp_best(const Ranked& mine, bool whole) {
    const uint32_t high = static_cast<uint32_t>(mine.order >> 32);
    const uint32_t low = static_cast<uint32_t>(mine.order);
    const uint32_t best_high = __reduce_max_sync(0xffffffffu, high);
    uint32_t best_low = 0;
    bool is_best = high == best_high;
    if (whole) {
        best_low = __reduce_max_sync(0xffffffffu, is_best ? low : 0);
        is_best &= low == best_low;
    }
    const uint32_t id = __reduce_min_sync(0xffffffffu, is_best ? static_cast<uint32_t>(mine.id) : 0x7fffffffu);
    return Ranked{static_cast<Order>(best_high) << 32 | best_low, static_cast<int>(id)};
}

// One token's logits and the order they put the experts in. Lane l holds experts l, l + 32, ...
struct TokenRanking {
    const StepParams& p;
    const float* logits;  // [E]
    Order* staged;        // [kHeldExperts], shared, this warp's: for groups
    uint32_t* groups;     // [kMaxGroups / 32], shared, this warp's: bit set = group chosen
    const float* bias;    // [kHeldExperts], shared: what corrects a score, or 0
    bool whole;           // orders are of float64
    Order order[kHeld];

    __device__ __forceinline__ TokenRanking(const StepParams& p, Order* staged, uint32_t* groups, const float* bias)
        : p(p), staged(staged), groups(groups), bias(bias), whole(p.scoring == kSigmoid || p.groups > 1) {}

    __device__ __forceinline__ Order rank(float logit, float bias) const {
        if (!whole) {
            return static_cast<Order>(upper_order_of(logit)) << 32;
        }
        if (p.scoring != kSigmoid) {
            return order_of(logit);
        }
        const double score = sigmoid_f64(logit);
        return order_of(p.correction_bias == nullptr ? score : __dadd_rn(score, static_cast<double>(bias)));
    }
    __device__ __forceinline__ Order rank(int expert) const {
        return rank(logits[expert], p.correction_bias == nullptr ? 0.0f : p.correction_bias[expert]);
    }

    // use(i, expert) of each that this lane holds, four side by side.
    template <class Use>
    __device__ __forceinline__ void each_held(int lane, Use use) const {
#pragma unroll
        for (int block = 0; block < kHeld; block += kHeldAtOnce) {
            if (block * 32 < p.experts) {
#pragma unroll
                for (int i = block; i < block + kHeldAtOnce; i++) {
                    use(i, lane + 32 * i);
                }
            }
        }
    }

    __device__ __forceinline__ void fill(int lane) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            order[i] = kNothing;
        }
        float logit[kHeld];
        each_held(lane, [&](int i, int e) { logit[i] = e < p.experts ? logits[e] : 0.0f; });
        each_held(lane, [&](int i, int e) { order[i] = e < p.experts ? rank(logit[i], bias[e]) : kNothing; });
    }

    __device__ __forceinline__ bool group_is_chosen(int group) const {
        return (groups[group / 32] >> (group % 32) & 1) != 0;
    }

    // Sum of the two best rankings of a group, by lanes_of_group lanes side by side; NaN is passed over.
    __device__ __forceinline__ Order top_two(int group, int lane, int lanes_of_group) const {
        const int size = p.experts / p.groups;
        Order first = kLowest;
        Order second = kLowest;
        if (group < p.groups) {
            for (int e = group * size + lane % lanes_of_group; e < (group + 1) * size; e += lanes_of_group) {
                const Order value = e < kHeldExperts ? staged[e] : rank(e);
                second = max(second, min(first, value));
                first = max(first, value);
            }
        }
        for (int offset = lanes_of_group / 2; offset > 0; offset /= 2) {
            const Order other_first = __shfl_xor_sync(0xffffffffu, first, offset);
            const Order other_second = __shfl_xor_sync(0xffffffffu, second, offset);
            second = max(min(first, other_first), max(second, other_second));
            first = max(first, other_first);
        }
        return order_of(size == 1 ? ranking_of(first) : __dadd_rn(ranking_of(first), ranking_of(second)));
    }

    // Leaves groups, and kNothing as the order of experts in others.
    __device__ __forceinline__ void choose_groups(int lane) {
        each_held(lane, [&](int i, int e) { staged[e] = order[i]; });
        for (int word = lane; word < kMaxGroups / 32; word += 32) {
            groups[word] = 0;
        }
        __syncwarp();
        int lanes_of_group = 32;
        while (lanes_of_group > 1 && lanes_of_group * p.groups > 32) {
            lanes_of_group /= 2;
        }
        const int at_once = 32 / lanes_of_group;
        const int of_lane = lane / lanes_of_group;
        const Order own = top_two(of_lane, lane, lanes_of_group);
        Ranked last{~kNothing, -1};
        for (int chosen = 0; chosen < p.topk_groups; chosen++) {
            Ranked best{kNothing, p.groups};
            for (int group = of_lane; group - of_lane < p.groups; group += at_once) {
                const Ranked candidate{group == of_lane ? own : top_two(group, lane, lanes_of_group), group};
                if (group < p.groups && last.is_above(candidate) && candidate.is_above(best)) {
                    best = candidate;
                }
            }
            last = warp_best(best, true);
            if (lane == 0) {
                groups[last.id / 32] |= 1u << (last.id % 32);
            }
        }
        __syncwarp();
        const int size = p.experts / p.groups;
        each_held(lane, [&](int i, int e) {
            if (e < p.experts && !group_is_chosen(e / size)) {
                order[i] = kNothing;
            }
        });
    }

    // The best expert after the last one; this lane's own is taken away.
    __device__ __forceinline__ Ranked next_best(int lane, const Ranked& last) {
        Ranked best{kNothing, p.experts};
        each_held(lane, [&](int i, int e) {
            if (order[i] > best.order) {
                best = Ranked{order[i], e};
            }
        });
        for (int e = lane + kHeldExperts; e < p.experts; e += 32) {
            if (p.groups == 1 || group_is_chosen(e / (p.experts / p.groups))) {
                const Ranked candidate{rank(e), e};
                if (last.is_above(candidate) && candidate.is_above(best)) {
                    best = candidate;
                }
            }
        }
        const Ranked chosen = warp_best(best, whole);
        each_held(lane, [&](int i, int e) { order[i] = e == chosen.id ? kNothing : order[i]; });
        return chosen;
    }
};

// Lane k < K leaves with the k-th id and its weight.
__device__ __forceinline__ void select_experts(int& id, float& weight, TokenRanking& ranking,
                                               int lane) {
    const StepParams& p = ranking.p;
    ranking.fill(lane);
    if (p.groups > 1) {
        ranking.choose_groups(lane);
    }
    id = -1;
    Ranked last{~kNothing, -1};
#pragma unroll 1
    for (int k = 0; k < p.top_k; k++) {
        last = ranking.next_best(lane, last);
        if (lane == k) {
            id = last.id;
        }
    }

    // The score of the lane's expert, before any division by the chosen scores' sum
    double score = 0.0;
    const double logit = id >= 0 ? static_cast<double>(ranking.logits[id]) : 0.0;
    if (p.scoring == kSoftmax) {
        float largest = -INFINITY;
        bool any_nan = false;
        auto note = [&](float value) {
            any_nan |= isnan(value);
            largest = fmaxf(largest, value);
        };
        ranking.each_held(lane, [&](int i, int e) { note(e < p.experts ? ranking.logits[e] : -INFINITY); });
        for (int e = lane + kHeldExperts; e < p.experts; e += 32) {
            note(ranking.logits[e]);
        }
        const uint32_t best = __reduce_max_sync(0xffffffffu, upper_order_of(largest));
        const float greatest = __uint_as_float(best >> 31 != 0 ? best & ~(1u << 31) : ~best);
        const double max = __any_sync(0xffffffffu, any_nan) ? NAN : static_cast<double>(greatest);
        const double of_chosen = exp(logit - max);
        double sum = 0.0;
        ranking.each_held(lane, [&](int i, int e) {
            const double term = exp(static_cast<double>(e < p.experts ? ranking.logits[e] : 0.0f) - max);
            sum = e < p.experts ? __dadd_rn(sum, term) : sum;
        });
        for (int e = lane + kHeldExperts; e < p.experts; e += 32) {
            sum = __dadd_rn(sum, exp(static_cast<double>(ranking.logits[e]) - max));
        }
        score = of_chosen / warp_sum(sum);
    } else if (p.scoring == kTopKSoftmax) {
        // why lane 0: ids are in descending order, the first has the largest logit
        score = exp(logit - __shfl_sync(0xffffffffu, logit, 0));
    } else {
        score = sigmoid_f64(logit);
    }

    // Divide by the sum in k order
    double divisor = 1.0;
    if (p.scoring == kTopKSoftmax || p.renormalise != 0) {
        divisor = p.scoring == kSigmoid ? 1e-20 : 0.0;
#pragma unroll 8
        for (int k = 0; k < p.top_k; k++) {
            divisor = __dadd_rn(divisor, __shfl_sync(0xffffffffu, score, k));
        }
    }
    weight = __double2float_rn(__dmul_rn(score / divisor, static_cast<double>(p.scale)));
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kTopKThreads, 4)
void moe_route_topk(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ Order staged[kTopKWarps][kHeldExperts];
    __shared__ uint32_t groups[kTopKWarps][kMaxGroups / 32];
    __shared__ float bias[kHeldExperts];  // no step changes it
    const LocalRank& me = p.locals[blockIdx.y];
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int32_t* token_count = me.token_count;
    const uint64_t* member_mask = me.members;
    TokenRanking ranking(p, staged[warp], groups[warp], bias);
    const float* all_logits = p.routing_input == kLogits ? me.router_logits : me.logits;
    for (int e = threadIdx.x; p.correction_bias != nullptr && e < min(p.experts, kHeldExperts); e += kTopKThreads) {
        bias[e] = p.correction_bias[e];
    }
    __syncthreads();
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();

    // Snapshot T and begin the step
    const int asked = *token_count;
    const uint64_t members = *member_mask;
    const int num_tokens = clamp_tokens(asked, p.max_tokens);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *me.home_tokens = num_tokens;
        me.epoch[kThisStep] = me.epoch[kLastStep] + 1;
        add_total(me, kTotalOverCapacity, asked > p.max_tokens ? asked - p.max_tokens : 0);
    }

    uint32_t dropped = 0;
    uint32_t duplicates = 0;
    uint32_t lost = 0;
    for (int64_t token = blockIdx.x * kTopKWarps + warp; token < num_tokens;
         token += static_cast<int64_t>(gridDim.x) * kTopKWarps) {
        // Lane k holds the k-th choice
        const int64_t at = token * p.top_k + lane;
        int id = -1;
        float weight = 0.0f;
        if (p.routing_input == kTopK) {
            if (lane < p.top_k) {
                id = me.topk_ids[at];
                weight = me.topk_weights[at];
            }
        } else {
            ranking.logits = all_logits + token * p.experts;
            select_experts(id, weight, ranking, lane);
        }

        // Sanitise: out of range is dropped, a repeat is counted and contributes again
        const bool in_range = id >= 0 && id < p.experts;
        dropped += lane < p.top_k && !in_range && id != -1;
        id = in_range ? id : -1;
        bool repeat = false;
        for (int k = 0; k < p.top_k; k++) {
            const int earlier = __shfl_sync(0xffffffffu, id, k);
            repeat |= k < lane && id >= 0 && earlier == id;
        }
        duplicates += repeat;

        // The ranks that have an expert of this token
        const uint64_t bit = id >= 0 ? 1ull << (id / p.experts_per_rank) : 0;
        const uint32_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit));
        const uint32_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit >> 32));
        if (lane < p.top_k) {
            me.home_ids[at] = id;
            me.home_weights[at] = weight;
        }
        if (lane == 0) {
            const uint64_t mask = static_cast<uint64_t>(high) << 32 | low;
            me.home_mask[token] = mask & members;
            lost += __popcll(mask & ~members);
        }
        __syncwarp();  // why: the next token reuses the warp's shared memory
    }
    dropped = __reduce_add_sync(0xffffffffu, dropped);
    duplicates = __reduce_add_sync(0xffffffffu, duplicates);
    if (lane == 0) {
        add_total(me, kTotalDropped, dropped);
        add_total(me, kTotalDuplicates, duplicates);
        add_total(me, kTotalLostRows, lost);
    }
}
