package io.moe4j.cli;

import io.moe4j.checker.LayerHarness;
import java.util.Arrays;

/** Times whole steps, each from the call until its result is there. */
final class StepTimer {
    private static final int WARM_UP_STEPS = 3;
    private static final long WARM_UP_NS = 500_000_000;

    private StepTimer() {}

    /**
     * Median milliseconds of {@code steps} steps on loaded input, after a warm-up of a few steps
     * and at least half a second (the JIT compiler needs it).
     */
    static double medianMs(LayerHarness harness, int steps) {
        long begin = System.nanoTime();
        for (int i = 0; i < WARM_UP_STEPS || System.nanoTime() - begin < WARM_UP_NS; i++) {
            harness.step();
        }
        long[] ns = new long[steps];
        for (int i = 0; i < steps; i++) {
            long start = System.nanoTime();
            harness.step();
            ns[i] = System.nanoTime() - start;
        }
        Arrays.sort(ns);
        return (ns[(steps - 1) / 2] + ns[steps / 2]) / 2 / 1e6;
    }
}
