// The CTAs of a cluster: their ranks, barriers, and copies that reach all of them (PTX ISA 10.13,
// 9.7.13.4, 9.7.13.15, 9.7.9.25.4).
#pragma once
#include <cstdint>

namespace moe::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all CTAs; what came before it in any is visible after it in all.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier that lies at this address in another CTA of the cluster, or in this one.
// why no scope of the cluster: a release to it waits for all of the thread's stores, which cost the
// matrix kernels a quarter of their time; what they release are reads that wgmma has ended
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Writes a word to the place that has this address in another CTA of the cluster; the barrier that has
// that address there counts its bytes.
__device__ __forceinline__ void store_async_at(uint32_t to_shared, uint32_t value, uint32_t barrier,
                                               uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        ".reg .b32 counts;\n"
        "mapa.shared::cluster.u32 there, %0, %3;\n"
        "mapa.shared::cluster.u32 counts, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [counts];\n"
        "}\n" ::"r"(to_shared),
        "r"(value), "r"(barrier), "r"(rank)
        : "memory");
}

// As mbarrier_wait; what another CTA wrote before its arrival is visible after it.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// As bulk_copy, to the same place in every CTA whose bit is set; their barriers count the bytes.
__device__ __forceinline__ void bulk_copy_to_all(uint32_t to_shared, const void* from, uint32_t bytes,
                                                 uint32_t barrier, uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to_shared),
        "l"(from), "r"(bytes), "r"(barrier), "h"(ranks)
        : "memory");
}

}  // namespace moe::ptx
