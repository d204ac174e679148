package io.moe4j.bench;

import io.moe4j.ProgressListener;

/**
 * What all benchmarks have in common.
 *
 * @param backend cpu or cuda, already chosen
 * @param seed of weights, hidden states and routing
 * @param graph true: timed as captured graphs; false: as separate launches
 * @param cold true: weights rotate so that they come from memory, not from the cache
 * @param baseline null, or {@code jcublas}
 * @param sampleMs time to spend on samples of one measurement
 * @param progress hears about each case
 */
public record BenchOptions(
        String backend,
        long seed,
        boolean graph,
        boolean cold,
        String baseline,
        int sampleMs,
        ProgressListener progress) {
    /** Bytes a rotation has to exceed when cold: several times any L2. */
    public static final long ROTATION_BYTES = 400_000_000;

    /** Most weight sets that rotate; layers so small that more were needed are not quite cold. */
    public static final int MOST_WEIGHT_SETS = 256;

    String mode() {
        return graph ? "graph" : "eager";
    }

    String cache() {
        return cold ? "cold" : "hot";
    }

    /**
     * Weight sets so that one rotation reads more than {@link #ROTATION_BYTES}, at most {@link
     * #MOST_WEIGHT_SETS}.
     */
    int weightSets(double bytesPerRun) {
        double wanted = Math.ceil(ROTATION_BYTES / Math.max(1, bytesPerRun));
        return cold ? (int) Math.max(1, Math.min(MOST_WEIGHT_SETS, wanted)) : 1;
    }
}
