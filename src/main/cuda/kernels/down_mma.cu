// expert_out[row] = down . activated[row], routed and shared experts.
// Reads expert_counts, expert_offsets, activated (or home_tokens, shared_activated) and the packed
// weights. Writes expert_out (or shared_out), pad columns as zero. See masked_gemm.cuh.
#include "masked_gemm.cuh"

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_down_mma(const __grid_constant__ moe::StepParams p) {
    moe::masked_gemm(moe::down_operands(p, p.locals[blockIdx.y]), moe::DownEpilogue{});
}

extern "C" __global__ __launch_bounds__(moe::kGemmThreads, 2)
void moe_shared_down_mma(const __grid_constant__ moe::StepParams p) {
    moe::masked_gemm(moe::shared_down_operands(p, p.locals[blockIdx.y]), moe::DownEpilogue{});
}
