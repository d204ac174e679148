package io.moe4j.oracle;

import static org.assertj.core.api.Assertions.assertThat;

import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtSession;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.examples.EngineWeightsExample;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** ONNX Runtime's MoE operator, written by other people, agrees with the CPU backend. */
class OnnxRuntimeOracleTest {
    @ParameterizedTest
    @CsvSource({
        "1, 8, 2, true, false, 1",
        "2, 8, 2, true, false, 4",
        "3, 16, 4, false, false, 2",
        "4, 16, 8, true, false, 8",
        "5, 8, 4, true, true, 2",
        "6, 32, 1, false, false, 4",
    })
    void shouldAgreeWithOnnxRuntimePerToken(
            long seed, int experts, int topK, boolean renormalise, boolean gptOss, int ranks)
            throws Exception {
        int tokens = 13;
        MoeShape shape = MoeShape.of(128, 96, experts, topK);
        RandomWeights weights = RandomWeights.of(shape, seed);
        if (gptOss) {
            weights = weights.withBias();
        }
        Activation activation = gptOss ? Activation.clampedSwiGlu(1.702f, 7f) : Activation.swiGlu();
        Batch batch = Harness.random(shape, tokens, seed);
        float[][] logits = logits(weights, batch.hidden());

        float[][] want = onnx(weights, batch.hidden(), logits, renormalise, activation);
        RoutingRule rule = RoutingRule.softmaxTopK(renormalise);
        float[][] got = moe4j(weights, batch, logits, rule, activation, ranks);
        for (int t = 0; t < tokens; t++) {
            assertThat(relativeL2(got[t], want[t]))
                    .as("seed %d token %d", seed, t)
                    .isLessThan(1e-5);
        }
    }

    /** The node's own tensors, given to a layer as docs/engines.md shows it. */
    @Test
    void shouldTakeTheTensorsOfAnOnnxNode() throws Exception {
        MoeShape shape = MoeShape.of(128, 96, 8, 2);
        RandomWeights weights = RandomWeights.of(shape, 7);
        Batch batch = Harness.random(shape, 13, 7);
        float[][] logits = logits(weights, batch.hidden());
        float[][] want = onnx(weights, batch.hidden(), logits, true, Activation.swiGlu());
        ByteBuffer fc1 = little(8 * 2 * 96 * 128);
        ByteBuffer fc2 = little(8 * 128 * 96);
        for (int e = 0; e < 8; e++) {
            float[] gateUp = new float[2 * 96 * 128];
            interleave(gateUp, 0, weights.expert(e).gate(), weights.expert(e).up());
            float[] down = new float[128 * 96];
            weights.expert(e).down().read(down);
            fc1.asFloatBuffer().put(e * gateUp.length, gateUp);
            fc2.asFloatBuffer().put(e * down.length, down);
        }
        MoeConfig config = EngineWeightsExample.onnx(shape, true, fc1, fc2);
        try (Harness layer =
                new Harness(config.toBuilder().threads(2).maxTokensPerRank(13).build())) {
            float[] flat = new float[13 * 8];
            for (int t = 0; t < 13; t++) {
                System.arraycopy(logits[t], 0, flat, t * 8, 8);
            }
            layer.put(layer.tensors().get(0).routerLogits(), flat);
            float[][] got = layer.run(batch);
            for (int t = 0; t < 13; t++) {
                assertThat(relativeL2(got[t], want[t])).isLessThan(1e-5);
            }
        }
    }

    private static ByteBuffer little(int floats) {
        return ByteBuffer.allocateDirect(4 * floats).order(ByteOrder.LITTLE_ENDIAN);
    }

    private static float[][] logits(RandomWeights weights, float[][] hidden) {
        int experts = weights.shape().experts();
        int h = weights.shape().hidden();
        float[] router = new float[experts * h];
        weights.router().read(router);
        float[][] logits = new float[hidden.length][experts];
        for (int t = 0; t < hidden.length; t++) {
            for (int e = 0; e < experts; e++) {
                double sum = 0;
                for (int j = 0; j < h; j++) {
                    sum += (double) router[e * h + j] * hidden[t][j];
                }
                logits[t][e] = (float) sum;
            }
        }
        return logits;
    }

    private static float[][] moe4j(
            RandomWeights weights,
            Batch batch,
            float[][] logits,
            RoutingRule rule,
            Activation activation,
            int ranks) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(weights)
                        .backend("cpu")
                        .rule(rule)
                        .activation(activation)
                        .hiddenDType(DType.F32)
                        .routingInput(RoutingInput.LOGITS)
                        .maxTokensPerRank(batch.tokens())
                        .ranks(ranks)
                        .build();
        int tokens = batch.tokens();
        int experts = weights.shape().experts();
        try (Harness layer = new Harness(config)) {
            List<Batch> batches = new ArrayList<>();
            for (int r = 0; r < ranks; r++) {
                batches.add(r == ranks - 1 ? batch : Batch.empty());
            }
            float[] flat = new float[tokens * experts];
            for (int t = 0; t < tokens; t++) {
                System.arraycopy(logits[t], 0, flat, t * experts, experts);
            }
            layer.put(layer.tensors().get(ranks - 1).routerLogits(), flat);
            return layer.run(batches)[ranks - 1];
        }
    }

    private static float[][] onnx(
            RandomWeights weights,
            float[][] hidden,
            float[][] logits,
            boolean renormalise,
            Activation activation)
            throws Exception {
        MoeShape shape = weights.shape();
        int e = shape.experts();
        int h = shape.hidden();
        int i = shape.intermediate();
        float[] fc1 = new float[e * 2 * i * h];
        float[] fc1Bias = weights.hasBias() ? new float[e * 2 * i] : null;
        float[] fc2 = new float[e * h * i];
        float[] fc2Bias = weights.hasBias() ? new float[e * h] : null;
        for (int expert = 0; expert < e; expert++) {
            ExpertWeights x = weights.expert(expert);
            interleave(fc1, expert * 2 * i * h, x.gate(), x.up());
            float[] down = new float[h * i];
            x.down().read(down);
            System.arraycopy(down, 0, fc2, expert * h * i, h * i);
            if (fc1Bias != null) {
                for (int row = 0; row < i; row++) {
                    fc1Bias[(expert * i + row) * 2] = x.gateBias()[row];
                    fc1Bias[(expert * i + row) * 2 + 1] = x.upBias()[row];
                }
                System.arraycopy(x.downBias(), 0, fc2Bias, expert * h, h);
            }
        }
        boolean clamped = activation.kind() == Activation.Kind.CLAMPED_SWIGLU;
        byte[] model =
                new OnnxMoeModel(
                                shape.topK(),
                                renormalise,
                                clamped ? activation.alpha() : 1f,
                                clamped ? 1f : 0f,
                                activation.limit())
                        .input("hidden", hidden.length, h)
                        .input("logits", hidden.length, e)
                        .constant("fc1", fc1, e, 2L * i, h)
                        .constant("fc1_bias", fc1Bias, e, 2L * i)
                        .constant("fc2", fc2, e, h, i)
                        .constant("fc2_bias", fc2Bias, e, h)
                        .build("out", hidden.length, h);
        OrtEnvironment environment = OrtEnvironment.getEnvironment();
        try (OrtSession session = environment.createSession(model);
                OnnxTensor x = OnnxTensor.createTensor(environment, hidden);
                OnnxTensor l = OnnxTensor.createTensor(environment, logits);
                OrtSession.Result result = session.run(Map.of("hidden", x, "logits", l))) {
            return (float[][]) result.get(0).getValue();
        }
    }

    private static void interleave(float[] to, int at, WeightMatrix gate, WeightMatrix up) {
        float[] g = new float[gate.rows() * gate.cols()];
        float[] u = new float[g.length];
        gate.read(g);
        up.read(u);
        for (int row = 0; row < gate.rows(); row++) {
            System.arraycopy(g, row * gate.cols(), to, at + 2 * row * gate.cols(), gate.cols());
            System.arraycopy(
                    u, row * gate.cols(), to, at + (2 * row + 1) * gate.cols(), gate.cols());
        }
    }

    private static double relativeL2(float[] got, float[] want) {
        double error = 0;
        double norm = 0;
        for (int j = 0; j < want.length; j++) {
            error += Math.pow((double) got[j] - want[j], 2);
            norm += Math.pow(want[j], 2);
        }
        return Math.sqrt(error / norm);
    }
}
