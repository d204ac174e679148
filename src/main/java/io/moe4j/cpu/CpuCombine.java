package io.moe4j.cpu;

import io.moe4j.MoeConfig;
import io.moe4j.tensor.Tensor;
import java.util.Arrays;

/**
 * Combine: the rank that ran the experts sums a slot's contributions in k order and sends one row
 * home; the home rank adds those rows in rank order, then the shared expert, then the residual.
 * Ranks and experts that contribute nothing are skipped, never multiplied by zero.
 */
final class CpuCombine {
    private CpuCombine() {}

    /**
     * Sums the slots of {@code from}'s receive buffer and writes one row each to their home ranks.
     */
    static void send(CpuRank[] ranks, CpuRank from, MoeConfig config, long epoch) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int m = config.maxTokensPerRank();
        for (CpuRank home : ranks) {
            float[] rows = home.combineRows[from.rank];
            float[] weights = from.recvWeights[home.rank];
            for (int token = 0; token < from.recvTokens[home.rank]; token++) {
                boolean first = true;
                for (int i = 0; i < k; i++) {
                    int packed = from.packedRowOf[(home.rank * m + token) * k + i];
                    if (packed < 0) {
                        continue;
                    }
                    float[] y = from.expertOut.chunk(packed);
                    int yAt = from.expertOut.offset(packed);
                    if (first) {
                        setScaled(rows, token * h, y, yAt, weights[token * k + i], h);
                        first = false;
                    } else {
                        addScaled(rows, token * h, y, yAt, weights[token * k + i], h);
                    }
                }
            }
            home.combineFlags[from.rank] = epoch;
        }
    }

    /** Sums the rows that came home for one token and stores the result. */
    static void receive(
            Tensor out,
            boolean accumulate,
            CpuRank home,
            int token,
            MoeConfig config,
            float[] sharedScale,
            float[] sum) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        Arrays.fill(sum, 0, h, 0f);
        boolean first = true;
        for (int rank = 0; rank < config.ranks(); rank++) {
            if (!visits(home.topkIds, token * k, k, rank, config)) {
                continue;
            }
            float[] rows = home.combineRows[rank];
            if (first) {
                System.arraycopy(rows, token * h, sum, 0, h);
                first = false;
            } else {
                add(sum, rows, token * h, h);
            }
        }
        if (home.sharedOut != null) {
            float scale = sharedScale == null ? 1f : sharedScale[token];
            addScaled(sum, 0, home.sharedOut, token * h, scale, h);
        }
        long at = (long) token * h;
        if (accumulate) {
            for (int j = 0; j < h; j++) {
                sum[j] += out.getFloat(at + j);
            }
        }
        out.writeFloats(sum, 0, at, h);
    }

    private static boolean visits(int[] ids, int at, int k, int rank, MoeConfig config) {
        for (int i = at; i < at + k; i++) {
            if (ids[i] >= 0 && config.rankOf(ids[i]) == rank) {
                return true;
            }
        }
        return false;
    }

    private static void setScaled(
            float[] to, int toAt, float[] from, int fromAt, float weight, int count) {
        for (int j = 0; j < count; j++) {
            to[toAt + j] = weight * from[fromAt + j];
        }
    }

    private static void addScaled(
            float[] to, int toAt, float[] from, int fromAt, float weight, int count) {
        for (int j = 0; j < count; j++) {
            to[toAt + j] += weight * from[fromAt + j];
        }
    }

    private static void add(float[] to, float[] from, int fromAt, int count) {
        for (int j = 0; j < count; j++) {
            to[j] += from[fromAt + j];
        }
    }
}
