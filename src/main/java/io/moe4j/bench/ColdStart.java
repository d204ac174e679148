package io.moe4j.bench;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.RandomWeights;

/**
 * From the first use of CUDA in a process to the first output on the host: driver, context, kernel
 * image, buffers, one step. Weights of a real layer are filled by a kernel, so that what is
 * measured is not the loading of weights. Only the first measurement of a process is cold.
 *
 * @param us the time
 * @param error largest relative L2 error of the tokens checked afterwards
 * @param ran what ran
 */
record ColdStart(double us, double error, BenchCase ran) {
    private static final ModelPreset MODEL = ModelPreset.QWEN3_30B_A3B;
    private static final int TOKENS = 128;

    static ColdStart measure(int ranks, long seed) {
        RandomWeights vectors = MODEL.randomWeights(seed);
        MoeConfig config =
                MoeConfig.builder()
                        .weights(vectors)
                        .rule(MODEL.rule())
                        .activation(MODEL.activation())
                        .routingInput(RoutingInput.HIDDEN)
                        .ranks(ranks)
                        .maxTokensPerRank(TOKENS)
                        .backend("cuda")
                        .build();
        BenchInput input = BenchInput.of(config, null, seed);
        long start = System.nanoTime();
        Moe.choose("cuda");
        try (CudaProbe probe = new CudaProbe();
                LayerSet layers =
                        new LayerSet(
                                config,
                                set -> CudaProbe.randomWeights(MODEL.shape(), vectors, seed),
                                1,
                                input,
                                probe.stream())) {
            layers.runAll();
            layers.output(0);
            double us = (System.nanoTime() - start) / 1e3;
            int[] counts = RoutingPattern.counts(layers.chosenIds(), 0, MODEL.shape().experts());
            BenchCase ran = BenchCase.of(0, MODEL.id(), config, "uniform", counts);
            return new ColdStart(us, layers.check(), ran);
        }
    }
}
