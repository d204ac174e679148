package io.moe4j.bench;

import io.moe4j.BackendUnavailableException;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.cuda.CudaProbe.Part;
import io.moe4j.model.Activation;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.function.IntFunction;

/**
 * The experts phase of one rank over counts that only the device knows: the chain, and on CUDA each
 * product alone. Rows are put in place by a real step; then the phase runs again and again on them.
 */
public final class ExpertsBench {
    /** Edge of the dense product. */
    static final int DENSE = 8192;

    private final BenchOptions options;
    private final List<String> notes = new ArrayList<>();

    /**
     * A benchmark with these options.
     *
     * @param options how to measure
     */
    public ExpertsBench(BenchOptions options) {
        this.options = options;
    }

    /** {@return what was left out, and why; one line each} */
    public List<String> notes() {
        return notes;
    }

    /**
     * Measures all cases.
     *
     * @param cases what to measure
     * @return the measurements
     */
    public List<BenchRow> run(List<BenchCase> cases) {
        List<BenchRow> rows = new ArrayList<>();
        for (int i = 0; i < cases.size(); i++) {
            BenchCase benchCase = cases.get(i);
            rows.addAll(measure(benchCase, false));
            options.progress().progress(i + 1, cases.size());
        }
        return rows;
    }

    /**
     * Measures all cases, and beside each prefill, in turns with it, a dense product, which becomes
     * the row that follows it.
     *
     * @param cases what to measure
     * @return the measurements
     */
    public List<BenchRow> runBesideDense(List<BenchCase> cases) {
        List<BenchRow> rows = new ArrayList<>();
        for (int i = 0; i < cases.size(); i++) {
            boolean prefill = cases.get(i).number() >= Prefill.FIRST_NUMBER;
            rows.addAll(measure(cases.get(i), prefill));
            options.progress().progress(i + 1, cases.size());
        }
        return rows;
    }

    private List<BenchRow> measure(BenchCase benchCase, boolean besideDense) {
        return options.backend().equals("cuda") ? onCuda(benchCase, besideDense) : onCpu(benchCase);
    }

    MoeConfig config(BenchCase benchCase, RandomWeights vectors) {
        Activation activation =
                ModelPreset.find(benchCase.model())
                        .map(ModelPreset::activation)
                        .orElse(Activation.swiGlu());
        return MoeConfig.builder()
                .weights(vectors)
                .activation(activation)
                .maxTokensPerRank(benchCase.allTokens())
                .expectedRowsPerExpert(benchCase.expectedRows())
                .backend(options.backend())
                .build();
    }

    RandomWeights vectors(BenchCase benchCase) {
        MoeShape local =
                MoeShape.of(
                        benchCase.hidden(),
                        benchCase.intermediate(),
                        benchCase.counts().length,
                        Math.min(benchCase.topK(), benchCase.counts().length));
        RandomWeights weights = RandomWeights.of(local, options.seed());
        boolean biased =
                ModelPreset.find(benchCase.model())
                        .map(preset -> preset.randomWeights(0).hasBias())
                        .orElse(false);
        return biased ? weights.withBias() : weights;
    }

    // ------------------------------------------------------------------ CUDA

    private List<BenchRow> onCuda(BenchCase benchCase, boolean besideDense) {
        RandomWeights vectors = vectors(benchCase);
        MoeConfig config = config(benchCase, vectors);
        try (CudaProbe probe = new CudaProbe()) {
            int sets = setsThatFit(benchCase, config, probe, wantedSets(benchCase, Stage.G2));
            int[] ids = benchCase.deal(config.shape().topK());
            IntFunction<LayerWeights> weights =
                    set -> CudaProbe.randomWeights(config.shape(), vectors, options.seed() + set);
            BenchInput input = BenchInput.of(config, ids, options.seed());
            try (LayerSet layers = new LayerSet(config, weights, sets, input, probe.stream())) {
                layers.runAll();
                double error = layers.check();
                float[] before = layers.output(0);
                List<BenchRow> rows = stages(benchCase, probe, layers, sets, error, besideDense);
                layers.runAll();
                if (!Arrays.equals(before, layers.output(0))) {
                    throw new IllegalStateException(
                            benchCase + ": the output changed while it was timed");
                }
                return rows;
            }
        }
    }

    private int wantedSets(BenchCase benchCase, Stage stage) {
        return options.weightSets(cost(benchCase, stage).weightBytes());
    }

    private int setsThatFit(BenchCase benchCase, MoeConfig config, CudaProbe probe, int wanted) {
        double rotation = wanted * cost(benchCase, Stage.G2).weightBytes();
        if (options.cold() && rotation < BenchOptions.ROTATION_BYTES) {
            notes.add(
                    label(benchCase)
                            + ": a rotation of "
                            + wanted
                            + " weight sets reads only "
                            + Math.round(rotation / 1e6)
                            + " MB, so some weights may come from the cache");
        }
        long each = Moe.plan(config).totalBytes();
        long fit = Math.max(1, probe.freeBytes() / 10 * 8 / each);
        if (fit < wanted) {
            notes.add(
                    label(benchCase)
                            + ": "
                            + fit
                            + " weight sets fit the device, "
                            + wanted
                            + " are needed to be cold");
        }
        return (int) Math.min(wanted, fit);
    }

    private List<BenchRow> stages(
            BenchCase benchCase,
            CudaProbe probe,
            LayerSet layers,
            int sets,
            double error,
            boolean besideDense) {
        List<BenchRow> rows = new ArrayList<>();
        CudaTimer timer = new CudaTimer(probe, options.sampleMs());
        List<BoundStep> all = CudaProbe.rotatingWeights(layers.steps());
        List<Stage> stages = List.of(Stage.G1, Stage.G2, Stage.CHAIN);
        List<CudaTimer.Task> tasks = new ArrayList<>();
        for (Stage stage : stages) {
            List<BoundStep> steps = all.subList(0, Math.min(sets, wantedSets(benchCase, stage)));
            tasks.add(
                    new CudaTimer.Task(
                            rounds -> work(probe, steps, part(stage), rounds), steps.size()));
        }
        try (Dense dense = new Dense(probe, besideDense);
                Baseline baseline = new Baseline(benchCase, probe, timer, sets)) {
            List<Sample> samples = new ArrayList<>();
            if (dense.task() != null) {
                tasks.add(dense.task());
                samples.addAll(timer.timeInTurns(tasks));
            }
            for (int i = 0; i < stages.size(); i++) {
                Stage stage = stages.get(i);
                Part part = part(stage);
                CudaTimer.Task task = tasks.get(i);
                Sample sample =
                        dense.task() != null
                                ? samples.get(i)
                                : timer.time(task.rounds(), task.sets());
                rows.add(
                        Rows.row(
                                        "experts",
                                        benchCase,
                                        stage,
                                        options,
                                        task.sets(),
                                        sample,
                                        cost(benchCase, stage),
                                        options.baseline(),
                                        baseline.us(part, task.sets()),
                                        error)
                                .withKernels(
                                        String.join(" ", CudaProbe.kernels(all.get(0), part))));
            }
            if (dense.task() != null) {
                rows.add(dense.row(samples.get(stages.size())));
            }
        }
        return rows;
    }

    private CudaTimer.Work work(CudaProbe probe, List<BoundStep> steps, Part part, int rounds) {
        if (!options.graph()) {
            return CudaTimer.of(
                    () -> {
                        for (int round = 0; round < rounds; round++) {
                            steps.forEach(step -> probe.launchExperts(step, part));
                        }
                    });
        }
        return CudaTimer.of(probe, probe.captureExperts(steps, part, rounds));
    }

    /** cuBLAS on the same counts, if asked for and there. */
    private final class Baseline implements AutoCloseable {
        private final CudaTimer timer;
        private CudaProbe.Cublas cublas;

        Baseline(BenchCase benchCase, CudaProbe probe, CudaTimer timer, int sets) {
            this.timer = timer;
            if (options.baseline() != null) {
                try {
                    cublas =
                            probe.cublas(
                                    benchCase.counts(),
                                    benchCase.hidden(),
                                    benchCase.intermediate(),
                                    sets);
                } catch (BackendUnavailableException e) {
                    notes.add(label(benchCase) + ": no baseline: " + e.getMessage());
                }
            }
        }

        Double us(Part part, int sets) {
            if (cublas == null) {
                return null;
            }
            return timer.time(rounds -> replay(cublas, part, sets, rounds), sets).medianUs();
        }

        @Override
        public void close() {
            if (cublas != null) {
                cublas.close();
            }
        }
    }

    /**
     * A dense product of {@link #DENSE}³ by cuBLAS, beside which prefill is judged, if it is asked
     * for and there.
     */
    private final class Dense implements AutoCloseable {
        // as gate/up of one expert: [N, H] · [2·I, H]ᵀ with N = H = 2·I
        private final BenchCase square =
                new BenchCase(
                        0,
                        "dense",
                        DENSE,
                        DENSE / 2,
                        1,
                        1,
                        1,
                        DENSE,
                        "uniform",
                        new int[] {DENSE},
                        Map.of());
        private CudaProbe.Cublas cublas;

        Dense(CudaProbe probe, boolean asked) {
            if (asked) {
                try {
                    cublas = probe.cublas(square.counts(), DENSE, DENSE / 2, 1);
                } catch (BackendUnavailableException e) {
                    notes.add("no dense product: " + e.getMessage());
                }
            }
        }

        /** The product; null if there is none. */
        CudaTimer.Task task() {
            return cublas == null
                    ? null
                    : new CudaTimer.Task(rounds -> replay(cublas, Part.GATE_UP, 1, rounds), 1);
        }

        BenchRow row(Sample sample) {
            return Rows.row(
                            "dense",
                            square,
                            Stage.DENSE,
                            options,
                            1,
                            sample,
                            cost(square, Stage.G1),
                            null,
                            null,
                            null)
                    .withKernels("cuBLAS " + cublas.version());
        }

        @Override
        public void close() {
            if (cublas != null) {
                cublas.close();
            }
        }
    }

    private static CudaTimer.Work replay(CudaProbe.Cublas cublas, Part part, int sets, int rounds) {
        CudaProbe.Replay replay = cublas.capture(part, sets, rounds);
        return CudaTimer.of(replay::launch, replay::close);
    }

    private static Part part(Stage stage) {
        return switch (stage) {
            case G1 -> Part.GATE_UP;
            case G2 -> Part.DOWN;
            default -> Part.CHAIN;
        };
    }

    private static Cost cost(BenchCase benchCase, Stage stage) {
        return Cost.experts(
                stage,
                benchCase.hidden(),
                benchCase.intermediate(),
                benchCase.rows(),
                benchCase.hitExperts());
    }

    private static String label(BenchCase benchCase) {
        return "case "
                + benchCase.number()
                + " "
                + benchCase.model()
                + " EP"
                + benchCase.ep()
                + " T"
                + benchCase.tokens();
    }

    // ------------------------------------------------------------------ CPU

    private List<BenchRow> onCpu(BenchCase benchCase) {
        RandomWeights vectors = vectors(benchCase);
        MoeConfig config = config(benchCase, vectors);
        int[] ids = benchCase.deal(config.shape().topK());
        BenchInput input = BenchInput.of(config, ids, options.seed());
        try (LayerSet layers = new LayerSet(config, set -> vectors, 1, input, 0)) {
            layers.runAll();
            double error = layers.check();
            Sample sample = cpuTime(layers.layer(), layers.steps().get(0));
            return List.of(
                    Rows.row(
                            "experts",
                            benchCase,
                            Stage.CHAIN,
                            options,
                            1,
                            sample,
                            cost(benchCase, Stage.CHAIN),
                            null,
                            null,
                            error));
        }
    }

    private Sample cpuTime(MoeLayer layer, BoundStep step) {
        List<Double> samples = new ArrayList<>();
        long warm = System.nanoTime() + 1_000_000L * options.sampleMs();
        while (System.nanoTime() < warm) {
            layer.enqueue(0, step);
        }
        long end = System.nanoTime() + 1_000_000L * options.sampleMs();
        while (samples.size() < 5 || System.nanoTime() < end) {
            layer.enqueue(0, step, Phase.ROUTE, Phase.DISPATCH_RECV);
            long start = System.nanoTime();
            layer.enqueue(0, step, Phase.EXPERTS, Phase.EXPERTS);
            samples.add((System.nanoTime() - start) / 1e3);
            layer.enqueue(0, step, Phase.COMBINE_SEND, Phase.COMBINE_RECV);
        }
        return Sample.of(samples.stream().mapToDouble(d -> d).toArray(), 1);
    }
}
