package io.moe4j.cpu;

import io.moe4j.MoeConfig;

/**
 * The buffers of one virtual rank, named as on the device. Slots are rank-major and static: the row
 * of token t of source rank s lies in {@code recvRows[s]} at row t. Owned by one layer.
 */
final class CpuRank {
    final int rank;
    final int localExperts;

    /** Home side: T of this step, and the rows and routing of this rank's own tokens. */
    int tokens;

    final float[] homeRows;
    final int[] topkIds;
    final float[] topkWeights;

    /**
     * Receive side: [R][M][H] rows, [R][M][K] local ids (−1: not here) and weights, T per source.
     */
    final float[][] recvRows;

    final int[][] recvIds;
    final float[][] recvWeights;
    final int[] recvTokens;

    /** Epoch of the newest rows from each source, and of the newest results from each rank. */
    final long[] dispatchFlags;

    final long[] combineFlags;

    /** From the headers, in slot order. */
    final int[] expertCounts;

    final int[] expertOffsets;
    final int[] expertRows;
    final int[] packedRowOf;

    /** Output of the down projection, one row per packed row. */
    final RowBuffer expertOut;

    /** Home side: [R][M][H], one summed row per (rank, token). */
    final float[][] combineRows;

    /** Shared expert, null if the layer has none: [M][S] and [M][H]. */
    final float[] sharedActivations;

    final float[] sharedOut;

    CpuRank(MoeConfig config, int rank) {
        int ranks = config.ranks();
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int rows = CpuMemoryPlan.maxPackedRows(config);
        this.rank = rank;
        this.localExperts = config.expertsOn(rank);
        this.homeRows = new float[m * h];
        this.topkIds = new int[m * k];
        this.topkWeights = new float[m * k];
        this.recvRows = new float[ranks][m * h];
        this.recvIds = new int[ranks][m * k];
        this.recvWeights = new float[ranks][m * k];
        this.recvTokens = new int[ranks];
        this.dispatchFlags = new long[ranks];
        this.combineFlags = new long[ranks];
        this.expertCounts = new int[localExperts];
        this.expertOffsets = new int[localExperts + 1];
        this.expertRows = new int[rows];
        this.packedRowOf = new int[ranks * m * k];
        this.expertOut = new RowBuffer(rows, h);
        this.combineRows = new float[ranks][m * h];
        boolean shared = config.usesSharedExpert();
        int sharedWidth = config.shape().sharedIntermediate();
        this.sharedActivations = shared ? new float[Math.multiplyExact(m, sharedWidth)] : null;
        this.sharedOut = shared ? new float[m * h] : null;
    }
}
