package io.moe4j.bench;

import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.Arrays;
import java.util.OptionalDouble;

/**
 * What a benchmark gives a layer, tokens of all ranks one after the other, M each; and what float64
 * makes of a token. Experts of a token have equal weights.
 *
 * @param hidden [R · M, H], bfloat16 values
 * @param ids [R · M, K] or null if the layer routes by its own router
 */
record BenchInput(float[] hidden, int[] ids) {
    /** Random hidden states and given ids. */
    static BenchInput of(MoeConfig config, int[] ids, long seed) {
        int tokens = config.ranks() * config.maxTokensPerRank();
        return new BenchInput(Checker.randomHidden(seed, 0, tokens, config.shape().hidden()), ids);
    }

    /** Some of the tokens, in memory of the layer. */
    StepTensors load(MoeLayer layer, int first, int tokens) {
        MoeConfig config = layer.config();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        Tensor in = layer.memory().allocate(config.hiddenDType(), tokens, h);
        Tensor host = Tensor.allocateHost(config.hiddenDType(), tokens, h);
        host.writeFloats(hidden, first * h, 0, tokens * h);
        layer.memory().write(in, host);
        Tensor count = layer.memory().allocate(DType.I32, 1);
        layer.memory().write(count, Tensor.ofInts(new int[] {tokens}, 1));
        Tensor out = layer.memory().allocate(config.outDType(), tokens, h);
        if (config.routingInput() == RoutingInput.HIDDEN) {
            return StepTensors.hidden(out, in, count);
        }
        Tensor chosen = layer.memory().allocate(DType.I32, tokens, k);
        int[] mine = Arrays.copyOfRange(ids, first * k, (first + tokens) * k);
        layer.memory().write(chosen, Tensor.ofInts(mine, tokens, k));
        Tensor weights = layer.memory().allocate(DType.F32, tokens, k);
        layer.memory().write(weights, Tensor.ofFloats(equal(tokens * k, k), tokens, k));
        return StepTensors.topk(out, in, chosen, weights, count);
    }

    /**
     * The relative L2 error of a token against float64.
     *
     * @param layer gave it
     * @param name of the token in a message
     * @param token its place among all ranks'
     * @param chosen its experts, [K]
     * @param got its output, [H]
     * @throws IllegalStateException if it is too large, so that nothing wrong is timed
     */
    double error(MoeLayer layer, String name, int token, int[] chosen, float[] got) {
        double tolerance = new Checker(OptionalDouble.empty()).toleranceOf(layer.backend());
        double[] want = expected(layer.config(), token, chosen);
        double error = TokenErrors.of(got, want, 1, got.length).max();
        if (!(error <= tolerance)) {
            throw new IllegalStateException(
                    String.format(
                            "%s is off by %.1e (tolerance %.1e): a wrong result is not timed",
                            name, error, tolerance));
        }
        return error;
    }

    private double[] expected(MoeConfig exact, int token, int[] chosen) {
        int h = exact.shape().hidden();
        int k = exact.shape().topK();
        float[] row = Arrays.copyOfRange(hidden, token * h, (token + 1) * h);
        Float64Oracle oracle = Float64Oracle.of(exact);
        if (exact.routingInput() == RoutingInput.HIDDEN) {
            ReferenceCase reference = oracle.expect(0, row, 1);
            int[] sorted = chosen.clone();
            Arrays.sort(sorted);
            if (!Arrays.equals(sorted, reference.routing().sortedIds(0))) {
                throw new IllegalStateException(
                        "token " + token + " went to other experts than in float64");
            }
            return reference.full();
        }
        double[] sum = oracle.routed(row, new Routing(1, k, chosen, equal(k, k)));
        if (exact.usesSharedExpert()) {
            double[] shared = oracle.shared(row, 1);
            for (int i = 0; i < sum.length; i++) {
                sum[i] += shared[i];
            }
        }
        return sum;
    }

    private static float[] equal(int entries, int k) {
        float[] weights = new float[entries];
        Arrays.fill(weights, 1f / k);
        return weights;
    }
}
