// Asynchronous copies, global to shared memory (PTX ISA 9.7.9.25).
#pragma once
#include <cstdint>

namespace moe::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past L1. With valid = false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t to_shared, const void* from, bool valid) {
    const uint32_t bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t to_shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

// 8 bytes.
__device__ __forceinline__ void cp_async_8(uint32_t to_shared, const void* from, bool valid) {
    const uint32_t bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to_shared), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace moe::ptx
