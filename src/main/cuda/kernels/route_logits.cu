// logits[t][e] = router[e] . hidden[t] + bias[e], summed in float64 and rounded to float32 once.
//
// One warp owns a block of tokens x experts: 1 x 1 for one token (as many warps as experts stream
// the router once), 4 x 1 for few, 4 x 4 for many. Lane l adds the elements of chunks l, l + 32, ...
// of four columns in order, then a butterfly adds the lanes: the same sum in every block shape, so a
// token's logits do not depend on its mates.
// Reads hidden, token_count, router. Writes logits rows < T.
#include "../common/math.cuh"
#include "../layout/foreign.cuh"
#include "../layout/recv_buffer.cuh"

namespace moe {

constexpr int kLogitsThreads = 256;

// Four elements as floats, those past the row zero.
__device__ __forceinline__ void load_4(float (&v)[4], const void* base, int64_t row_start, int column,
                                       int columns, int32_t dtype, bool vectors) {
    const int64_t index = row_start + column;
    if (vectors && column + 4 <= columns) {
        if (dtype == kF32) {
            const float4 raw = *reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
            v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
            return;
        }
        const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + index);
        if (dtype == kBF16) {
            v[0] = bf16_low(raw.x), v[1] = bf16_high(raw.x);
            v[2] = bf16_low(raw.y), v[3] = bf16_high(raw.y);
        } else {
            const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
            const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
            v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] = column + i < columns ? load_element(base, index + i, dtype) : 0.0f;
    }
}

template <int kTokens, int kExperts>
__device__ __forceinline__ void router_block(const StepParams& p, const LocalRank& me, int token0,
                                             int expert0, int num_tokens, bool hidden_vectors,
                                             bool router_vectors) {
    const int lane = threadIdx.x % 32;
    double sums[kTokens][kExperts];
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            sums[t][e] = 0.0;
        }
    }

    // Blocks that overhang read their last valid row again and drop the result
    for (int column = 4 * lane; column < p.hidden; column += 128) {
        float x[kTokens][4];
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const int token = min(token0 + t, num_tokens - 1);
            load_4(x[t], me.hidden, static_cast<int64_t>(token) * p.hidden, column, p.hidden,
                   p.hidden_dtype, hidden_vectors);
        }
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            const int expert = min(expert0 + e, p.experts - 1);
            float w[4];
            load_4(w, p.router, static_cast<int64_t>(expert) * p.hidden, column, p.hidden, kF32,
                   router_vectors);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // why: columns past H would add 0 * 0, which changes no sum
#pragma unroll
                for (int t = 0; t < kTokens; t++) {
                    sums[t][e] = __fma_rn(static_cast<double>(x[t][i]), static_cast<double>(w[i]),
                                          sums[t][e]);
                }
            }
        }
    }

#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int e = 0; e < kExperts; e++) {
            const double sum = warp_sum(sums[t][e]);
            const int token = token0 + t;
            const int expert = expert0 + e;
            if (lane == 0 && token < num_tokens && expert < p.experts) {
                const double logit =
                    p.router_bias == nullptr
                        ? sum
                        : __dadd_rn(sum, static_cast<double>(p.router_bias[expert]));
                me.logits[static_cast<int64_t>(token) * p.experts + expert] = __double2float_rn(logit);
            }
        }
    }
}

template <int kTokens, int kExperts>
__device__ __forceinline__ void router_blocks(const StepParams& p, const LocalRank& me,
                                              int num_tokens) {
    const bool hidden_vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
    const bool router_vectors = rows_are_vectors(p.router, p.hidden, kF32);
    const int expert_blocks = (p.experts + kExperts - 1) / kExperts;
    const int token_blocks = (num_tokens + kTokens - 1) / kTokens;
    const int64_t blocks = static_cast<int64_t>(expert_blocks) * token_blocks;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kLogitsThreads / 32);
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kLogitsThreads / 32) + threadIdx.x / 32;
    for (int64_t block = warp; block < blocks; block += warps) {
        router_block<kTokens, kExperts>(p, me, static_cast<int>(block / expert_blocks) * kTokens,
                                        static_cast<int>(block % expert_blocks) * kExperts,
                                        num_tokens, hidden_vectors, router_vectors);
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kLogitsThreads)
void moe_route_logits(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    const int num_tokens = moe::clamp_tokens(*me.token_count, p.max_tokens);
    if (num_tokens == 1) {
        moe::router_blocks<1, 1>(p, me, num_tokens);
    } else if (num_tokens <= 64) {
        moe::router_blocks<4, 1>(p, me, num_tokens);
    } else {
        moe::router_blocks<4, 4>(p, me, num_tokens);
    }
}
