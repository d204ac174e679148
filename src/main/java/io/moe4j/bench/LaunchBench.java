package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import java.util.Arrays;
import java.util.List;

/**
 * What a caller waits for besides the device: a cold start, and what the host spends on a step,
 * enqueueing all its kernels or launching it as a graph. That layer is small, because host time
 * does not depend on its size.
 */
public final class LaunchBench {
    private static final MoeShape SHAPE = MoeShape.of(1024, 256, 32, 8);
    private static final int TOKENS = 8;
    private static final int WARM_UP = 3000;
    private static final int SAMPLES = 2000;
    private static final int IN_FLIGHT = 16;

    private final BenchOptions options;

    /**
     * A benchmark with these options; CUDA only.
     *
     * @param options how to measure
     */
    public LaunchBench(BenchOptions options) {
        this.options = options;
    }

    /**
     * Measures all three with {@code ranks} virtual ranks; cold if CUDA was not used before.
     *
     * @param ranks R, number of virtual ranks
     * @return the measurements
     */
    public List<BenchRow> run(int ranks) {
        ColdStart cold = ColdStart.measure(ranks, options.seed());
        RandomWeights vectors = RandomWeights.of(SHAPE, options.seed());
        MoeConfig config =
                MoeConfig.builder()
                        .weights(vectors)
                        .rule(RoutingRule.softmaxTopK(true))
                        .routingInput(RoutingInput.HIDDEN)
                        .ranks(ranks)
                        .maxTokensPerRank(TOKENS)
                        .backend("cuda")
                        .build();
        BenchInput input = BenchInput.of(config, null, options.seed());
        try (CudaProbe probe = new CudaProbe();
                LayerSet layers =
                        new LayerSet(
                                config,
                                set -> CudaProbe.randomWeights(SHAPE, vectors, options.seed()),
                                1,
                                input,
                                probe.stream())) {
            layers.runAll();
            double error = layers.check();
            MoeLayer layer = layers.layer();
            BoundStep step = layers.steps().get(0);
            BenchCase ran =
                    BenchCase.of(
                            0,
                            "small",
                            config,
                            "uniform",
                            RoutingPattern.counts(layers.chosenIds(), 0, SHAPE.experts()));
            BenchOptions eager = mode(false);
            BenchOptions graphs = mode(true);
            Sample enqueue = hostTime(probe, () -> layer.enqueue(probe.stream(), step));
            Sample launch;
            try (MoeGraph graph = layer.capture(probe.stream(), step)) {
                launch = hostTime(probe, () -> graph.launch(probe.stream()));
            }
            layers.runAll();
            options.progress().progress(1, 1);
            return List.of(
                    Rows.row(
                            "launch",
                            cold.ran(),
                            Stage.COLD_START,
                            eager,
                            1,
                            Sample.of(new double[] {cold.us()}, 1),
                            null,
                            null,
                            null,
                            cold.error()),
                    Rows.row(
                            "launch",
                            ran,
                            Stage.HOST_ENQUEUE,
                            eager,
                            1,
                            enqueue,
                            null,
                            null,
                            null,
                            error),
                    Rows.row(
                            "launch",
                            ran,
                            Stage.HOST_GRAPH,
                            graphs,
                            1,
                            launch,
                            null,
                            null,
                            null,
                            error));
        }
    }

    private BenchOptions mode(boolean graph) {
        return new BenchOptions(
                "cuda", options.seed(), graph, false, null, options.sampleMs(), options.progress());
    }

    /**
     * Time of single calls; the queue is drained often enough that no call waits for the device.
     */
    private static Sample hostTime(CudaProbe probe, Runnable call) {
        double[] us = new double[SAMPLES];
        for (int i = -WARM_UP; i < SAMPLES; i++) {
            if (i % IN_FLIGHT == 0) {
                probe.synchronize();
            }
            long start = System.nanoTime();
            call.run();
            long ns = System.nanoTime() - start;
            if (i >= 0) {
                us[i] = ns / 1e3;
            }
        }
        probe.synchronize();
        return Sample.of(Arrays.copyOf(us, SAMPLES), 1);
    }
}
