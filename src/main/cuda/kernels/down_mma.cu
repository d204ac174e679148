// expert_out[row] = down . activated[row], routed and shared experts.
// Reads expert_counts, expert_offsets, activated (or home_tokens, shared_activated) and the packed
// weights. Writes expert_out (or shared_out), pad columns as zero. See masked_gemm.cuh.
#include "masked_gemm.cuh"

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_down_mma(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    const LocalRank& me = p.locals[blockIdx.y];
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
    masked_gemm(g, DownEpilogue{});
}

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_shared_down_mma(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    const LocalRank& me = p.locals[blockIdx.y];
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
    masked_gemm(g, DownEpilogue{});
}
