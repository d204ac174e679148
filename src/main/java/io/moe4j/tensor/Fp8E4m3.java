package io.moe4j.tensor;

/**
 * Widening of FP8 E4M3FN (bias 7, no infinity, 0x7f and 0xff are NaN), as in "FP8 Formats for Deep
 * Learning" (Micikevicius et al., 2022). Stateless.
 */
public final class Fp8E4m3 {
    private static final float[] VALUES = new float[256];

    static {
        for (int bits = 0; bits < 256; bits++) {
            int exponent = (bits >>> 3) & 0xf;
            int fraction = bits & 7;
            float magnitude;
            if (exponent == 0xf && fraction == 7) {
                magnitude = Float.NaN;
            } else if (exponent == 0) {
                magnitude = fraction * 0x1p-9f;
            } else {
                magnitude = Math.scalb(1f + fraction / 8f, exponent - 7);
            }
            VALUES[bits] = (bits & 0x80) == 0 ? magnitude : -magnitude;
        }
    }

    private Fp8E4m3() {}

    /**
     * Widens exactly.
     *
     * @param bits an FP8 number with 4 exponent and 3 mantissa bits
     * @return the same value
     */
    public static float toFloat(byte bits) {
        return VALUES[bits & 0xff];
    }
}
