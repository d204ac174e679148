// activated[row] = activation(gate . x[slot of row], up . x[slot of row]), routed and shared experts.
// Reads expert_counts, expert_offsets, expert_rows, recv_rows (or home_tokens, home_rows) and the
// packed weights. Writes activated (or shared_activated), pad columns as zero. See masked_gemm.cuh.
#include "../layout/recv_buffer.cuh"
#include "masked_gemm.cuh"

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_gate_up_mma(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    const LocalRank& me = p.locals[blockIdx.y];
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
    masked_gemm(g, GateUpEpilogue{p.activation, p.alpha, p.limit});
}

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_shared_gate_up_mma(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    const LocalRank& me = p.locals[blockIdx.y];
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
    masked_gemm(g, GateUpEpilogue{p.activation, p.alpha, p.limit});
}
