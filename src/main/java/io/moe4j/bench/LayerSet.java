package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.model.LayerWeights;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.TreeSet;
import java.util.function.IntFunction;

/**
 * Layers that differ in their weights alone, each with the same input bound, so that a benchmark
 * can rotate them. Owns the layers; one thread.
 */
final class LayerSet implements AutoCloseable {
    private static final int MOST_EXPERTS_CHECKED = 8;

    private final MoeConfig config;
    private final BenchInput input;
    private final long stream;
    private final List<MoeLayer> layers = new ArrayList<>();
    private final List<BoundStep> steps = new ArrayList<>();
    private final List<List<StepTensors>> tensors = new ArrayList<>();

    LayerSet(
            MoeConfig config,
            IntFunction<LayerWeights> weights,
            int sets,
            BenchInput input,
            long stream) {
        this.config = config;
        this.input = input;
        this.stream = stream;
        try {
            for (int set = 0; set < sets; set++) {
                add(weights.apply(set));
            }
        } catch (RuntimeException | Error e) {
            close();
            throw e;
        }
    }

    private void add(LayerWeights weights) {
        MoeLayer layer = Moe.open(config.toBuilder().weights(weights).build());
        layers.add(layer);
        layer.prepare();
        List<StepTensors> ranks = new ArrayList<>();
        for (int rank = 0; rank < config.ranks(); rank++) {
            ranks.add(
                    input.load(layer, rank * config.maxTokensPerRank(), config.maxTokensPerRank()));
        }
        tensors.add(ranks);
        steps.add(layer.bind(ranks));
    }

    /** The bound steps, one per weight set. */
    List<BoundStep> steps() {
        return steps;
    }

    /** Layer 0. */
    MoeLayer layer() {
        return layers.get(0);
    }

    /** Runs a whole step on every layer, so that their buffers hold the rows. */
    void runAll() {
        for (int set = 0; set < layers.size(); set++) {
            layers.get(set).enqueue(stream, steps.get(set));
        }
        layer().synchronize(stream);
        layers.forEach(MoeLayer::check);
    }

    /** The experts that layer 0 chose for all tokens, [R · M, K]. */
    int[] chosenIds() {
        int perRank = config.maxTokensPerRank() * config.shape().topK();
        int[] all = new int[config.ranks() * perRank];
        for (int rank = 0; rank < config.ranks(); rank++) {
            int[] ids = new int[perRank];
            layer().readRouting(rank, ids, new float[perRank]);
            System.arraycopy(ids, 0, all, rank * perRank, perRank);
        }
        return all;
    }

    /** Output of layer {@code set}, all ranks, [R · M, H]. */
    float[] output(int set) {
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        float[] all = new float[config.ranks() * m * h];
        for (int rank = 0; rank < config.ranks(); rank++) {
            Tensor host = Tensor.allocateHost(config.outDType(), m, h);
            layers.get(set).memory().read(host, tensors.get(set).get(rank).out());
            host.readFloats(0, all, rank * m * h, m * h);
        }
        return all;
    }

    /**
     * Compares some tokens of layer 0's output with float64.
     *
     * @return the largest relative L2 error of a token
     * @throws IllegalStateException if it is too large, so that nothing wrong is timed
     */
    double check() {
        float[] out = output(0);
        int[] ids = chosenIds();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        double worst = 0;
        for (int token : tokensToCheck(ids)) {
            int[] chosen = Arrays.copyOfRange(ids, token * k, (token + 1) * k);
            float[] got = Arrays.copyOfRange(out, token * h, (token + 1) * h);
            double error = input.error(layer(), "token " + token, token, chosen, got);
            worst = Math.max(worst, error);
        }
        return worst;
    }

    /** First, last and middle token, as long as they do not need too many experts decoded. */
    private TreeSet<Integer> tokensToCheck(int[] ids) {
        int k = config.shape().topK();
        int tokens = ids.length / k;
        TreeSet<Integer> chosen = new TreeSet<>();
        int experts = 0;
        for (int token : new int[] {0, tokens - 1, tokens / 2}) {
            int[] row = Arrays.copyOfRange(ids, token * k, (token + 1) * k);
            int needs = (int) Arrays.stream(row).filter(id -> id >= 0).count();
            if (chosen.isEmpty() || experts + needs <= MOST_EXPERTS_CHECKED) {
                experts += chosen.add(token) ? needs : 0;
            }
        }
        return chosen;
    }

    @Override
    public void close() {
        layers.forEach(MoeLayer::close);
        layers.clear();
    }
}
