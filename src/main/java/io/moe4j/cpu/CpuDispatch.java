package io.moe4j.cpu;

import io.moe4j.MoeConfig;
import java.util.Arrays;

/**
 * Dispatch: rows and headers into static slots, then counts, offsets and row lists. A row travels
 * once to each distinct rank that owns one of its experts; its header (K local ids, K weights) to
 * every rank, so that no stale header survives a step.
 */
final class CpuDispatch {
    private CpuDispatch() {}

    /** Writes the rows and headers of {@code from} into all ranks' slots, then raises the flags. */
    static void send(CpuRank[] ranks, CpuRank from, MoeConfig config, long epoch) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        for (CpuRank to : ranks) {
            int firstExpert = to.rank * config.expertsPerRank();
            float[] rows = to.recvRows[from.rank];
            for (int token = 0; token < from.tokens; token++) {
                boolean wanted =
                        header(to, from, token * k, k, firstExpert, firstExpert + to.localExperts);
                if (wanted) {
                    System.arraycopy(from.homeRows, token * h, rows, token * h, h);
                }
            }
            to.recvTokens[from.rank] = from.tokens;
            to.dispatchFlags[from.rank] = epoch;
        }
    }

    private static boolean header(
            CpuRank to, CpuRank from, int at, int k, int firstExpert, int endExpert) {
        int[] ids = to.recvIds[from.rank];
        float[] weights = to.recvWeights[from.rank];
        boolean wanted = false;
        for (int i = at; i < at + k; i++) {
            int id = from.topkIds[i];
            boolean here = id >= firstExpert && id < endExpert;
            ids[i] = here ? id - firstExpert : -1;
            weights[i] = from.topkWeights[i];
            wanted |= here;
        }
        return wanted;
    }

    /**
     * Checks that every source has sent, then builds counts, offsets and row lists in slot order.
     * An expert named twice by a token gets one packed row, which combine adds twice.
     */
    static void receive(CpuRank rank, MoeConfig config, long epoch) {
        requireFlags("dispatch_recv", rank.rank, rank.dispatchFlags, epoch);
        int k = config.shape().topK();
        int m = config.maxTokensPerRank();
        Arrays.fill(rank.expertCounts, 0);
        for (int source = 0; source < rank.recvTokens.length; source++) {
            int[] ids = rank.recvIds[source];
            for (int i = 0; i < rank.recvTokens[source] * k; i++) {
                if (ids[i] >= 0 && firstMention(ids, i, k) == i) {
                    rank.expertCounts[ids[i]]++;
                }
            }
        }
        exclusiveScan(rank.expertOffsets, rank.expertCounts);
        int[] next = Arrays.copyOf(rank.expertOffsets, rank.localExperts);
        for (int source = 0; source < rank.recvTokens.length; source++) {
            int[] ids = rank.recvIds[source];
            for (int i = 0; i < rank.recvTokens[source] * k; i++) {
                int slot = source * m + i / k;
                int at = slot * k + i % k;
                if (ids[i] < 0) {
                    rank.packedRowOf[at] = -1;
                    continue;
                }
                int first = firstMention(ids, i, k);
                if (first == i) {
                    int row = next[ids[i]]++;
                    rank.expertRows[row] = slot;
                    rank.packedRowOf[at] = row;
                } else {
                    rank.packedRowOf[at] = rank.packedRowOf[at - (i - first)];
                }
            }
        }
    }

    /** Index of the first header entry of the same token that names the same expert. */
    private static int firstMention(int[] ids, int index, int k) {
        int i = index - index % k;
        while (ids[i] != ids[index]) {
            i++;
        }
        return i;
    }

    private static void exclusiveScan(int[] offsets, int[] counts) {
        int sum = 0;
        for (int e = 0; e < counts.length; e++) {
            offsets[e] = sum;
            sum += counts[e];
        }
        offsets[counts.length] = sum;
    }

    /** All sends of a step precede its waits, so a flag that lags is a fault, not a delay. */
    static void requireFlags(String operation, int rank, long[] flags, long epoch) {
        for (int peer = 0; peer < flags.length; peer++) {
            if (flags[peer] < epoch) {
                throw new MissingFlag(operation, rank, peer, flags[peer], epoch);
            }
        }
    }
}
