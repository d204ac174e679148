package io.moe4j.cpu;

import io.moe4j.MoeConfig;
import io.moe4j.StepInspection;
import java.util.Arrays;
import java.util.function.Supplier;

/** Reads the buffers of one virtual rank. Owns nothing; refuses once the layer is closed. */
final class CpuInspection implements StepInspection {
    private final MoeConfig config;
    private final Supplier<CpuRank> buffers;
    private final ActivatedRows activated;

    /** Computes activated rows of the rank. */
    @FunctionalInterface
    interface ActivatedRows {
        void compute(float[] to, int firstRow, int count);
    }

    /** {@code buffers} throws once the layer is closed. */
    CpuInspection(MoeConfig config, Supplier<CpuRank> buffers, ActivatedRows activated) {
        this.config = config;
        this.buffers = buffers;
        this.activated = activated;
    }

    @Override
    public int tokens() {
        return buffers.get().tokens;
    }

    @Override
    public int[] routedIds(int firstToken, int count) {
        return ints(buffers.get().topkIds, firstToken, count);
    }

    @Override
    public float[] routedWeights(int firstToken, int count) {
        return floats(buffers.get().topkWeights, firstToken, count, config.shape().topK());
    }

    @Override
    public int receivedTokens(int source) {
        return buffers.get().recvTokens[source];
    }

    @Override
    public int[] receivedIds(int source, int firstToken, int count) {
        return ints(buffers.get().recvIds[source], firstToken, count);
    }

    @Override
    public float[] receivedWeights(int source, int firstToken, int count) {
        return floats(buffers.get().recvWeights[source], firstToken, count, config.shape().topK());
    }

    @Override
    public float[] receivedRows(int source, int firstToken, int count) {
        return floats(buffers.get().recvRows[source], firstToken, count, config.shape().hidden());
    }

    @Override
    public int[] expertCounts() {
        return buffers.get().expertCounts.clone();
    }

    @Override
    public int[] expertOffsets() {
        return buffers.get().expertOffsets.clone();
    }

    @Override
    public int[] rowSlots(int firstRow, int count) {
        return Arrays.copyOfRange(buffers.get().expertRows, firstRow, firstRow + count);
    }

    @Override
    public int[] packedRows(int source, int firstToken, int count) {
        return ints(
                buffers.get().packedRowOf, source * config.maxTokensPerRank() + firstToken, count);
    }

    @Override
    public float[] activatedRows(int firstRow, int count) {
        float[] rows = new float[Math.multiplyExact(count, config.shape().intermediate())];
        activated.compute(rows, firstRow, count);
        return rows;
    }

    @Override
    public float[] expertOutputs(int firstRow, int count) {
        int h = config.shape().hidden();
        RowBuffer from = buffers.get().expertOut;
        float[] rows = new float[Math.multiplyExact(count, h)];
        for (int i = 0; i < count; i++) {
            int row = firstRow + i;
            System.arraycopy(from.chunk(row), from.offset(row), rows, i * h, h);
        }
        return rows;
    }

    @Override
    public float[] combinedRows(int expertRank, int firstToken, int count) {
        return floats(
                buffers.get().combineRows[expertRank], firstToken, count, config.shape().hidden());
    }

    @Override
    public float[] sharedOutputs(int firstToken, int count) {
        if (!config.usesSharedExpert()) {
            throw new IllegalStateException("the layer computes no shared expert");
        }
        return floats(buffers.get().sharedOut, firstToken, count, config.shape().hidden());
    }

    private int[] ints(int[] from, int first, int count) {
        int k = config.shape().topK();
        return Arrays.copyOfRange(from, first * k, (first + count) * k);
    }

    private static float[] floats(float[] from, int first, int count, int width) {
        return Arrays.copyOfRange(from, first * width, (first + count) * width);
    }
}
