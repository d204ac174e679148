// Bulk copies by the copy engine, and the fence between ordinary stores and it (PTX ISA 9.7.9.25.4,
// 9.7.13.4).
#pragma once
#include <cstdint>

namespace moe::ptx {

// Contiguous bytes, a multiple of 16, global to shared; their arrival is counted on the barrier.
__device__ __forceinline__ void bulk_copy(uint32_t to_shared, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to_shared),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// Orders this thread's view of shared memory before what wgmma or the copy engine does next.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace moe::ptx
