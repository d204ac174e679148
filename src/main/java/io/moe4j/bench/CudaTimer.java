package io.moe4j.bench;

import io.moe4j.MoeGraph;
import io.moe4j.cuda.CudaProbe;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.function.IntFunction;

/** Times captured graphs and launches on the device, by events. One thread. */
final class CudaTimer {
    /** A graph this long hides what its launch costs. */
    static final double GRAPH_US = 2_500;

    static final int MOST_ROUNDS = 64;
    static final int MOST_SAMPLES = 1000;
    static final int FEWEST_SAMPLES = 20;
    static final double WARM_UP_US = 20_000;

    /** After so long under full load the clock of a GPU has fallen to where it stays. */
    static final double HOT_US = 1_000_000;

    static final int TURNS = 5;

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
        return of(enqueue, () -> {});
    }

    /** Work that {@code free} frees. */
    static Work of(Runnable enqueue, Runnable free) {
        return new Work() {
            @Override
            public void enqueue() {
                enqueue.run();
            }

            @Override
            public void close() {
                free.run();
            }
        };
    }

    /** Replays of a graph on the probe's stream; takes over the graph. */
    static Work of(CudaProbe probe, MoeGraph graph) {
        return of(() -> graph.launch(probe.stream()), graph::close);
    }

    /**
     * Time of one run.
     *
     * @param rounds makes work of that many rounds over the weight sets
     * @param sets runs in a round
     */
    Sample time(IntFunction<Work> rounds, int sets) {
        Prepared prepared = prepare(new Task(rounds, sets));
        try (Work work = prepared.work) {
            probe.deviceUs(work::enqueue, samples(WARM_UP_US, prepared.us, 3));
            double[] samples =
                    probe.deviceUs(
                            work::enqueue, samples(1e3 * sampleMs, prepared.us, FEWEST_SAMPLES));
            return Sample.of(samples, prepared.runs);
        }
    }

    /**
     * What is timed.
     *
     * @param rounds makes work of that many rounds over the weight sets
     * @param sets runs in a round
     */
    record Task(IntFunction<Work> rounds, int sets) {}

    /**
     * Times of one run of each task, measured in turns on a GPU that they have made hot together.
     * why: heavy work heats the GPU to its power limit, where its clock falls by a third within a
     * second; rates compare only if they are of the same moments.
     *
     * @param tasks what to time
     * @return a sample of each
     */
    List<Sample> timeInTurns(List<Task> tasks) {
        List<Prepared> prepared = new ArrayList<>();
        try {
            tasks.forEach(task -> prepared.add(prepare(task)));
            double each = HOT_US / TURNS / tasks.size();
            for (int turn = 0; turn < TURNS; turn++) {
                prepared.forEach(p -> probe.deviceUs(p.work::enqueue, samples(each, p.us, 1)));
            }
            List<List<Double>> us = new ArrayList<>();
            tasks.forEach(task -> us.add(new ArrayList<>()));
            for (int turn = 0; turn < TURNS; turn++) {
                for (int i = 0; i < tasks.size(); i++) {
                    Prepared p = prepared.get(i);
                    int samples = samples(1e3 * sampleMs / TURNS, p.us, FEWEST_SAMPLES / TURNS);
                    for (double sample : probe.deviceUs(p.work::enqueue, samples)) {
                        us.get(i).add(sample);
                    }
                }
            }
            List<Sample> result = new ArrayList<>();
            for (int i = 0; i < tasks.size(); i++) {
                double[] all = us.get(i).stream().mapToDouble(Double::doubleValue).toArray();
                result.add(Sample.of(all, prepared.get(i).runs));
            }
            return result;
        } finally {
            Collections.reverse(prepared);
            prepared.forEach(p -> p.work.close());
        }
    }

    /** Work that takes at least {@link #GRAPH_US}. */
    private record Prepared(Work work, double us, int runs) {}

    private Prepared prepare(Task task) {
        double roundUs;
        try (Work one = task.rounds.apply(1)) {
            roundUs = Sample.of(probe.deviceUs(one::enqueue, 5), 1).medianUs();
        }
        int count = (int) Math.max(1, Math.min(MOST_ROUNDS, Math.ceil(GRAPH_US / roundUs)));
        return new Prepared(task.rounds.apply(count), roundUs * count, count * task.sets);
    }

    private static int samples(double budgetUs, double eachUs, int fewest) {
        return (int) Math.max(fewest, Math.min(MOST_SAMPLES, budgetUs / eachUs));
    }
}
