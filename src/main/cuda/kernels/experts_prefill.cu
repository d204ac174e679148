// gate_up_prefill.cu and down_prefill.cu in one kernel; sm_90a only. See masked_gemm_prefill.cuh.
#include "masked_gemm_prefill.cuh"

// why: other targets have no wgmma; a test's other targets have these kernels without a body
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MOE_TEST_STUBS)

extern "C" __global__ MOE_IN_PAIRS __launch_bounds__(moe::prefill::kThreads, 1)
void moe_experts_wgmma_prefill(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::prefill::masked_gemm<moe::prefill::kGateUp, moe::prefill::kDown>(
        moe::gate_up_operands(p, me), moe::down_operands(p, me), p, me, moe::kClaimedExperts);
}

#endif
