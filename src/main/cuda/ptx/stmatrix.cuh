// Matrix fragments to shared memory (PTX ISA 9.7.14.5.16), and their way back.
#pragma once
#include <cstdint>

namespace moe::ptx {

// Four 8 x 8 matrices of 16-bit elements, each transposed: lane i gives the address of what was
// column i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t shared_address, uint32_t m0,
                                                       uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address),
                 "r"(m0), "r"(m1), "r"(m2), "r"(m3)
                 : "memory");
}

// 16 bytes of shared memory, after what this thread did before in program order.
__device__ __forceinline__ uint4 load_shared_16(uint32_t shared_address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_global_16(void* address, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

}  // namespace moe::ptx
