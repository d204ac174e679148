// activated[row] = activation(gate . x[slot of row], up . x[slot of row]), routed and shared experts.
// Reads expert_counts, expert_offsets, expert_rows, recv_rows (or home_tokens, home_rows) and the
// packed weights. Writes activated (or shared_activated), pad columns as zero. See masked_gemm.cuh.
#include "masked_gemm.cuh"

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_gate_up_mma(const __grid_constant__ moe::StepParams p) {
    moe::masked_gemm(moe::gate_up_operands(p, p.locals[blockIdx.y]),
                     moe::GateUpEpilogue{moe::Activation(p.activation, p.alpha, p.limit)});
}

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_shared_gate_up_mma(const __grid_constant__ moe::StepParams p) {
    moe::masked_gemm(moe::shared_gate_up_operands(p, p.locals[blockIdx.y]),
                     moe::GateUpEpilogue{moe::Activation(p.activation, p.alpha, p.limit)});
}
