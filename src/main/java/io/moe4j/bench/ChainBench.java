package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.function.IntFunction;

/**
 * The whole step over virtual ranks on one device, router to combine. Uniform routing is that of
 * the layer's own router on random hidden states; with any other pattern the ids are given, and no
 * router runs.
 */
public final class ChainBench {
    private final BenchOptions options;

    /**
     * A benchmark with these options.
     *
     * @param options how to measure
     */
    public ChainBench(BenchOptions options) {
        this.options = options;
    }

    /**
     * Measures one step per number of tokens.
     *
     * @param model name for the report
     * @param layer shape, rule, activation and random weights; ranks as wanted
     * @param vectors the weights of {@code layer}, for the CPU as they are
     * @param routing how tokens are routed
     * @param tokens tokens of each rank
     * @return the measurements
     */
    public List<BenchRow> run(
            String model,
            MoeConfig layer,
            RandomWeights vectors,
            RoutingPattern routing,
            List<Integer> tokens) {
        List<BenchRow> rows = new ArrayList<>();
        for (int i = 0; i < tokens.size(); i++) {
            MoeConfig config =
                    layer.toBuilder()
                            .maxTokensPerRank(tokens.get(i))
                            .routingInput(
                                    routing.isUniform() ? RoutingInput.HIDDEN : RoutingInput.TOPK)
                            .backend(options.backend())
                            .build();
            rows.add(
                    options.backend().equals("cuda")
                            ? onCuda(model, config, vectors, routing)
                            : onCpu(model, config, vectors, routing));
            options.progress().progress(i + 1, tokens.size());
        }
        return rows;
    }

    private BenchRow onCuda(
            String model, MoeConfig config, RandomWeights vectors, RoutingPattern routing) {
        BenchInput input = input(config, routing);
        MoeShape shape = config.shape();
        IntFunction<LayerWeights> weights =
                set -> CudaProbe.randomWeights(shape, vectors, options.seed() + set);
        try (CudaProbe probe = new CudaProbe()) {
            int sets = sets(config, weights, input, probe);
            try (LayerSet layers = new LayerSet(config, weights, sets, input, probe.stream())) {
                layers.runAll();
                double error = layers.check();
                BenchCase ran = ran(model, config, routing, layers.chosenIds());
                CudaTimer timer = new CudaTimer(probe, options.sampleMs());
                Sample sample = timer.time(rounds -> work(probe, layers, rounds), sets);
                layers.runAll(); // why: its check reports a fault of any replay
                return row(ran, config, sample, sets, error);
            }
        }
    }

    /**
     * As many sets as make a rotation cold; how many experts one step hits shows in a first run.
     */
    private int sets(
            MoeConfig config,
            IntFunction<LayerWeights> weights,
            BenchInput input,
            CudaProbe probe) {
        try (LayerSet one = new LayerSet(config, weights, 1, input, probe.stream())) {
            one.runAll();
            int[] counts = RoutingPattern.counts(one.chosenIds(), 0, config.shape().experts());
            int hit = (int) java.util.Arrays.stream(counts).filter(c -> c > 0).count();
            int wanted = options.weightSets(2.0 * hit * config.shape().expertElements());
            long fit = (probe.freeBytes() / 10 * 8) / Moe.plan(config).totalBytes();
            return (int) Math.max(1, Math.min(wanted, fit));
        }
    }

    private CudaTimer.Work work(CudaProbe probe, LayerSet layers, int rounds) {
        List<BoundStep> order = new ArrayList<>();
        Collections.nCopies(rounds, layers.steps()).forEach(order::addAll);
        if (!options.graph()) {
            return CudaTimer.of(
                    () -> order.forEach(step -> step.layer().enqueue(probe.stream(), step)));
        }
        return CudaTimer.of(
                probe,
                layers.layer()
                        .capture(probe.stream(), order.stream().map(GraphPart::whole).toList()));
    }

    private BenchRow onCpu(
            String model, MoeConfig config, RandomWeights vectors, RoutingPattern routing) {
        BenchInput input = input(config, routing);
        try (LayerSet layers = new LayerSet(config, set -> vectors, 1, input, 0)) {
            layers.runAll();
            double error = layers.check();
            BenchCase ran = ran(model, config, routing, layers.chosenIds());
            BoundStep step = layers.steps().get(0);
            long warm = System.nanoTime() + 1_000_000L * options.sampleMs();
            while (System.nanoTime() < warm) {
                layers.layer().enqueue(0, step);
            }
            List<Double> samples = new ArrayList<>();
            long end = System.nanoTime() + 1_000_000L * options.sampleMs();
            while (samples.size() < 5 || System.nanoTime() < end) {
                long start = System.nanoTime();
                layers.layer().enqueue(0, step);
                samples.add((System.nanoTime() - start) / 1e3);
            }
            Sample sample = Sample.of(samples.stream().mapToDouble(d -> d).toArray(), 1);
            return row(ran, config, sample, 1, error);
        }
    }

    private BenchInput input(MoeConfig config, RoutingPattern routing) {
        int tokens = Math.multiplyExact(config.ranks(), config.maxTokensPerRank());
        int[] ids =
                routing.isUniform()
                        ? null
                        : routing.ids(
                                tokens,
                                config.shape().experts(),
                                config.shape().topK(),
                                options.seed());
        return BenchInput.of(config, ids, options.seed());
    }

    private static BenchCase ran(
            String model, MoeConfig config, RoutingPattern routing, int[] ids) {
        int[] counts = RoutingPattern.counts(ids, 0, config.shape().experts());
        return BenchCase.of(0, model, config, routing.toString(), counts);
    }

    private BenchRow row(BenchCase ran, MoeConfig config, Sample sample, int sets, double error) {
        MoeShape shape = config.shape();
        Cost cost =
                Cost.experts(
                        Stage.CHAIN,
                        ran.hidden(),
                        ran.intermediate(),
                        ran.rows(),
                        ran.hitExperts());
        if (config.usesSharedExpert()) {
            cost =
                    cost.plus(
                            Cost.experts(
                                    Stage.CHAIN,
                                    ran.hidden(),
                                    shape.sharedIntermediate(),
                                    ran.allTokens(),
                                    1));
        }
        if (config.routingInput() == RoutingInput.HIDDEN) {
            double router = (double) shape.experts() * shape.hidden();
            cost = cost.plus(new Cost(4 * router, 4 * router, 2 * router * ran.allTokens()));
        }
        return Rows.row("chain", ran, Stage.STEP, options, sets, sample, cost, null, null, error);
    }
}
