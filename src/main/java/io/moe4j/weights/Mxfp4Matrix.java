package io.moe4j.weights;

import io.moe4j.model.WeightMatrix;
import java.nio.ByteBuffer;

/**
 * Every {@code step}-th row of a matrix in MXFP4 as gpt-oss publishes it: per row, blocks of 32
 * E2M1 values in 16 bytes, low nibble first, each block with a power-of-two scale (E8M0, bias 127,
 * 255 means NaN). Safe for concurrent reads.
 *
 * @param blocks U8 {@code [E, storedRows, cols / 32, 16]}
 * @param scales U8 {@code [E, storedRows, cols / 32]}
 * @param expert which of the E matrices
 * @param storedRows rows of the stored matrix
 * @param firstRow first row taken
 * @param step distance between rows taken
 * @param rows rows taken, the outputs
 * @param cols the inputs, a multiple of 32
 */
record Mxfp4Matrix(
        StoredTensor blocks,
        StoredTensor scales,
        int expert,
        int storedRows,
        int firstRow,
        int step,
        int rows,
        int cols)
        implements WeightMatrix {
    /** Values that share one scale. */
    static final int BLOCK = 32;

    private static final float[] E2M1 = {
        0f, 0.5f, 1f, 1.5f, 2f, 3f, 4f, 6f, -0f, -0.5f, -1f, -1.5f, -2f, -3f, -4f, -6f
    };
    private static final float[] E8M0 = new float[256];

    static {
        for (int i = 0; i < 255; i++) {
            E8M0[i] = Math.scalb(1f, i - 127);
        }
        E8M0[255] = Float.NaN;
    }

    @Override
    public void read(float[] to) {
        int rowBytes = cols / 2;
        int rowScales = cols / BLOCK;
        byte[] packed = new byte[rowBytes];
        byte[] exponents = new byte[rowScales];
        for (int row = 0; row < rows; row++) {
            long stored = (long) expert * storedRows + firstRow + (long) row * step;
            ByteBuffer rowBlocks = blocks.slice(stored * rowBytes, rowBytes);
            rowBlocks.get(packed);
            scales.slice(stored * rowScales, rowScales).get(exponents);
            decodeRow(packed, exponents, to, row * cols);
        }
    }

    private static void decodeRow(byte[] packed, byte[] exponents, float[] to, int at) {
        for (int b = 0; b < exponents.length; b++) {
            float scale = E8M0[exponents[b] & 0xff];
            int first = b * BLOCK / 2;
            for (int i = 0; i < BLOCK / 2; i++) {
                int pair = packed[first + i];
                int element = at + b * BLOCK + 2 * i;
                to[element] = E2M1[pair & 0xf] * scale;
                to[element + 1] = E2M1[(pair >>> 4) & 0xf] * scale;
            }
        }
    }
}
