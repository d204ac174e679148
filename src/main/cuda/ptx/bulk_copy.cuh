// Bulk copies by the copy engine, and the fence between ordinary stores and it (PTX ISA 9.7.9.25.4,
// 9.7.13.4).
#pragma once
#include <cstdint>

namespace moe::ptx {

// What the L2 cache does with a line (PTX ISA 9.7.9.18): gives it up first, or as any other.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t evict_normal() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
    return policy;
}

// Contiguous bytes, a multiple of 16, global to shared; their arrival is counted on the barrier.
__device__ __forceinline__ void bulk_copy(uint32_t to_shared, const void* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1], %2, [%3], %4;" ::"r"(to_shared),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Keeps the compiler from dropping the computation of two values.
template <class A, class B>
__device__ __forceinline__ void keep(A a, B b) {
    asm volatile("" ::"l"(static_cast<uint64_t>((uint64_t)a)), "l"(static_cast<uint64_t>((uint64_t)b)));
}

// Orders this thread's view of shared memory before what wgmma or the copy engine does next.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace moe::ptx
