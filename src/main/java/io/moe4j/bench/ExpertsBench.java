package io.moe4j.bench;

import io.moe4j.BackendUnavailableException;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
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
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.IntFunction;
import java.util.stream.Stream;

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
            rows.addAll(measure(benchCase));
            options.progress().progress(i + 1, cases.size());
        }
        return rows;
    }

    /**
     * Measures all cases, and a dense product before and after each prefill: the faster one becomes
     * the row that follows it. why around each: both heat the GPU, whose clock falls by a third
     * within a second, and the product must run at the clock of what is judged by it.
     *
     * @param cases what to measure
     * @return the measurements
     */
    public List<BenchRow> runBesideDense(List<BenchCase> cases) {
        List<BenchRow> rows = new ArrayList<>();
        for (int i = 0; i < cases.size(); i++) {
            boolean prefill = cases.get(i).number() >= Prefill.FIRST_NUMBER;
            Optional<BenchRow> before = prefill ? dense() : Optional.empty();
            rows.addAll(measure(cases.get(i)));
            Optional<BenchRow> after = before.isPresent() ? dense() : before;
            Stream.concat(before.stream(), after.stream())
                    .min(Comparator.comparingDouble(BenchRow::medianUs))
                    .ifPresent(rows::add);
            options.progress().progress(i + 1, cases.size());
        }
        return rows;
    }

    private List<BenchRow> measure(BenchCase benchCase) {
        return options.backend().equals("cuda") ? onCuda(benchCase) : onCpu(benchCase);
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

    private List<BenchRow> onCuda(BenchCase benchCase) {
        RandomWeights vectors = vectors(benchCase);
        MoeConfig config = config(benchCase, vectors);
        try (CudaProbe probe = new CudaProbe()) {
            int sets = setsThatFit(benchCase, config, probe, wantedSets(benchCase, Stage.G2));
            int[] ids = benchCase.deal(config.shape().topK());
            IntFunction<LayerWeights> weights =
                    set -> CudaProbe.randomWeights(config.shape(), vectors, options.seed() + set);
            LayerSet.Input input = LayerSet.Input.of(config, ids, options.seed());
            try (LayerSet layers = new LayerSet(config, weights, sets, input, probe.stream())) {
                layers.runAll();
                double error = layers.check();
                float[] before = layers.output(0);
                List<BenchRow> rows = stages(benchCase, probe, layers, sets, error);
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
            BenchCase benchCase, CudaProbe probe, LayerSet layers, int sets, double error) {
        List<BenchRow> rows = new ArrayList<>();
        CudaTimer timer = new CudaTimer(probe, options.sampleMs());
        List<BoundStep> all = CudaProbe.rotatingWeights(layers.steps());
        try (Baseline baseline = new Baseline(benchCase, probe, timer, sets)) {
            for (Stage stage : List.of(Stage.G1, Stage.G2, Stage.CHAIN)) {
                int rotating = Math.min(sets, wantedSets(benchCase, stage));
                List<BoundStep> steps = all.subList(0, rotating);
                Part part = part(stage);
                Sample sample = timer.time(rounds -> work(probe, steps, part, rounds), rotating);
                rows.add(
                        Rows.row(
                                        "experts",
                                        benchCase,
                                        stage,
                                        options,
                                        rotating,
                                        sample,
                                        cost(benchCase, stage),
                                        options.baseline(),
                                        baseline.us(part, rotating),
                                        error)
                                .withKernels(
                                        String.join(" ", CudaProbe.kernels(steps.get(0), part))));
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
        MoeGraph graph = probe.captureExperts(steps, part, rounds);
        return new CudaTimer.Work() {
            @Override
            public void enqueue() {
                graph.launch(probe.stream());
            }

            @Override
            public void close() {
                graph.close();
            }
        };
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
     * One dense product of {@link #DENSE}³ by cuBLAS, beside which prefill is judged; nothing on
     * the CPU, or where cuBLAS cannot be used.
     */
    private Optional<BenchRow> dense() {
        if (!options.backend().equals("cuda")) {
            return Optional.empty();
        }
        // as gate/up of one expert: [N, H] · [2·I, H]ᵀ with N = H = 2·I
        BenchCase square =
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
        try (CudaProbe probe = new CudaProbe();
                CudaProbe.Cublas cublas = probe.cublas(square.counts(), DENSE, DENSE / 2, 1)) {
            CudaTimer timer = new CudaTimer(probe, options.sampleMs());
            Sample sample = timer.time(rounds -> replay(cublas, Part.GATE_UP, 1, rounds), 1);
            return Optional.of(
                    Rows.row(
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
                            .withKernels("cuBLAS " + cublas.version()));
        } catch (BackendUnavailableException e) {
            notes.add("no dense product: " + e.getMessage());
            return Optional.empty();
        }
    }

    private static CudaTimer.Work replay(CudaProbe.Cublas cublas, Part part, int sets, int rounds) {
        CudaProbe.Replay replay = cublas.capture(part, sets, rounds);
        return new CudaTimer.Work() {
            @Override
            public void enqueue() {
                replay.launch();
            }

            @Override
            public void close() {
                replay.close();
            }
        };
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
        LayerSet.Input input = LayerSet.Input.of(config, ids, options.seed());
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
