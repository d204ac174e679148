// Tensor-core products and register transposition (PTX ISA 9.7.14).
#pragma once
#include <cstdint>

namespace moe::ptx {

// d[16][8] += a[16][16] * b[16][8], bf16 in, f32 accumulators. With q = lane / 4 and j = lane % 4 a
// lane holds of d the elements (q, 2j), (q, 2j + 1), (q + 8, 2j), (q + 8, 2j + 1).
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit elements held by a warp, lane: row lane / 4, columns
// 2 * (lane % 4) and the next.
__device__ __forceinline__ uint32_t movmatrix_transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

}  // namespace moe::ptx
