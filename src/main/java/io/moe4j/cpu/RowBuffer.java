package io.moe4j.cpu;

/**
 * Rows of floats that together may exceed the 2^31 elements of one Java array: row {@code r} lies
 * in {@code chunk(r)} from {@code offset(r)} on. Owned by a layer.
 */
final class RowBuffer {
    private static final int MAX_CHUNK_ELEMENTS = 1 << 26;

    private final int width;
    private final int rowsPerChunkLog2;
    private final float[][] chunks;

    RowBuffer(int rows, int width) {
        this.width = width;
        int log2 = 0;
        while (log2 < 30 && ((long) width << (log2 + 1)) <= MAX_CHUNK_ELEMENTS) {
            log2++;
        }
        this.rowsPerChunkLog2 = log2;
        int perChunk = 1 << log2;
        this.chunks = new float[(int) (((long) rows + perChunk - 1) >>> log2)][];
        for (int c = 0; c < chunks.length; c++) {
            int rowsHere = (int) Math.min(perChunk, rows - ((long) c << log2));
            chunks[c] = new float[rowsHere * width];
        }
    }

    float[] chunk(int row) {
        return chunks[row >>> rowsPerChunkLog2];
    }

    int offset(int row) {
        return (row & ((1 << rowsPerChunkLog2) - 1)) * width;
    }

    void fill(float value) {
        for (float[] chunk : chunks) {
            java.util.Arrays.fill(chunk, value);
        }
    }
}
