package io.moe4j.tensor;

/** Conversions between binary32 and bfloat16 (the upper 16 bits of a binary32). Stateless. */
public final class Bf16 {
    private Bf16() {}

    /**
     * Widens exactly.
     *
     * @param bits a bfloat16
     * @return the same value; a NaN stays a NaN
     */
    public static float toFloat(short bits) {
        return Float.intBitsToFloat(bits << 16);
    }

    /**
     * Rounds to nearest, ties to even; overflow becomes infinity, every NaN stays a (quiet) NaN.
     *
     * @param value any float
     * @return the bits of the nearest bfloat16
     */
    public static short fromFloat(float value) {
        int bits = Float.floatToRawIntBits(value);
        if ((bits & 0x7fffffff) > 0x7f800000) {
            return (short) ((bits >>> 16) | 0x0040);
        }
        int roundingBias = 0x7fff + ((bits >>> 16) & 1);
        return (short) ((bits + roundingBias) >>> 16);
    }
}
