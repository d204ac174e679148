// Threads and bytes of dynamic shared memory that the code of each kernel is written for. Java launches with
// those of kernels.def: the build writes MOE_LAUNCH_CHECKS from its lines, an assertion for each kernel, and a
// kernel that is not named here does not compile.
#pragma once

namespace moe::launch {

struct Sizes {
    int threads;
    int shared;
};

constexpr Sizes moe_route_logits{kLogitsThreads, kLogitsSharedBytes};
constexpr Sizes moe_route_topk{kTopKThreads, 0};
constexpr Sizes moe_dispatch_send{kSendThreads, 0};
constexpr Sizes moe_dispatch_recv{kIndexThreads, 0};
constexpr Sizes moe_dispatch_index{kIndexThreads, 0};
constexpr Sizes moe_dispatch_local{kFusedThreads, 0};
constexpr Sizes moe_dispatch_lines{kFusedThreads, 0};
constexpr Sizes moe_dispatch_send_lines{kFusedThreads, 0};
constexpr Sizes moe_dispatch_recv_lines{kFusedThreads, 0};
constexpr Sizes moe_gate_up_mma{kGemmThreads, kGemmSharedBytes};
constexpr Sizes moe_down_mma{kGemmThreads, kGemmSharedBytes};
constexpr Sizes moe_shared_gate_up_mma{kGemmThreads, kGemmSharedBytes};
constexpr Sizes moe_shared_down_mma{kGemmThreads, kGemmSharedBytes};
constexpr Sizes moe_experts_wgmma{kWgmmaThreads, kWgmmaSharedBytes<NarrowShape>};
constexpr Sizes moe_gate_up_wgmma{kWgmmaThreads, kWgmmaSharedBytes<NarrowShape>};
constexpr Sizes moe_down_wgmma{kWgmmaThreads, kWgmmaSharedBytes<NarrowShape>};
constexpr Sizes moe_experts_wgmma_prefill{prefill::kThreads, prefill::kSharedBytes};
constexpr Sizes moe_gate_up_wgmma_prefill{prefill::kThreads, prefill::kSharedBytes};
constexpr Sizes moe_down_wgmma_prefill{prefill::kThreads, prefill::kSharedBytes};
constexpr Sizes moe_shared_gate_up_wgmma{kWgmmaThreads, kWgmmaSharedBytes<WideShape>};
constexpr Sizes moe_shared_down_wgmma{kWgmmaThreads, kWgmmaSharedBytes<WideShape>};
constexpr Sizes moe_combine_send{kCombineThreads, 0};
constexpr Sizes moe_combine_recv{kOutThreads, 0};
constexpr Sizes moe_combine_local{kSumThreads, 0};
constexpr Sizes moe_combine_lines{kSumThreads, 0};
constexpr Sizes moe_combine_send_lines{kSumThreads, 0};
constexpr Sizes moe_combine_recv_lines{kSumThreads, 0};
constexpr Sizes moe_pack_gate_up{kPackThreads, 0};
constexpr Sizes moe_pack_down{kPackThreads, 0};
constexpr Sizes moe_fill_random{kPackThreads, 0};
constexpr Sizes moe_line_test{kLineTestThreads, 0};
constexpr Sizes moe_gate{kGateThreads, 0};

#ifdef MOE_LAUNCH_CHECKS
#include MOE_LAUNCH_CHECKS
#endif

}  // namespace moe::launch
