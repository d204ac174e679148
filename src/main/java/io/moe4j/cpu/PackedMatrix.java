package io.moe4j.cpu;

import io.moe4j.model.WeightMatrix;

/**
 * A weight matrix packed for row-times-matrix products: tiles of up to {@link #TILE} outputs, each
 * stored input by input, so that the inner loop runs over consecutive outputs and needs no
 * reduction (which is what lets the JIT vectorise it). Immutable after packing.
 */
final class PackedMatrix {
    /** Outputs per tile. */
    static final int TILE = 256;

    /** Inputs summed before the block's sum is added to the total. */
    static final int BLOCK = 64;

    private final int outputs;
    private final int inputs;
    private final float[][][] tiles;

    private PackedMatrix(int outputs, int inputs) {
        this.outputs = outputs;
        this.inputs = inputs;
        this.tiles = new float[(outputs + TILE - 1) / TILE][][];
    }

    /**
     * Packs {@code matrix}.
     *
     * @param scratch at least rows · cols long, overwritten
     */
    static PackedMatrix pack(WeightMatrix matrix, float[] scratch) {
        matrix.read(scratch);
        PackedMatrix packed = new PackedMatrix(matrix.rows(), matrix.cols());
        for (int tile = 0; tile < packed.tiles.length; tile++) {
            packed.tiles[tile] = packed.packTile(tile, scratch);
        }
        return packed;
    }

    private float[][] packTile(int tile, float[] rowMajor) {
        int width = width(tile);
        float[][] packed = new float[inputs][width];
        for (int from = 0; from < inputs; from += BLOCK) {
            int to = Math.min(inputs, from + BLOCK);
            for (int j = 0; j < width; j++) {
                int row = (tile * TILE + j) * inputs;
                for (int k = from; k < to; k++) {
                    packed[k][j] = rowMajor[row + k];
                }
            }
        }
        return packed;
    }

    int outputs() {
        return outputs;
    }

    int inputs() {
        return inputs;
    }

    int tileCount() {
        return tiles.length;
    }

    /** Outputs in a tile: TILE, fewer in the last. */
    int width(int tile) {
        return Math.min(TILE, outputs - tile * TILE);
    }

    /**
     * {@code totals[j] += sum over inputs [from, to) of x[k] · w[k][j]} for one tile, the block's
     * sum formed in {@code partial} first. Callers walk the blocks in ascending order.
     */
    void addBlock(float[] totals, float[] partial, float[] x, int xAt, int tile, int from, int to) {
        float[][] w = tiles[tile];
        int width = width(tile);
        clear(partial, width);
        int k = from;
        for (; k + 4 <= to; k += 4) {
            fourInputs(
                    partial,
                    w[k],
                    w[k + 1],
                    w[k + 2],
                    w[k + 3],
                    width,
                    x[xAt + k],
                    x[xAt + k + 1],
                    x[xAt + k + 2],
                    x[xAt + k + 3]);
        }
        for (; k < to; k++) {
            oneInput(partial, w[k], width, x[xAt + k]);
        }
        add(totals, partial, width);
    }

    private static void clear(float[] partial, int width) {
        for (int j = 0; j < width; j++) {
            partial[j] = 0f;
        }
    }

    private static void fourInputs(
            float[] sum,
            float[] w0,
            float[] w1,
            float[] w2,
            float[] w3,
            int width,
            float x0,
            float x1,
            float x2,
            float x3) {
        for (int j = 0; j < width; j++) {
            sum[j] += (x0 * w0[j] + x1 * w1[j]) + (x2 * w2[j] + x3 * w3[j]);
        }
    }

    private static void oneInput(float[] sum, float[] w, int width, float x) {
        for (int j = 0; j < width; j++) {
            sum[j] += x * w[j];
        }
    }

    private static void add(float[] totals, float[] partial, int width) {
        for (int j = 0; j < width; j++) {
            totals[j] += partial[j];
        }
    }
}
