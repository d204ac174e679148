// activated[row] = activation(gate . x[slot of row], up . x[slot of row]) with wgmma, routed and shared experts; sm_90a only. Reads and writes what
// gate_up_mma.cu does, bit for bit. See masked_gemm_wgmma.cuh.
#include "masked_gemm_wgmma.cuh"

// why: other targets have no wgmma; a test's other targets have these kernels without a body
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MOE_TEST_STUBS)

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_gate_up_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::ManyRows, false>(
        moe::gate_up_operands(p, me), me, moe::GateUpEpilogue{moe::Activation(p.activation, p.alpha, p.limit)});
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 2)
void moe_gate_up_wgmma_few(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::FewRows, false>(
        moe::gate_up_operands(p, me), me, moe::GateUpEpilogue{moe::Activation(p.activation, p.alpha, p.limit)});
}

extern "C" __global__ __launch_bounds__(moe::kWgmmaThreads, 1)
void moe_shared_gate_up_wgmma(const __grid_constant__ moe::StepParams p) {
    const moe::LocalRank& me = p.locals[blockIdx.y];
    moe::masked_gemm_wgmma<moe::ManyRows, false>(
        moe::shared_gate_up_operands(p, me), me, moe::GateUpEpilogue{moe::Activation(p.activation, p.alpha, p.limit)});
}

#endif
