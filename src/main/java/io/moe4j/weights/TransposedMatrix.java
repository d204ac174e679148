package io.moe4j.weights;

import io.moe4j.model.WeightMatrix;

/**
 * Every {@code step}-th column of a matrix that is stored {@code [in, out]}, read as {@code [out,
 * in]}: gpt-oss keeps gate at even and up at odd columns. Safe for concurrent reads.
 *
 * @param tensor the weights
 * @param start element at which the stored matrix begins
 * @param storedCols columns of the stored matrix
 * @param firstCol first column taken
 * @param step distance between columns taken
 * @param rows columns taken, the outputs
 * @param cols rows of the stored matrix, the inputs
 */
record TransposedMatrix(
        StoredTensor tensor, long start, int storedCols, int firstCol, int step, int rows, int cols)
        implements WeightMatrix {
    /** Stored rows decoded at a time; their floats are one cache line of the destination. */
    private static final int STRIP = 16;

    @Override
    public void read(float[] to) {
        float[] strip = new float[Math.min(STRIP, cols) * storedCols];
        for (int in = 0; in < cols; in += STRIP) {
            int n = Math.min(STRIP, cols - in);
            tensor.readFloats(start + (long) in * storedCols, strip, 0, n * storedCols);
            for (int out = 0; out < rows; out++) {
                int from = firstCol + out * step;
                int at = out * cols + in;
                for (int i = 0; i < n; i++) {
                    to[at + i] = strip[i * storedCols + from];
                }
            }
        }
    }
}
