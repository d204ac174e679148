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

namespace moe {

constexpr int kTopKThreads = 128;
constexpr int kTopKWarps = kTopKThreads / 32;
constexpr int kCachedRankings = 512;  // experts past these are ranked anew in every pass
constexpr int kMaxGroups = 1024;

struct Ranked {
    double value;
    int id;  // -1: none
};

// Strictly above by value, NaN below every number; equal values by the lower id.
__device__ __forceinline__ bool precedes(const Ranked& a, const Ranked& b) {
    if (a.id < 0 || b.id < 0) {
        return a.id >= 0;
    }
    const bool a_nan = isnan(a.value);
    const bool b_nan = isnan(b.value);
    if (a_nan || b_nan) {
        return a_nan == b_nan ? a.id < b.id : b_nan;
    }
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

__device__ __forceinline__ Ranked warp_best(Ranked best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const Ranked other{__shfl_xor_sync(0xffffffffu, best.value, offset),
                           __shfl_xor_sync(0xffffffffu, best.id, offset)};
        if (precedes(other, best)) {
            best = other;
        }
    }
    return best;
}

__device__ __forceinline__ double sigmoid_f64(double x) {
    return __drcp_rn(__dadd_rn(1.0, exp(-x)));  // a reciprocal rounds as 1.0 / x does
}

// One token's logits and the order they put the experts in.
struct TokenRanking {
    const StepParams& p;
    const float* logits;  // [E]
    double* cache;        // [kCachedRankings], shared, this warp's
    uint32_t* groups;     // [kMaxGroups / 32], shared, this warp's: bit set = group chosen

    __device__ double compute(int expert) const {
        const double logit = logits[expert];
        if (p.scoring != kSigmoid) {
            return logit;
        }
        const double score = sigmoid_f64(logit);
        return p.correction_bias == nullptr
                   ? score
                   : __dadd_rn(score, static_cast<double>(p.correction_bias[expert]));
    }
    __device__ double of(int expert) const {
        return expert < kCachedRankings ? cache[expert] : compute(expert);
    }
    __device__ bool group_is_chosen(int group) const {
        return (groups[group / 32] >> (group % 32) & 1) != 0;
    }

    __device__ void fill(int lane) {
        for (int e = lane; e < min(p.experts, kCachedRankings); e += 32) {
            cache[e] = compute(e);
        }
        __syncwarp();
    }

    // Sum of the two best rankings of a group; NaN is passed over.
    __device__ double top_two(int group) const {
        const int size = p.experts / p.groups;
        double first = -INFINITY;
        double second = -INFINITY;
        for (int e = group * size; e < (group + 1) * size; e++) {
            const double value = of(e);
            if (value > first) {
                second = first;
                first = value;
            } else if (value > second) {
                second = value;
            }
        }
        return size == 1 ? first : __dadd_rn(first, second);
    }

    __device__ void choose_groups(int lane) {
        for (int word = lane; word < kMaxGroups / 32; word += 32) {
            groups[word] = 0;
        }
        __syncwarp();
        const double own_sum = lane < p.groups ? top_two(lane) : 0.0;
        for (int chosen = 0; chosen < p.topk_groups; chosen++) {
            Ranked best{0.0, -1};
            for (int g = lane; g < p.groups; g += 32) {
                const Ranked candidate{g == lane ? own_sum : top_two(g), g};
                if (!group_is_chosen(g) && precedes(candidate, best)) {
                    best = candidate;
                }
            }
            best = warp_best(best);
            __syncwarp();
            if (lane == 0) {
                groups[best.id / 32] |= 1u << (best.id % 32);
            }
            __syncwarp();
        }
    }

    // The best expert that none of the first `taken` lanes has chosen.
    __device__ int best(int lane, int chosen_id, int taken) const {
        Ranked best{0.0, -1};
        const int group_size = p.experts / p.groups;
        for (int base = 0; base < p.experts; base += 32) {
            const int e = base + lane;
            bool free = e < p.experts;
            for (int k = 0; k < taken; k++) {
                free &= __shfl_sync(0xffffffffu, chosen_id, k) != e;
            }
            if (free && (p.groups == 1 || group_is_chosen(e / group_size))) {
                const Ranked candidate{of(e), e};
                if (precedes(candidate, best)) {
                    best = candidate;
                }
            }
        }
        return warp_best(best).id;
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
    for (int k = 0; k < p.top_k; k++) {
        const int chosen = ranking.best(lane, id, k);
        if (lane == k) {
            id = chosen;
        }
    }

    // The score of the lane's expert, before any division by the chosen scores' sum
    double score = 0.0;
    const double logit = id >= 0 ? static_cast<double>(ranking.logits[id]) : 0.0;
    if (p.scoring == kSoftmax) {
        double max = -INFINITY;
        for (int e = lane; e < p.experts; e += 32) {
            const double value = ranking.logits[e];
            max = isnan(value) || isnan(max) ? NAN : (value > max ? value : max);
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const double other = __shfl_xor_sync(0xffffffffu, max, offset);
            max = isnan(other) || isnan(max) ? NAN : (other > max ? other : max);
        }
        double sum = 0.0;
        for (int e = lane; e < p.experts; e += 32) {
            sum = __dadd_rn(sum, exp(static_cast<double>(ranking.logits[e]) - max));
        }
        sum = warp_sum(sum);
        score = exp(logit - max) / sum;
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
    __shared__ double cache[kTopKWarps][kCachedRankings];
    __shared__ uint32_t groups[kTopKWarps][kMaxGroups / 32];
    const LocalRank& me = p.locals[blockIdx.y];
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;

    // Snapshot T and begin the step
    const int asked = *me.token_count;
    const int num_tokens = clamp_tokens(asked, p.max_tokens);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        *me.home_tokens = num_tokens;
        me.epoch[kThisStep] = me.epoch[kLastStep] + 1;
        add_total(me, kTotalOverCapacity, asked > p.max_tokens ? asked - p.max_tokens : 0);
    }

    const uint64_t members = *me.members;
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
            const float* logits = p.routing_input == kLogits ? me.router_logits : me.logits;
            TokenRanking ranking{p, logits + token * p.experts, cache[warp], groups[warp]};
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
