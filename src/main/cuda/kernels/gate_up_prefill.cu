// activated[row] = activation(gate . x[slot of row], up . x[slot of row]) with wgmma for prefill, routed
// experts; sm_90a only. Reads and writes what gate_up_mma.cu does, bit for bit. See
// masked_gemm_prefill.cuh.
#include "masked_gemm_prefill.cuh"

// why: other targets have no wgmma; a test's other targets have these kernels without a body
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MOE_TEST_STUBS)

extern "C" __global__ MOE_IN_PAIRS __launch_bounds__(moe::prefill::kThreads, 1)
void moe_gate_up_wgmma_prefill(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::prefill::masked_gemm<moe::prefill::kGateUp, moe::prefill::kGateUp>(
        moe::gate_up_operands(p, me), moe::down_operands(p, me), p, me, moe::kClaimedGateUp);
}

#endif
