// Logits or the caller's choice -> sanitised ids, weights and the mask of ranks of each token.
//
// Selection runs in float64 on the ranking of RoutingRule.java: K passes, each the best expert not yet
// taken, ties to the lowest id, NaN below every number. One warp does that for a token; where there is a CTA
// for each token, the others compute scores for it, else every warp has tokens of its own.
// CTA 0 of a rank also takes the snapshot of T and advances the epoch.
// A rank that is no member gets no rows: its bit is left out of home_mask, and the row is counted.
// Reads token_count, members, topk_ids and topk_weights or router_logits or logits. Writes home_tokens,
// home_ids, home_weights, home_mask, epoch, totals.
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../common/math.cuh"
#include "../layout/recv_buffer.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

constexpr int kTopKThreads = 256;
constexpr int kTopKWarps = kTopKThreads / 32;
constexpr int kMostHeld = 16;  // experts of a lane
constexpr int kHeldExperts = kMostHeld * 32;
constexpr int kHeldGroups = 32;
constexpr int kMaxGroups = 1024;

// Rankings as numbers of the same order, since a warp finds the greatest of 32 bits in one instruction: 64 bits of
// a float64, or 32 of a logit. NaN is below every number, and zero, for nothing at all, below NaN.
template <class Order>
constexpr Order kNaN = 1;
constexpr uint64_t kLowest = 0x000fffffffffffffull;  // -infinity

__device__ __forceinline__ uint64_t order_of(double ranking) {
    // why by integers: an operation on float64 takes as long as several of these
    const uint64_t bits = __double_as_longlong(ranking);
    const uint64_t magnitude = bits << 1;
    const uint64_t order = bits >> 63 != 0 && magnitude != 0 ? ~bits : bits | 1ull << 63;  // -0 equals 0
    return magnitude > 0xffe0000000000000ull ? kNaN<uint64_t> : order;
}

__device__ __forceinline__ uint32_t order_of(float ranking) {
    const uint32_t bits = __float_as_uint(__fadd_rn(ranking, 0.0f));
    return isnan(ranking) ? kNaN<uint32_t> : (bits >> 31 != 0 ? ~bits : bits | 1u << 31);
}

__device__ __forceinline__ double ranking_of(uint64_t order) {
    return __longlong_as_double(order >> 63 != 0 ? order & ~(1ull << 63) : ~order);
}

__device__ __forceinline__ float ranking_of(uint32_t order) {
    return __uint_as_float(order >> 31 != 0 ? order & ~(1u << 31) : ~order);
}

__device__ __forceinline__ double sigmoid_f64(double x) {
    return __drcp_rn(__dadd_rn(1.0, exp(-x)));  // a reciprocal rounds as 1.0 / x does
}

template <class Order>
struct Ranked {
    Order order;
    int id;

    // Strictly above, equal ones by the lower id.
    __device__ __forceinline__ bool is_above(const Ranked& other) const {
        return order > other.order || (order == other.order && id < other.id);
    }
};

// Of two by ascending ids.
template <class Order>
__device__ __forceinline__ Ranked<Order> greater(const Ranked<Order>& low, const Ranked<Order>& high) {
    return high.order > low.order ? high : low;
}

template <class Order>
__device__ __forceinline__ Ranked<Order> before_all() {
    return Ranked<Order>{~Order{0}, -1};
}

// The greatest of a warp, of those the lowest id.
template <class Order>
__device__ __forceinline__ Ranked<Order> warp_best(const Ranked<Order>& mine) {
    Ranked<Order> best;
    bool is_best;
    if constexpr (sizeof(Order) == 4) {
        best.order = __reduce_max_sync(0xffffffffu, mine.order);
        is_best = mine.order == best.order;
    } else {
        const uint32_t high = static_cast<uint32_t>(mine.order >> 32);
        const uint32_t low = static_cast<uint32_t>(mine.order);
        const uint32_t best_high = __reduce_max_sync(0xffffffffu, high);
        const uint32_t best_low = __reduce_max_sync(0xffffffffu, high == best_high ? low : 0);
        best.order = static_cast<uint64_t>(best_high) << 32 | best_low;
        is_best = mine.order == best.order;
    }
    best.id = __reduce_min_sync(0xffffffffu, is_best ? static_cast<uint32_t>(mine.id) : 0x7fffffffu);
    return best;
}

// What a token's warps have in shared memory.
struct TokenShared {
    double scores[kHeldExperts];  // of the first experts: rankings before they are corrected, then of a softmax
                                  // exp(logit - greatest)
    uint64_t group_orders[kHeldGroups];
    uint32_t groups[kMaxGroups / 32];  // bit set: chosen
    float greatest;                    // logit; NaN if there is one
};

// The warps that work on a token together: one, or all of a CTA.
struct Team {
    int thread;
    int threads;

    __device__ __forceinline__ bool leads() const { return thread < 32; }
    __device__ __forceinline__ void sync() const {
        if (threads == 32) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
};

struct TokenRanking {
    const StepParams& p;
    const float* logits;  // [E]
    const float* bias;    // [kHeldExperts], shared: what corrects a sigmoid, or 0
    TokenShared& shared;
    Team team;
    int held;             // experts that have a place in shared memory
    int group_size;
    bool whole;           // rankings are of float64, and there; else the logits themselves

    __device__ __forceinline__ TokenRanking(const StepParams& p, const float* logits, const float* bias,
                                            TokenShared& shared, Team team, int group_size)
        : p(p), logits(logits), bias(bias), shared(shared), team(team), held(min(p.experts, kHeldExperts)),
          group_size(group_size),
          whole(p.scoring == kSigmoid || p.groups > 1 || p.experts > kHeldExperts) {}

    // Before it is corrected.
    __device__ __forceinline__ double score(int expert) const {
        const double logit = logits[expert];
        return p.scoring == kSigmoid ? sigmoid_f64(logit) : logit;
    }
    __device__ __forceinline__ uint64_t rank_held(int expert) const {
        return order_of(__dadd_rn(shared.scores[expert], static_cast<double>(bias[expert])));
    }
    // why not inlined: few layers have so many experts, and a kernel's code is fetched from memory
    __device__ __noinline__ static uint64_t rank_far(const float* logits, const float* correction, bool is_sigmoid,
                                                     int expert) {
        const double logit = logits[expert];
        const double score = is_sigmoid ? sigmoid_f64(logit) : logit;
        return order_of(is_sigmoid && correction != nullptr ? __dadd_rn(score, static_cast<double>(correction[expert]))
                                                            : score);
    }
    __device__ __forceinline__ uint64_t rank(int expert) const {
        return expert < held ? rank_held(expert) : rank_far(logits, p.correction_bias, p.scoring == kSigmoid, expert);
    }

    __device__ __forceinline__ bool group_is_chosen(int group) const {
        return (shared.groups[group / 32] >> (group % 32) & 1) != 0;
    }

    // Sum of the two best rankings of a group, by 2^log_lanes lanes side by side; NaN is passed over.
    __device__ __forceinline__ uint64_t top_two(int group, int log_lanes) const {
        const int lanes = 1 << log_lanes;
        const int size = group_size;
        uint64_t first = kLowest;
        uint64_t second = kLowest;
        if (group < p.groups) {
#pragma unroll 1
            for (int e = group * size + (static_cast<int>(threadIdx.x) & (lanes - 1)); e < (group + 1) * size; e += lanes) {
                const uint64_t order = rank(e);
                second = max(second, min(first, order));
                first = max(first, order);
            }
        }
#pragma unroll 1
        for (int offset = lanes / 2; offset > 0; offset /= 2) {
            const uint64_t other_first = __shfl_xor_sync(0xffffffffu, first, offset);
            const uint64_t other_second = __shfl_xor_sync(0xffffffffu, second, offset);
            second = max(min(first, other_first), max(second, other_second));
            first = max(first, other_first);
        }
        return order_of(size == 1 ? ranking_of(first) : __dadd_rn(ranking_of(first), ranking_of(second)));
    }

    // All of a team.
    __device__ __forceinline__ void rank_groups() const {
        int log_lanes = 5;
        while (log_lanes > 0 && team.threads >> log_lanes < p.groups) {
            log_lanes--;
        }
        const int first = team.thread >> log_lanes;
        const int first_of_warp = (team.thread & ~31) >> log_lanes;
#pragma unroll 1
        for (int round = 0; first_of_warp + round < p.groups; round += team.threads >> log_lanes) {
            const uint64_t order = top_two(first + round, log_lanes);
            if ((team.thread & ((1 << log_lanes) - 1)) == 0 && first + round < p.groups) {
                shared.group_orders[first + round] = order;
            }
        }
    }

    // The warp that leads, once groups are ranked.
    __device__ __forceinline__ void choose_groups() const {
        const int lane = threadIdx.x % 32;
        shared.groups[lane] = 0;
        __syncwarp();
        Ranked<uint64_t> last = before_all<uint64_t>();
#pragma unroll 1
        for (int chosen = 0; chosen < p.topk_groups; chosen++) {
            Ranked<uint64_t> best{0, p.groups};
#pragma unroll 1
            for (int group = lane; group < p.groups; group += 32) {
                const Ranked<uint64_t> candidate{p.groups <= kHeldGroups ? shared.group_orders[group] : top_two(group, 0),
                                                 group};
                if (last.is_above(candidate) && candidate.is_above(best)) {
                    best = candidate;
                }
            }
            last = warp_best(best);
            if (lane == 0) {
                shared.groups[last.id / 32] |= 1u << (last.id % 32);
            }
        }
        __syncwarp();
    }

    // The warp that leads: lane k < K returns the k-th id. Lane l holds experts l, l + 32, ...
    template <class Order, int kHeld>
    __device__ __forceinline__ int choose() const {
        const int lane = threadIdx.x % 32;
        Order order[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int e = lane + 32 * i;
            order[i] = 0;
            if (e < p.experts) {
                if constexpr (sizeof(Order) == 4) {
                    order[i] = order_of(logits[e]);
                } else {
                    order[i] = rank_held(e);
                }
            }
        }
        if (sizeof(Order) == 8 && p.groups > 1) {
            const Divider by_size = Divider::of(group_size);
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const int e = lane + 32 * i;
                if (e < p.experts && !group_is_chosen(by_size.quotient(e))) {
                    order[i] = 0;
                }
            }
        }
        int id = -1;
#pragma unroll 1
        for (int k = 0; k < p.top_k; k++) {
            // The lane's best, of equal ones the lowest; four at a time, since more cost registers
            Ranked<Order> best{0, 0};
#pragma unroll
            for (int i = 0; i < kHeld; i += 4) {
                const Ranked<Order> low = greater(Ranked<Order>{order[i], i}, Ranked<Order>{order[i + 1], i + 1});
                const Ranked<Order> high = greater(Ranked<Order>{order[i + 2], i + 2}, Ranked<Order>{order[i + 3], i + 3});
                best = i == 0 ? greater(low, high) : greater(best, greater(low, high));
            }
            best.id = lane + 32 * best.id;
            best = warp_best(best);
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                order[i] = lane + 32 * i == best.id ? 0 : order[i];
            }
            id = lane == k ? best.id : id;
        }
        return id;
    }

    // The same of any number of experts, each ranked anew in every pass.
    __device__ __forceinline__ int choose_of_many() const {
        const int lane = threadIdx.x % 32;
        const Divider by_size = Divider::of(group_size);
        int id = -1;
        Ranked<uint64_t> last = before_all<uint64_t>();
#pragma unroll 1
        for (int k = 0; k < p.top_k; k++) {
            Ranked<uint64_t> best{0, p.experts};
#pragma unroll 1
            for (int e = lane; e < p.experts; e += 32) {
                if (p.groups == 1 || group_is_chosen(by_size.quotient(e))) {
                    const Ranked<uint64_t> candidate{rank(e), e};
                    if (last.is_above(candidate) && candidate.is_above(best)) {
                        best = candidate;
                    }
                }
            }
            last = warp_best(best);
            id = lane == k ? last.id : id;
        }
        return id;
    }

    template <class Order>
    __device__ __forceinline__ int choose_of_held() const {
        if (p.experts <= 128) {
            return choose<Order, 4>();
        }
        return p.experts <= 256 ? choose<Order, 8>() : choose<Order, kMostHeld>();
    }

    // exp(logit - greatest), by all of a team but, where it has others, the warp that chooses meanwhile.
    __device__ __forceinline__ void exponentials() const {
        const int idle = team.threads == 32 ? 0 : 32;
        if (team.thread < idle || team.thread / 32 * 32 - idle >= held) {
            return;
        }
        uint32_t largest = 0;
        bool any_nan = false;
#pragma unroll 4
        for (int e = threadIdx.x % 32; e < p.experts; e += 32) {
            const uint32_t order = order_of(logits[e]);
            any_nan |= order == kNaN<uint32_t>;
            largest = max(largest, order);
        }
        largest = __reduce_max_sync(0xffffffffu, largest);
        const float greatest = __any_sync(0xffffffffu, any_nan) ? NAN : ranking_of(largest);
        if (team.thread == idle) {
            shared.greatest = greatest;
        }
#pragma unroll 1
        for (int e = team.thread - idle; e < held; e += team.threads - idle) {
            shared.scores[e] = exponential(logits[e], greatest);
        }
    }

    __device__ __forceinline__ static double exponential(float logit, float greatest) {
        return exp(static_cast<double>(logit) - static_cast<double>(greatest));
    }

    // All of a team. Lane k < K of the warp that leads leaves with the k-th id and its weight.
    __device__ __forceinline__ void select(int& id, float& weight) const {
        if (whole) {
#pragma unroll 1
            for (int e = team.thread; e < held; e += team.threads) {
                shared.scores[e] = score(e);
            }
            team.sync();
        }
        if (p.groups > 1) {
            if (p.groups <= kHeldGroups) {
                rank_groups();
                team.sync();
            }
            if (team.leads()) {
                choose_groups();
            }
        }
        if (team.leads()) {
            id = !whole ? choose_of_held<uint32_t>()
                        : (p.experts <= kHeldExperts ? choose_of_held<uint64_t>() : choose_of_many());
        }
        if (p.scoring == kSoftmax) {
            if (whole) {
                team.sync();  // why: exponentials take the place of rankings
            }
            exponentials();
            team.sync();
        }
        if (team.leads()) {
            weight = weigh(id);
        }
    }

    __device__ __forceinline__ float weigh(int id) const {
        const int lane = threadIdx.x % 32;
        double score = 0.0;  // of the lane's expert, before any division by the chosen scores' sum
        if (p.scoring == kTopKSoftmax) {
            const double logit = id >= 0 ? static_cast<double>(logits[id]) : 0.0;
            // why lane 0: ids are in descending order, the first has the largest logit
            score = exp(logit - __shfl_sync(0xffffffffu, logit, 0));
        } else if (id >= 0 && id < held) {
            score = shared.scores[id];
        } else if (id >= 0) {
            score = p.scoring == kSigmoid ? this->score(id) : exponential(logits[id], shared.greatest);
        }
        if (p.scoring == kSoftmax) {
            double sum = 0.0;
#pragma unroll 4
            for (int e = lane; e < held; e += 32) {
                sum = __dadd_rn(sum, shared.scores[e]);
            }
#pragma unroll 1
            for (int e = lane + kHeldExperts; e < p.experts; e += 32) {
                sum = __dadd_rn(sum, exponential(logits[e], shared.greatest));
            }
            score = score / warp_sum(sum);
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
        return __double2float_rn(__dmul_rn(score / divisor, static_cast<double>(p.scale)));
    }
};

// What becomes of a token's choice; one warp, whose lanes k < K hold it.
struct HomeTokenWriter {
    const StepParams& p;
    int32_t* ids;
    float* weights;
    uint64_t* masks;
    Divider by_experts;  // of a rank
    uint64_t members;
    uint32_t lost;

    __device__ __forceinline__ void write(int64_t token, int id, float weight) {
        const int lane = threadIdx.x % 32;
        // The ranks that have an expert of this token
        const uint64_t bit = lane < p.top_k && id >= 0 ? 1ull << by_experts.quotient(id) : 0;
        const uint32_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit));
        const uint32_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit >> 32));
        if (lane < p.top_k) {
            ids[token * p.top_k + lane] = id;
            weights[token * p.top_k + lane] = weight;
        }
        if (lane == 0) {
            const uint64_t mask = static_cast<uint64_t>(high) << 32 | low;
            masks[token] = mask & members;
            lost += __popcll(mask & ~members);
        }
    }
};

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kTopKThreads, 2)
void moe_route_topk(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ TokenShared shared[kTopKWarps];
    __shared__ float bias[kHeldExperts];
    const LocalRank& me = p.locals[blockIdx.y];
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int32_t* token_count = ptx::global(me.token_count);
    const uint64_t* member_mask = ptx::global(me.members);
    const float* all_logits = ptx::global(p.routing_input == kLogits ? me.router_logits : me.logits);
    const int group_size = p.experts / p.groups;
    int32_t* home_tokens = ptx::global(me.home_tokens);
    uint64_t* epoch = ptx::global(me.epoch);
    HomeTokenWriter home{p, ptx::global(me.home_ids), ptx::global(me.home_weights), ptx::global(me.home_mask),
                         Divider::of(p.experts_per_rank), 0, 0};
    // No step changes it
    for (int e = threadIdx.x; e < min(p.experts, kHeldExperts); e += kTopKThreads) {
        bias[e] = p.scoring == kSigmoid && p.correction_bias != nullptr ? p.correction_bias[e] : 0.0f;
    }
    __syncthreads();
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();

    const int asked = *token_count;
    home.members = *member_mask;
    const int num_tokens = clamp_tokens(asked, p.max_tokens);
    uint32_t dropped = 0;
    uint32_t duplicates = 0;
    const int ctas = static_cast<int>(gridDim.x);
    if (p.routing_input != kTopK) {
        // Where there is a CTA for every token that may be, a choice does not wait for T, and is not written if the
        // token is past it
        int tokens = p.max_tokens;
        if (tokens > ctas) {
            tokens = num_tokens;
            asm volatile("" ::: "memory");  // why: without it the compiler waits for T in any case
        }
        const bool together = tokens <= ctas;
        const Team team = together ? Team{static_cast<int>(threadIdx.x), kTopKThreads} : Team{lane, 32};
        const int first = static_cast<int>(blockIdx.x) * (together ? 1 : kTopKWarps) + (together ? 0 : warp);
        const int stride = ctas * (together ? 1 : kTopKWarps);
#pragma unroll 1
        for (int token = first; token < tokens; token += stride) {
            const TokenRanking ranking(p, all_logits + static_cast<int64_t>(token) * p.experts, bias,
                                       shared[together ? 0 : warp], team, group_size);
            int id = -1;
            float weight = 0.0f;
            ranking.select(id, weight);
            if (team.leads() && token < num_tokens) {
                home.write(token, id, weight);
            }
            __syncwarp();  // why: the next token reuses the warp's shared memory
        }
    } else {
#pragma unroll 1
        for (int token = blockIdx.x * kTopKWarps + warp; token < num_tokens; token += ctas * kTopKWarps) {
            // Lane k holds the k-th choice
            int id = -1;
            float weight = 0.0f;
            if (lane < p.top_k) {
                id = me.topk_ids[static_cast<int64_t>(token) * p.top_k + lane];
                weight = me.topk_weights[static_cast<int64_t>(token) * p.top_k + lane];
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
            home.write(token, id, weight);
        }
    }
    // Snapshot T and begin the step. why the last warp, so late: the first one is who is waited for
    if (blockIdx.x == 0 && threadIdx.x == kTopKThreads - 1) {
        const uint64_t last = epoch[kLastStep];
        *home_tokens = num_tokens;
        epoch[kThisStep] = last + 1;
        add_total(me, kTotalOverCapacity, asked > p.max_tokens ? asked - p.max_tokens : 0);
    }
    dropped = __reduce_add_sync(0xffffffffu, dropped);
    duplicates = __reduce_add_sync(0xffffffffu, duplicates);
    if (lane == 0) {
        add_total(me, kTotalDropped, dropped);
        add_total(me, kTotalDuplicates, duplicates);
        add_total(me, kTotalLostRows, home.lost);
    }
}
