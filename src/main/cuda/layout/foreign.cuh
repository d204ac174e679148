// The caller's tensors: row-major, f32, f16 or bf16, aligned to their element only.
#pragma once
#include "../common/math.cuh"
#include "step_params.cuh"

namespace moe {

__device__ __forceinline__ int element_bytes(int32_t dtype) {
    return dtype == kF32 ? 4 : 2;
}

// Whether every run of 8 (or 4, for f32 two) elements that starts at a multiple of 8 in any row is
// aligned to 16 bytes.
__device__ __forceinline__ bool rows_are_vectors(const void* base, int64_t columns, int32_t dtype) {
    const int64_t pitch = columns * element_bytes(dtype);
    return (reinterpret_cast<uintptr_t>(base) % 16 == 0) && pitch % 16 == 0;
}

__device__ __forceinline__ float load_element(const void* base, int64_t index, int32_t dtype) {
    switch (dtype) {
        case kF32: return static_cast<const float*>(base)[index];
        case kF16: return __half2float(static_cast<const __half*>(base)[index]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
    }
}

__device__ __forceinline__ void store_element(void* base, int64_t index, float value,
                                              int32_t dtype) {
    switch (dtype) {
        case kF32: static_cast<float*>(base)[index] = value; break;
        case kF16: static_cast<__half*>(base)[index] = __float2half_rn(value); break;
        default: static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
    }
}

// Elements [index, index + 8) as floats, the last 8 - valid of them zero and not read.
__device__ __forceinline__ void load_8(float (&v)[8], const void* base, int64_t index, int valid,
                                       int32_t dtype, bool vectors) {
    if (vectors && valid >= 8) {
        if (dtype == kF32) {
            const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
            const float4 a = from[0];
            const float4 b = from[1];
            v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
            v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
            return;
        }
        const uint4 raw =
            *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index);
        if (dtype == kBF16) {
            unpack_bf16(v, raw);
            return;
        }
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = i < valid ? load_element(base, index + i, dtype) : 0.0f;
    }
}

// Elements [index, index + 8) as bf16, the last 8 - valid of them zero and not read. bf16 is copied
// bit for bit, f32 and f16 are rounded to nearest even.
__device__ __forceinline__ uint4 load_8_as_bf16(const void* base, int64_t index, int valid,
                                                int32_t dtype, bool vectors) {
    if (dtype != kBF16) {
        float v[8];
        load_8(v, base, index, valid, dtype, vectors);
        return pack_bf16(v);
    }
    const uint16_t* from = static_cast<const uint16_t*>(base) + index;
    if (vectors && valid >= 8) {
        return *reinterpret_cast<const uint4*>(from);
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t low = 2 * i < valid ? from[2 * i] : 0;
        const uint32_t high = 2 * i + 1 < valid ? from[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The first valid of 8 floats to elements [index, index + valid).
__device__ __forceinline__ void store_8(void* base, int64_t index, const float (&v)[8], int valid,
                                        int32_t dtype, bool vectors) {
    if (vectors && valid >= 8) {
        if (dtype == kF32) {
            float4* to = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
            to[0] = make_float4(v[0], v[1], v[2], v[3]);
            to[1] = make_float4(v[4], v[5], v[6], v[7]);
            return;
        }
        uint4* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + index);
        if (dtype == kBF16) {
            *to = pack_bf16(v);
            return;
        }
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const __half2 pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
            words[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        *to = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < valid) {
            store_element(base, index + i, v[i], dtype);
        }
    }
}

}  // namespace moe
