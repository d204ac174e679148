package io.moe4j.weights;

import io.moe4j.model.WeightMatrix;

/**
 * A tensor that holds one or more row-major matrices of the same size, {@code [out, in]} each,
 * plain or FP8 with one scale per block. Safe for concurrent reads.
 *
 * @param tensor the weights
 * @param rows rows of each matrix
 * @param cols columns of each matrix
 * @param scales block scales, {@code [ceil(rows / block[0]), ceil(cols / block[1])]} per matrix, or
 *     null
 * @param block rows and columns of a scale block, or null
 */
record MatrixStack(StoredTensor tensor, long rows, int cols, StoredTensor scales, int[] block) {
    /** Rows {@code firstRow} and following of matrix {@code index}, as a matrix of their own. */
    WeightMatrix matrix(int index, int firstRow, int count) {
        return new WeightMatrix() {
            @Override
            public int rows() {
                return count;
            }

            @Override
            public int cols() {
                return cols;
            }

            @Override
            public void read(float[] to) {
                tensor.readFloats((index * rows + firstRow) * cols, to, 0, count * cols);
                if (scales != null) {
                    applyScales(to, index, firstRow, count);
                }
            }
        };
    }

    private void applyScales(float[] values, int index, int firstRow, int count) {
        long scaleRows = (rows + block[0] - 1) / block[0];
        int scaleCols = (cols + block[1] - 1) / block[1];
        int firstBlock = firstRow / block[0];
        int blocks = (firstRow + count - 1) / block[0] - firstBlock + 1;
        float[] factors =
                scales.floats((index * scaleRows + firstBlock) * scaleCols, blocks * scaleCols);
        for (int row = 0; row < count; row++) {
            int factorRow = ((firstRow + row) / block[0] - firstBlock) * scaleCols;
            for (int b = 0; b < scaleCols; b++) {
                float factor = factors[factorRow + b];
                int from = row * cols + b * block[1];
                int to = row * cols + (int) Math.min(cols, (b + 1L) * block[1]);
                for (int i = from; i < to; i++) {
                    values[i] *= factor;
                }
            }
        }
    }
}
