package io.moe4j.tensor;

/** Element type of a tensor, with its size in bytes and the name safetensors files use for it. */
public enum DType {
    /** IEEE-754 binary64. */
    F64(8, "F64"),
    /** IEEE-754 binary32. */
    F32(4, "F32"),
    /** IEEE-754 binary16: 5 exponent bits, 10 fraction bits. */
    F16(2, "F16"),
    /** bfloat16: the upper half of a binary32. */
    BF16(2, "BF16"),
    /** FP8 with 4 exponent and 3 fraction bits, finite only (largest 448, NaN is 0x7f and 0xff). */
    F8_E4M3(1, "F8_E4M3"),
    /** Signed 64-bit integer, two's complement. */
    I64(8, "I64"),
    /** Signed 32-bit integer, two's complement. */
    I32(4, "I32"),
    /** Unsigned 8-bit integer (MXFP4 blocks and their scales are stored as such). */
    U8(1, "U8");

    private final int bytes;
    private final String safetensorsName;

    DType(int bytes, String safetensorsName) {
        this.bytes = bytes;
        this.safetensorsName = safetensorsName;
    }

    /** {@return the size of one element in bytes} */
    public int bytes() {
        return bytes;
    }

    /** {@return the name this type has in a safetensors header} */
    public String safetensorsName() {
        return safetensorsName;
    }

    /** {@return true for the types hidden states may have: F32, F16 and BF16} */
    public boolean isActivation() {
        return this == F32 || this == F16 || this == BF16;
    }
}
