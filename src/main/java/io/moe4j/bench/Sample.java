package io.moe4j.bench;

import java.util.Arrays;

/**
 * Times of one measurement in µs.
 *
 * @param medianUs half of the samples took less
 * @param p20Us a fifth took less
 * @param p80Us four fifths took less
 * @param samples how many
 */
public record Sample(double medianUs, double p20Us, double p80Us, int samples) {
    /**
     * {@return the quantiles of samples that each hold {@code perSample} runs}
     *
     * @param us time of each sample in µs
     * @param perSample runs in a sample
     */
    public static Sample of(double[] us, int perSample) {
        double[] sorted = us.clone();
        Arrays.sort(sorted);
        return new Sample(
                quantile(sorted, 0.5) / perSample,
                quantile(sorted, 0.2) / perSample,
                quantile(sorted, 0.8) / perSample,
                us.length);
    }

    /** Between the two neighbours, in proportion. */
    private static double quantile(double[] sorted, double q) {
        double at = q * (sorted.length - 1);
        int below = (int) at;
        int above = Math.min(below + 1, sorted.length - 1);
        return sorted[below] + (at - below) * (sorted[above] - sorted[below]);
    }
}
