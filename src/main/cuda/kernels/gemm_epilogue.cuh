// What the masked GEMMs with mma.sync and wgmma share: operands, and the epilogues, which take the
// accumulators of 8 warps, warp w (of the CTA, or as the caller says) with outputs 16w .. 16w + 15 of the
// tile. Both kernels sum in the same order and end here, so their results agree bit for bit.
#pragma once
#include "../common/math.cuh"
#include "../layout/recv_buffer.cuh"
#include "../layout/weight_tiles.cuh"
#include "../ptx/mma.cuh"
#include "../scheduler/masked.cuh"

namespace moe {

// One GEMM over the experts of a rank.
struct GemmOperands {
    const int32_t* counts;         // [experts] rows of each
    const int32_t* offsets;        // [experts] first packed row, null: 0 (one expert)
    const int32_t* gather;         // input row of each packed row, null: the packed row itself
    const __nv_bfloat16* weights;  // packed
    const float* bias;             // packed order or null
    const __nv_bfloat16* in;       // [.][64 * k_blocks]
    __nv_bfloat16* out;            // [.][out_pitch]
    int experts;
    int row_tiles;
    int k_blocks;
    int out_pitch;
    int features;                  // outputs past these are pad and written as zero

    __device__ __forceinline__ int64_t first_row(const scheduler::Work& work) const {
        return static_cast<int64_t>(offsets == nullptr ? 0 : offsets[work.expert]) + work.first_row;
    }
};

__device__ __forceinline__ GemmOperands gate_up_operands(const StepParams& p, const LocalRank& me) {
    GemmOperands g;
    g.counts = me.expert_counts;
    g.offsets = me.expert_offsets;
    g.gather = me.expert_rows;
    g.weights = me.w_gate_up;
    g.bias = me.bias_gate_up;
    g.in = symmetric_of(p, me.rank).recv_row(0);
    g.out = me.activated;
    g.experts = me.local_experts;
    g.row_tiles = gate_up_row_tiles(p.intermediate_pad);
    g.k_blocks = p.hidden_pad / kTileCols;
    g.out_pitch = p.intermediate_pad;
    g.features = p.intermediate;
    return g;
}

__device__ __forceinline__ GemmOperands down_operands(const StepParams& p, const LocalRank& me) {
    GemmOperands g;
    g.counts = me.expert_counts;
    g.offsets = me.expert_offsets;
    g.gather = nullptr;
    g.weights = me.w_down;
    g.bias = me.bias_down;
    g.in = me.activated;
    g.out = me.expert_out;
    g.experts = me.local_experts;
    g.row_tiles = down_row_tiles(p.hidden_pad);
    g.k_blocks = p.intermediate_pad / kTileCols;
    g.out_pitch = p.hidden_pad;
    g.features = p.hidden;
    return g;
}

// The shared expert: one expert, whose rows are the home tokens.
__device__ __forceinline__ GemmOperands shared_gate_up_operands(const StepParams& p,
                                                                const LocalRank& me) {
    GemmOperands g;
    g.counts = me.home_tokens;
    g.offsets = nullptr;
    g.gather = nullptr;
    g.weights = p.w_shared_gate_up;
    g.bias = nullptr;
    g.in = me.home_rows;
    g.out = me.shared_activated;
    g.experts = 1;
    g.row_tiles = gate_up_row_tiles(p.shared_pad);
    g.k_blocks = p.hidden_pad / kTileCols;
    g.out_pitch = p.shared_pad;
    g.features = p.shared;
    return g;
}

__device__ __forceinline__ GemmOperands shared_down_operands(const StepParams& p,
                                                             const LocalRank& me) {
    GemmOperands g;
    g.counts = me.home_tokens;
    g.offsets = nullptr;
    g.gather = nullptr;
    g.weights = p.w_shared_down;
    g.bias = nullptr;
    g.in = me.shared_activated;
    g.out = me.shared_out;
    g.experts = 1;
    g.row_tiles = down_row_tiles(p.hidden_pad);
    g.k_blocks = p.shared_pad / kTileCols;
    g.out_pitch = p.hidden_pad;
    g.features = p.hidden;
    return g;
}

// A lane's part of an 8 features x 8 tokens matrix, turned so that four lanes store the 16 bytes of
// one token.
__device__ __forceinline__ void store_8x8(__nv_bfloat16* out, int64_t row0, int row_in_item, int rows,
                                          int pitch, int feature0, uint32_t pair) {
    const int lane = threadIdx.x % 32;
    const uint32_t turned = ptx::movmatrix_transposed(pair);
    const int row = row_in_item + lane / 4;
    if (row < rows) {
        *reinterpret_cast<uint32_t*>(out + (row0 + row) * pitch + feature0 + lane % 4 * 2) = turned;
    }
}

// Bias, activation, bf16. Lane: feature lane / 4 of the warp's 8, gate in acc[.][0..1], up in [2..3].
struct GateUpEpilogue {
    Activation activation;

    __device__ __forceinline__ float value(float gate, float up, float gate_bias,
                                           float up_bias) const {
        return activation(__fadd_rn(gate, gate_bias), __fadd_rn(up, up_bias));
    }

    template <int kColumns, int kBlocks>
    __device__ __forceinline__ void store(const GemmOperands& g, const scheduler::Work& work,
                                          const float (&acc)[kBlocks][4], int warp = threadIdx.x / 32) const {
        store_at<kColumns, false>(g, work, g.first_row(work), acc, warp);
    }

    // row0: the first packed row. kMayBeFewer: columns from the work's rows on are left out.
    template <int kColumns, bool kMayBeFewer, int kBlocks>
    __device__ __forceinline__ void store_at(const GemmOperands& g, const scheduler::Work& work, int64_t row0,
                                             const float (&acc)[kBlocks][4], int warp = threadIdx.x / 32) const {
        const int lane = threadIdx.x % 32;
        const int packed = work.row_tile * kTileRows + warp * 16 + lane / 4;
        const int feature0 = work.row_tile * (kTileRows / 2) + warp * 8;
        const bool real = feature0 + lane / 4 < g.features;
        float gate_bias = 0.0f;
        float up_bias = 0.0f;
        if (g.bias != nullptr) {
            const float* bias = g.bias + static_cast<int64_t>(work.expert) * g.row_tiles * kTileRows;
            gate_bias = bias[packed];
            up_bias = bias[packed + 8];
        }
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            if (kMayBeFewer && 8 * j >= work.rows) {
                break;
            }
            float v[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // why: a token with an Inf would leave NaN, not zero, in the pad
                v[i] = real ? value(acc[j][i], acc[j][i + 2], gate_bias, up_bias) : 0.0f;
            }
            store_8x8(g.out, row0, 8 * j, work.rows, g.out_pitch, feature0, pack_bf16(v[0], v[1]));
        }
    }
};

// Bias, bf16. Lane: feature lane / 4 of the warp's 16 in acc[.][0..1], feature lane / 4 + 8 in [2..3].
struct DownEpilogue {
    __device__ __forceinline__ float value(float sum, float bias) const {
        return __fadd_rn(sum, bias);
    }

    template <int kColumns, int kBlocks>
    __device__ __forceinline__ void store(const GemmOperands& g, const scheduler::Work& work,
                                          const float (&acc)[kBlocks][4], int warp = threadIdx.x / 32) const {
        store_at<kColumns, false>(g, work, g.first_row(work), acc, warp);
    }

    // As above.
    template <int kColumns, bool kMayBeFewer, int kBlocks>
    __device__ __forceinline__ void store_at(const GemmOperands& g, const scheduler::Work& work, int64_t row0,
                                             const float (&acc)[kBlocks][4], int warp = threadIdx.x / 32) const {
        const int lane = threadIdx.x % 32;
        const int feature0 = work.row_tile * kTileRows + warp * 16;
        if (feature0 >= g.out_pitch) {
            return;  // the last tile may overhang the rows by 64
        }
        const float* bias =
            g.bias == nullptr
                ? nullptr
                : g.bias + static_cast<int64_t>(work.expert) * g.row_tiles * kTileRows + feature0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool real = feature0 + 8 * half + lane / 4 < g.features;
            const float add = bias == nullptr ? 0.0f : bias[8 * half + lane / 4];
#pragma unroll
            for (int j = 0; j < kColumns / 8; j++) {
                if (kMayBeFewer && 8 * j >= work.rows) {
                    break;
                }
                float v[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    v[i] = real ? value(acc[j][2 * half + i], add) : 0.0f;
                }
                store_8x8(g.out, row0, 8 * j, work.rows, g.out_pitch, feature0 + 8 * half,
                          pack_bf16(v[0], v[1]));
            }
        }
    }
};

}  // namespace moe
