// Scalar arithmetic that several kernels share. Every product and sum that ends in a result is an
// explicitly rounded intrinsic.
// why: the compiler may contract a * b + c differently in two kernels, and decode, prefill and
// portable kernels have to agree bit for bit.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout/step_params.cuh"

namespace moe {

__device__ __forceinline__ float sigmoid(float x) {
    return __frcp_rn(__fadd_rn(1.0f, expf(-x)));
}

// gate * sigmoid(gate) * up
__device__ __forceinline__ float swiglu(float gate, float up) {
    return __fmul_rn(__fmul_rn(gate, sigmoid(gate)), up);
}

// (u + 1) * (g * sigmoid(alpha * g)), g = min(gate, limit), u = clamp(up, -limit, limit)
__device__ __forceinline__ float clamped_swiglu(float gate, float up, float alpha, float limit) {
    // why: comparisons, not fminf, which would turn NaN into the limit
    const float g = gate > limit ? limit : gate;
    const float u = up > limit ? limit : (up < -limit ? -limit : up);
    return __fmul_rn(__fadd_rn(u, 1.0f), __fmul_rn(g, sigmoid(__fmul_rn(alpha, g))));
}

__device__ __forceinline__ float activate(float gate, float up, int32_t kind, float alpha,
                                          float limit) {
    return kind == kClampedSwiGlu ? clamped_swiglu(gate, up, alpha, limit) : swiglu(gate, up);
}

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float bf16_low(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float bf16_high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void unpack_bf16(float (&v)[8], uint4 packed) {
    v[0] = bf16_low(packed.x);
    v[1] = bf16_high(packed.x);
    v[2] = bf16_low(packed.y);
    v[3] = bf16_high(packed.y);
    v[4] = bf16_low(packed.z);
    v[5] = bf16_high(packed.z);
    v[6] = bf16_low(packed.w);
    v[7] = bf16_high(packed.w);
}

__device__ __forceinline__ uint4 pack_bf16(const float (&v)[8]) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                      pack_bf16(v[6], v[7]));
}

// Sum over a warp by a fixed butterfly; every lane gets the same bits.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value = __dadd_rn(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

}  // namespace moe
