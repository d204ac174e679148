// The experts with wgmma, routed and shared; sm_90a only. Reads and writes what gate_up_mma.cu and
// down_mma.cu do, bit for bit. See masked_gemm_wgmma.cuh.
#include "masked_gemm_wgmma.cuh"

// why: other targets have no wgmma; a test's other targets have these kernels without a body
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MOE_TEST_STUBS)

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_experts_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::NarrowShape, moe::kBothPhases>(
        moe::gate_up_operands(p, me), moe::down_operands(p, me), p, me, moe::kClaimedExperts);
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_gate_up_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::NarrowShape, moe::kGateUpPhase>(
        moe::gate_up_operands(p, me), moe::down_operands(p, me), p, me, moe::kClaimedGateUp);
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_down_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::NarrowShape, moe::kDownPhase>(
        moe::gate_up_operands(p, me), moe::down_operands(p, me), p, me, moe::kClaimedDown);
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_shared_gate_up_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::WideShape, moe::kGateUpPhase>(
        moe::shared_gate_up_operands(p, me), moe::shared_down_operands(p, me), p, me,
        moe::kClaimedSharedGateUp);
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_shared_down_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::WideShape, moe::kDownPhase>(
        moe::shared_gate_up_operands(p, me), moe::shared_down_operands(p, me), p, me,
        moe::kClaimedSharedDown);
}

#endif
