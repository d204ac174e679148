package io.moe4j.bench;

import io.moe4j.cuda.CudaProbe;
import java.util.function.IntFunction;

/** Times captured graphs and launches on the device, by events. One thread. */
final class CudaTimer {
    /** A graph this long hides what its launch costs. */
    static final double GRAPH_US = 600;

    static final int MOST_ROUNDS = 64;
    static final int MOST_SAMPLES = 1000;
    static final int FEWEST_SAMPLES = 20;
    static final double WARM_UP_US = 20_000;

    private final CudaProbe probe;
    private final int sampleMs;

    CudaTimer(CudaProbe probe, int sampleMs) {
        this.probe = probe;
        this.sampleMs = sampleMs;
    }

    /** Something that can be enqueued and has to be freed. */
    interface Work extends AutoCloseable {
        void enqueue();

        @Override
        void close();
    }

    /** Work without memory of its own. */
    static Work of(Runnable enqueue) {
        return new Work() {
            @Override
            public void enqueue() {
                enqueue.run();
            }

            @Override
            public void close() {
                // nothing to free
            }
        };
    }

    /**
     * Time of one run.
     *
     * @param rounds makes work of that many rounds over the weight sets
     * @param sets runs in a round
     */
    Sample time(IntFunction<Work> rounds, int sets) {
        double roundUs;
        try (Work one = rounds.apply(1)) {
            roundUs = Sample.of(probe.deviceUs(one::enqueue, 5), 1).medianUs();
        }
        int count = (int) Math.max(1, Math.min(MOST_ROUNDS, Math.ceil(GRAPH_US / roundUs)));
        try (Work work = rounds.apply(count)) {
            double us = roundUs * count;
            probe.deviceUs(work::enqueue, samples(WARM_UP_US, us, 3));
            double[] samples =
                    probe.deviceUs(work::enqueue, samples(1e3 * sampleMs, us, FEWEST_SAMPLES));
            return Sample.of(samples, count * sets);
        }
    }

    private static int samples(double budgetUs, double eachUs, int fewest) {
        return (int) Math.max(fewest, Math.min(MOST_SAMPLES, budgetUs / eachUs));
    }
}
