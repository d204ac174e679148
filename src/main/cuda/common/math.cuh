// Scalar arithmetic that several kernels share. Every product and sum that ends in a result is an
// explicitly rounded intrinsic.
// why: the compiler may contract a * b + c differently in two kernels, and decode, prefill and
// portable kernels have to agree bit for bit.
#pragma once
#include <cmath>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layout/step_params.cuh"
#include "../ptx/approximate.cuh"
#include "../ptx/min_max.cuh"

namespace moe {

__device__ __forceinline__ float sigmoid(float x) {
    return __frcp_rn(__fadd_rn(1.0f, expf(-x)));
}

// The activation of a layer, SwiGLU or clamped SwiGLU, as one formula:
//   (u + shift) * (g * sigmoid(alpha * g)), g = min(gate, limit), u = clamp(up, -limit, limit)
// why: a choice at each of a tile's outputs doubles the code of the epilogue, which is fetched from
// memory whenever a kernel starts
struct Activation {
    float limit;
    float alpha;
    float shift;

    __device__ __forceinline__ Activation(int32_t kind, float alpha, float limit)
        : limit(kind == kClampedSwiGlu ? limit : INFINITY),
          alpha(kind == kClampedSwiGlu ? alpha : 1.0f),
          shift(kind == kClampedSwiGlu ? 1.0f : 0.0f) {}

    __device__ __forceinline__ float operator()(float gate, float up) const {
        // why: not fminf, which would turn NaN into the limit, nor comparisons, which become branches
        const float g = ptx::min_or_nan(gate, limit);
        const float u = ptx::max_or_nan(ptx::min_or_nan(up, limit), -limit);
        // sigmoid by the special function units: two units in the last place or so, far below bf16
        const float e = ptx::exp2_approx(__fmul_rn(__fmul_rn(alpha, g), -1.44269504f));
        const float s = ptx::reciprocal_approx(__fadd_rn(1.0f, e));
        return __fmul_rn(__fadd_rn(u, shift), __fmul_rn(g, s));
    }
};

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

// Divides numbers below 2^20 by one that no step changes. why floats: an inverse of them is there in 40
// cycles, that of an integer in 200, and every kernel begins with these. Half of one more keeps the product
// away from whole numbers by more than it is rounded.
struct Divider {
    int32_t divisor;
    float inverse;

    __device__ __forceinline__ static Divider of(int divisor) {
        const int d = divisor < 1 ? 1 : divisor;
        return Divider{d, __frcp_rn(static_cast<float>(d))};
    }
    __device__ __forceinline__ int quotient(int n) const {
        return __float2int_rz(__fmul_rn(static_cast<float>(n) + 0.5f, inverse));
    }
};

}  // namespace moe
