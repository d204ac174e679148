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
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr int kLogitsThreads = 256;
constexpr int kLogitsWarps = kLogitsThreads / 32;
constexpr int kStagedColumns = 7168;  // of an expert's row, in shared memory at once
constexpr int kStepColumns = 128;     // of a warp
constexpr int kFewTokens = 64;
constexpr int kFewUnits = 256;        // so many (expert, 8 tokens) run side by side

// Loads of hidden states in flight.
template <bool kWhole>
constexpr int kLoadsAhead = kWhole ? 16 : 4;

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

// The whole CTA: columns [first, first + kStagedColumns) of an expert's row, zeros up to a whole step. Whoever
// reads them waits for the copies, and for the CTA.
__device__ __forceinline__ void stage_row(float4* staged, const StepParams& p, int expert, int first, bool vectors) {
    const int columns = min(p.hidden - first, kStagedColumns);
    const float* row = ptx::global(p.router) + static_cast<int64_t>(expert) * p.hidden + first;
    float* elements = reinterpret_cast<float*>(staged);
    if (vectors) {
        const uint32_t to = ptx::shared_address(staged);
#pragma unroll 4
        for (int i = threadIdx.x; i < columns / 4; i += kLogitsThreads) {
            ptx::cp_async_16(to + i * 16, row + i * 4);
        }
    } else {
        for (int i = threadIdx.x; i < columns; i += kLogitsThreads) {
            elements[i] = row[i];
        }
    }
    const int end = (columns + kStepColumns - 1) / kStepColumns * kStepColumns;
    for (int i = columns + threadIdx.x; i < end; i += kLogitsThreads) {
        elements[i] = 0.0f;
    }
    ptx::cp_async_commit();
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

    __device__ __forceinline__ void add_to(double (&sums)[kTokens], const float4* staged, int steps, bool bf16) const {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            if (s >= steps) {
                return;
            }
            const float4 w = staged[s * 32];
            const double weights[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int t = 0; t < kTokens; t++) {
                float x[4];
                unpack_columns<kWhole>(x, raw[s][t], bf16);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sums[t] = __fma_rn(static_cast<double>(x[i]), weights[i], sums[t]);
                }
            }
        }
    }
};

// The expert whose row, from a column on, is in shared memory.
struct Staged {
    float4* columns;
    int expert;
    int first;
};

// Units of an expert and kLogitsWarps * kTokens tokens. ahead: of the first unit, this warp's tokens.
template <int kTokens, int kSteps, bool kWhole>
__device__ __forceinline__ void few_tokens(const StepParams& p, const RouterInput& in, int num_tokens, Staged staged,
                                           bool router_vectors, HiddenChunk<kTokens, kSteps, kWhole>& ahead,
                                           bool is_loaded) {
    using Chunk = HiddenChunk<kTokens, kSteps, kWhole>;
    constexpr int kUnitTokens = kLogitsWarps * kTokens;
    const bool bf16 = p.hidden_dtype == kBF16;
    const int lane = threadIdx.x % 32;
    const int units = p.experts * ((num_tokens + kUnitTokens - 1) / kUnitTokens);
#pragma unroll 1
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const int group = unit / p.experts;
        const int expert = unit - group * p.experts;
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
            }
            const int end = min(p.hidden, first + kStagedColumns);
            if (active && !is_loaded) {
                ahead.load(p, in, token0, num_tokens, first);
            }
            is_loaded = false;
            ptx::cp_async_wait<0>();
            __syncthreads();
            if (!active) {
                continue;
            }
            const float4* weights = staged.columns + lane;
#pragma unroll 1
            for (int column = first; column < end; column += kSteps * kStepColumns) {
                const Chunk chunk = ahead;
                const int next = column + kSteps * kStepColumns;
                if (next < end) {
                    ahead.load(p, in, token0, num_tokens, next);
                }
                chunk.add_to(sums, weights, (end - column + kStepColumns - 1) / kStepColumns, bf16);
                weights += kSteps * 32;
            }
        }
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const double sum = warp_sum(sums[t]);
            if (lane == 0 && token0 + t < num_tokens) {
                store_logit(p, in, token0 + t, expert, sum);
            }
        }
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
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();
    // The first tokens do not wait for T: those past it are there, and are not used
    HiddenChunk<1, kLoadsAhead<kWhole>, kWhole> ahead;
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
        few_tokens<1, kLoadsAhead<kWhole>, kWhole>(p, in, num_tokens, staged, router_vectors, ahead, is_loaded);
    } else {
        HiddenChunk<4, kLoadsAhead<kWhole> / 4, kWhole> first;
        few_tokens<4, kLoadsAhead<kWhole> / 4, kWhole>(p, in, num_tokens, staged, router_vectors, first, false);
    }
    ptx::cp_async_wait<0>();
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kLogitsThreads, 2)
void moe_route_logits(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ float4 columns[kStagedColumns / 4];
    const LocalRank& me = p.locals[blockIdx.y];
    const bool router_vectors = rows_are_vectors(p.router, p.hidden, kF32);
    Staged staged{columns, -1, 0};
    if (blockIdx.x < p.experts) {
        staged.expert = blockIdx.x;
        stage_row(columns, p, staged.expert, 0, router_vectors);
    }
    const RouterInput in{me.hidden, me.token_count, me.logits};
    if (router_vectors && p.hidden_dtype != kF32 && rows_are_vectors(in.hidden, p.hidden, p.hidden_dtype)) {
        route_logits<true>(p, in, staged, router_vectors);
    } else {
        route_logits<false>(p, in, staged, router_vectors);
    }
}
