// logits[t][e] = router[e] . hidden[t] + bias[e], summed in float64 and rounded to float32 once.
//
// Lane l of a warp adds the elements of chunks l, l + 32, ... of four columns in order, then a butterfly adds
// the lanes: the same sum in every form, so a token's logits do not depend on its mates.
// Few tokens: a CTA has one expert, whose row it asks for before the kernel before it has ended, since no step
// changes it; its warps share the tokens. Many: a warp has 4 tokens x 4 experts.
// Reads hidden, token_count, router. Writes logits rows < T.
#include <type_traits>

#include "../common/math.cuh"
#include "../layout/foreign.cuh"
#include "../layout/recv_buffer.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr int kLogitsThreads = 256;
constexpr int kLogitsWarps = kLogitsThreads / 32;
constexpr int kStagedColumns = 7168;  // of an expert's row, in shared memory at once
constexpr int kStepColumns = 128;     // of a warp
constexpr int kChunkSteps = 8;        // a row is staged in multiples of so many
constexpr int kChunkColumns = kChunkSteps * kStepColumns;
constexpr int kFewTokens = 64;
constexpr int kFewUnits = 256;        // so many (expert, 8 tokens) run side by side

// Four columns of hidden states as they were loaded. kWhole: hidden states of 16 bits and the router both in
// vectors, so that loads need no branch and many are in flight.
template <bool kWhole>
using RawColumns = std::conditional_t<kWhole, uint2, float4>;

template <bool kWhole>
__device__ __forceinline__ RawColumns<kWhole> load_columns(const StepParams& p, const void* hidden, int64_t row,
                                                           int column) {
    if constexpr (kWhole) {
        return *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(hidden) + row * p.hidden + column);
    } else {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = column + i < p.hidden ? load_element(hidden, row * p.hidden + column + i, p.hidden_dtype) : 0.0f;
        }
        return make_float4(v[0], v[1], v[2], v[3]);
    }
}

template <bool kWhole>
__device__ __forceinline__ void unpack_columns(float (&v)[4], RawColumns<kWhole> raw, bool bf16) {
    if constexpr (kWhole) {
        if (bf16) {
            v[0] = bf16_low(raw.x), v[1] = bf16_high(raw.x);
            v[2] = bf16_low(raw.y), v[3] = bf16_high(raw.y);
        } else {
            const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
            const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
            v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
        }
    } else {
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
    }
}

// What a kernel reads of its rank, before the wait.
struct RouterInput {
    const void* hidden;
    const int32_t* token_count;
    float* logits;
};

__device__ __forceinline__ void store_logit(const StepParams& p, const RouterInput& in, int token, int expert,
                                            double sum) {
    const double logit =
        p.router_bias == nullptr ? sum : __dadd_rn(sum, static_cast<double>(p.router_bias[expert]));
    in.logits[static_cast<int64_t>(token) * p.experts + expert] = __double2float_rn(logit);
}

// ------------------------------------------------------------------------------------- few tokens

// Columns of an expert's row as float64 in shared memory, a step after another: of each lane's four the first
// two, then the other two, so that a warp reads 512 bytes side by side.
// why float64: converting takes longer than adding, and here the warps that wait can do it.
constexpr int kLogitsSharedBytes = kStagedColumns * 8;

// The whole CTA: columns from first on, zeros up to a whole chunk. Whoever reads them waits for the CTA.
__device__ __forceinline__ void stage_row(double2* staged, const StepParams& p, int expert, int first, bool vectors) {
    constexpr int kLoads = kStagedColumns / 4 / kLogitsThreads;
    const int columns = p.hidden - first;
    const int steps = min((columns + kChunkColumns - 1) / kChunkColumns, kStagedColumns / kChunkColumns) * kChunkSteps;
    const float* row = ptx::global(p.router) + static_cast<int64_t>(expert) * p.hidden + first;
    float4 w[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int quad = threadIdx.x + i * kLogitsThreads;
        w[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (vectors && 4 * quad < columns) {
            w[i] = *reinterpret_cast<const float4*>(row + 4 * quad);
        } else if (!vectors) {
            w[i].x = 4 * quad < columns ? row[4 * quad] : 0.0f;
            w[i].y = 4 * quad + 1 < columns ? row[4 * quad + 1] : 0.0f;
            w[i].z = 4 * quad + 2 < columns ? row[4 * quad + 2] : 0.0f;
            w[i].w = 4 * quad + 3 < columns ? row[4 * quad + 3] : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int quad = threadIdx.x + i * kLogitsThreads;
        if (quad < steps * 32) {
            double2* to = staged + quad / 32 * 64 + quad % 32;
            to[0] = make_double2(w[i].x, w[i].y);
            to[32] = make_double2(w[i].z, w[i].w);
        }
    }
}

// Hidden states of kTokens tokens, kSteps steps of a warp from a column on; zeros past the row.
template <int kTokens, int kSteps, bool kWhole>
struct HiddenChunk {
    RawColumns<kWhole> raw[kSteps][kTokens];

    __device__ __forceinline__ void load(const StepParams& p, const RouterInput& in, int token0, int num_tokens,
                                         int column) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const int at = column + s * kStepColumns + 4 * (threadIdx.x % 32);
#pragma unroll
            for (int t = 0; t < kTokens; t++) {
                raw[s][t] = RawColumns<kWhole>{};
                if (at < p.hidden) {
                    // why min: what overhangs reads the last token again and drops the result
                    raw[s][t] = load_columns<kWhole>(p, in.hidden, min(token0 + t, num_tokens - 1), at);
                }
            }
        }
    }

    // why no look at the end of the row, where both are zero: a branch would end what runs side by side
    __device__ __forceinline__ void add_to(double (&sums)[kTokens], const double2* weights, bool bf16) const {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const double2 first = weights[s * 64];
            const double2 second = weights[s * 64 + 32];
            const double w[4] = {first.x, first.y, second.x, second.y};
#pragma unroll
            for (int t = 0; t < kTokens; t++) {
                float x[4];
                unpack_columns<kWhole>(x, raw[s][t], bf16);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sums[t] = __fma_rn(static_cast<double>(x[i]), w[i], sums[t]);
                }
            }
        }
    }
};

// The expert whose row, from a column on, is in shared memory.
struct Staged {
    double2* columns;
    int expert;
    int first;
};

// Units of an expert and kLogitsWarps * kTokens tokens. ahead: of the first unit, this warp's tokens.
template <int kTokens, int kSteps, bool kWhole>
__device__ __forceinline__ void few_tokens(const StepParams& p, const RouterInput& in, int num_tokens, Staged staged,
                                           bool router_vectors, HiddenChunk<kTokens, kSteps, kWhole>& ahead,
                                           bool is_loaded) {
    using Chunk = HiddenChunk<kTokens, kSteps, kWhole>;
    static_assert(kChunkSteps % kSteps == 0, "rows are staged in whole chunks");
    constexpr int kUnitTokens = kLogitsWarps * kTokens;
    const bool bf16 = p.hidden_dtype == kBF16;
    const int lane = threadIdx.x % 32;
    const int groups = (num_tokens + kUnitTokens - 1) / kUnitTokens;
    // Expert and group of tokens of the first unit, without a division where there is a CTA for each expert
    int group = 0;
    int expert = blockIdx.x;
#pragma unroll 1
    while (true) {
        while (expert >= p.experts) {
            expert -= p.experts;
            group++;
        }
        if (group >= groups) {
            return;
        }
        const int token0 = group * kUnitTokens + threadIdx.x / 32 * kTokens;
        const bool active = token0 < num_tokens;
        double sums[kTokens] = {};
#pragma unroll 1
        for (int first = 0; first < p.hidden; first += kStagedColumns) {
            if (expert != staged.expert || first != staged.first) {
                __syncthreads();
                stage_row(staged.columns, p, expert, first, router_vectors);
                staged.expert = expert;
                staged.first = first;
                __syncthreads();
            }
            if (!active) {
                continue;
            }
            if (!is_loaded) {
                ahead.load(p, in, token0, num_tokens, first);
            }
            is_loaded = false;
            const int end = min(p.hidden, first + kStagedColumns);
            const double2* weights = staged.columns + lane;
#pragma unroll 1
            for (int column = first; column < end; column += kSteps * kStepColumns) {
                const Chunk chunk = ahead;
                const int next = column + kSteps * kStepColumns;
                if (next < end) {
                    ahead.load(p, in, token0, num_tokens, next);
                }
                chunk.add_to(sums, weights, bf16);
                weights += kSteps * 64;
            }
        }
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            sums[t] = warp_sum(sums[t]);
        }
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            if (lane == t && token0 + t < num_tokens) {
                store_logit(p, in, token0 + t, expert, sums[t]);
            }
        }
        expert += gridDim.x;
    }
}

// ------------------------------------------------------------------------------------- many tokens

template <int kTokens, int kExperts, bool kWhole>
__device__ __forceinline__ void router_block(const StepParams& p, const RouterInput& in, int token0, int expert0,
                                             int num_tokens) {
    const int lane = threadIdx.x % 32;
    const bool bf16 = p.hidden_dtype == kBF16;
    double sums[kTokens][kExperts] = {};

    // Blocks that overhang read their last valid row again and drop the result
    for (int column = 4 * lane; column < p.hidden; column += kStepColumns) {
        RawColumns<kWhole> raw[kTokens];
        float4 w[kExperts];
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            raw[t] = load_columns<kWhole>(p, in.hidden, min(token0 + t, num_tokens - 1), column);
        }
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            const float* row = ptx::global(p.router) + static_cast<int64_t>(min(expert0 + e, p.experts - 1)) * p.hidden;
            if (kWhole) {
                w[e] = *reinterpret_cast<const float4*>(row + column);
            } else {
                // why: columns past H add 0 * 0, which changes no sum
                w[e].x = row[column];
                w[e].y = column + 1 < p.hidden ? row[column + 1] : 0.0f;
                w[e].z = column + 2 < p.hidden ? row[column + 2] : 0.0f;
                w[e].w = column + 3 < p.hidden ? row[column + 3] : 0.0f;
            }
        }
        double x[kTokens][4];
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            float v[4];
            unpack_columns<kWhole>(v, raw[t], bf16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[t][i] = v[i];
            }
        }
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            const double weights[4] = {w[e].x, w[e].y, w[e].z, w[e].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int t = 0; t < kTokens; t++) {
                    sums[t][e] = __fma_rn(x[t][i], weights[i], sums[t][e]);
                }
            }
        }
    }

#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            const double sum = warp_sum(sums[t][e]);
            if (lane == 0 && token0 + t < num_tokens && expert0 + e < p.experts) {
                store_logit(p, in, token0 + t, expert0 + e, sum);
            }
        }
    }
}

template <bool kWhole>
__device__ __forceinline__ void many_tokens(const StepParams& p, const RouterInput& in, int num_tokens) {
    constexpr int kTokens = 4;
    constexpr int kExperts = 4;
    const int expert_blocks = (p.experts + kExperts - 1) / kExperts;
    const int token_blocks = (num_tokens + kTokens - 1) / kTokens;
    const int64_t blocks = static_cast<int64_t>(expert_blocks) * token_blocks;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * kLogitsWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kLogitsWarps + threadIdx.x / 32;
#pragma unroll 1
    for (int64_t block = warp; block < blocks; block += warps) {
        router_block<kTokens, kExperts, kWhole>(p, in, static_cast<int>(block / expert_blocks) * kTokens,
                                                static_cast<int>(block % expert_blocks) * kExperts, num_tokens);
    }
}

template <bool kWhole>
__device__ __forceinline__ void route_logits(const StepParams& p, const RouterInput& in, Staged staged,
                                             bool router_vectors) {
    constexpr int kSteps = kWhole ? kChunkSteps : 4;
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();
    // The first tokens do not wait for T: those past it are there, and are not used
    HiddenChunk<1, kSteps, kWhole> ahead;
    const int32_t* token_count = ptx::global(in.token_count);
    const int token = threadIdx.x / 32;
    const bool is_loaded = token < p.max_tokens && blockIdx.x < p.experts;
    const int asked = *token_count;
    if (is_loaded) {
        ahead.load(p, in, token, p.max_tokens, 0);
    }
    const int num_tokens = clamp_tokens(asked, p.max_tokens);
    if (num_tokens > kFewTokens) {
        many_tokens<kWhole>(p, in, num_tokens);
    } else if (p.experts * ((num_tokens + kLogitsWarps - 1) / kLogitsWarps) <= kFewUnits) {
        few_tokens<1, kSteps, kWhole>(p, in, num_tokens, staged, router_vectors, ahead, is_loaded);
    } else {
        HiddenChunk<4, kSteps / 4, kWhole> first;
        few_tokens<4, kSteps / 4, kWhole>(p, in, num_tokens, staged, router_vectors, first, false);
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kLogitsThreads, 2)
void moe_route_logits(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    extern __shared__ double2 router_row[];
    const LocalRank& me = p.locals[blockIdx.y];
    const RouterInput in{me.hidden, me.token_count, me.logits};
    const bool router_vectors = rows_are_vectors(p.router, p.hidden, kF32);
    Staged staged{router_row, -1, 0};
    if (blockIdx.x < p.experts) {
        staged.expert = blockIdx.x;
        stage_row(router_row, p, staged.expert, 0, router_vectors);
        __syncthreads();
    }
    if (router_vectors && p.hidden_dtype != kF32 && rows_are_vectors(in.hidden, p.hidden, p.hidden_dtype)) {
        route_logits<true>(p, in, staged, router_vectors);
    } else {
        route_logits<false>(p, in, staged, router_vectors);
    }
}
