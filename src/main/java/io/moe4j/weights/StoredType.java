package io.moe4j.weights;

import io.moe4j.tensor.DType;

/**
 * Every element type a safetensors header may name. Types without a {@link #dtype()} can be listed
 * and skipped over; reading them is an error.
 */
public enum StoredType {
    /** One byte, 0 or 1. */
    BOOL(8, null),
    /** 4-bit float, two per byte. */
    F4(4, null),
    /** 6-bit float, 2 exponent bits. */
    F6_E2M3(6, null),
    /** 6-bit float, 3 exponent bits. */
    F6_E3M2(6, null),
    /** Unsigned byte. */
    U8(8, DType.U8),
    /** Signed byte. */
    I8(8, null),
    /** 8-bit float, 5 exponent bits. */
    F8_E5M2(8, null),
    /** 8-bit float, 4 exponent bits, finite only. */
    F8_E4M3(8, DType.F8_E4M3),
    /** 8-bit power of two. */
    F8_E8M0(8, null),
    /** 8-bit float, 5 exponent bits, no negative zero. */
    F8_E5M2FNUZ(8, null),
    /** 8-bit float, 4 exponent bits, no negative zero. */
    F8_E4M3FNUZ(8, null),
    /** Signed 16-bit integer. */
    I16(16, null),
    /** Unsigned 16-bit integer. */
    U16(16, null),
    /** IEEE binary16. */
    F16(16, DType.F16),
    /** bfloat16. */
    BF16(16, DType.BF16),
    /** Signed 32-bit integer. */
    I32(32, DType.I32),
    /** Unsigned 32-bit integer. */
    U32(32, null),
    /** IEEE binary32. */
    F32(32, DType.F32),
    /** Two binary32 numbers. */
    C64(64, null),
    /** IEEE binary64. */
    F64(64, DType.F64),
    /** Signed 64-bit integer. */
    I64(64, DType.I64),
    /** Unsigned 64-bit integer. */
    U64(64, null);

    private final int bits;
    private final DType dtype;

    StoredType(int bits, DType dtype) {
        this.bits = bits;
        this.dtype = dtype;
    }

    /** {@return the size of one element in bits} */
    public int bits() {
        return bits;
    }

    /** {@return the type the library computes with, or null if it has none} */
    public DType dtype() {
        return dtype;
    }
}
