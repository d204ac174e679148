package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.WeightMatrix;
import java.nio.file.Path;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/**
 * The weights as read, put through the layer's formula in float64 with the published expert choice,
 * give the published outputs: no matrix is swapped, transposed or scaled wrongly.
 */
class CheckpointGoldenOutputTest {
    private static final Path GOLDEN = Path.of("src", "test", "resources", "golden");
    private static final double TOLERANCE = 1e-5;

    @ParameterizedTest
    @CsvSource({
        "mixtral, 0",
        "mixtral, 1",
        "qwen2_moe, 0",
        "qwen3_moe, 1",
        "qwen3_moe_fp8, 1",
        "deepseek_v3, 1",
        "deepseek_v3_fp8, 1",
        "gpt_oss, 0"
    })
    void shouldReproduceThePublishedLogitsAndOutputs(String folder, int layer) {
        Path path = GOLDEN.resolve(folder);
        try (Checkpoint checkpoint = Checkpoint.open(path);
                SafetensorsFile golden = SafetensorsFile.open(path.resolve("golden.safetensors"))) {
            CheckpointLayer weights = checkpoint.layer(layer);
            String step = "layer" + layer + ".t8.";
            int h = weights.shape().hidden();
            int k = weights.shape().topK();
            int experts = weights.shape().experts();
            float[] hidden = floats(golden, step + "hidden");
            float[] logits = floats(golden, step + "router_logits");
            float[] routed = floats(golden, step + "routed_out");
            float[] out = floats(golden, step + "out");
            float[] weight = floats(golden, step + "topk_weights");
            int[] ids = new int[8 * k];
            golden.readInts(step + "topk_ids", 0, ids, 0, ids.length);
            for (int t = 0; t < 8; t++) {
                double[] x = row(hidden, t, h);
                requireClose(
                        multiply(weights.router(), x, weights.routerBias()),
                        row(logits, t, experts));
                double[] y = new double[h];
                for (int slot = 0; slot < k; slot++) {
                    double[] one = run(weights.expert(ids[t * k + slot]), weights.activation(), x);
                    addScaled(y, one, weight[t * k + slot]);
                }
                requireClose(y, row(routed, t, h));
                addShared(y, weights, x);
                requireClose(y, row(out, t, h));
            }
        }
    }

    private static void addShared(double[] y, CheckpointLayer weights, double[] x) {
        if (weights.sharedExpert() != null) {
            double factor = 1;
            float[] gate = weights.sharedExpertGate();
            if (gate != null) {
                double dot = 0;
                for (int i = 0; i < gate.length; i++) {
                    dot += gate[i] * x[i];
                }
                factor = sigmoid(dot);
            }
            addScaled(y, run(weights.sharedExpert(), weights.activation(), x), factor);
        }
    }

    private static double[] run(ExpertWeights expert, Activation activation, double[] x) {
        double[] gate = multiply(expert.gate(), x, expert.gateBias());
        double[] up = multiply(expert.up(), x, expert.upBias());
        double[] activated = new double[gate.length];
        for (int i = 0; i < gate.length; i++) {
            if (activation.kind() == Activation.Kind.SWIGLU) {
                activated[i] = gate[i] * sigmoid(gate[i]) * up[i];
            } else {
                double g = Math.min(gate[i], activation.limit());
                double u = Math.max(-activation.limit(), Math.min(activation.limit(), up[i]));
                activated[i] = (u + 1) * g * sigmoid(activation.alpha() * g);
            }
        }
        return multiply(expert.down(), activated, expert.downBias());
    }

    private static double[] multiply(WeightMatrix matrix, double[] x, float[] bias) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values);
        double[] y = new double[matrix.rows()];
        for (int i = 0; i < y.length; i++) {
            double sum = bias == null ? 0 : bias[i];
            for (int j = 0; j < x.length; j++) {
                sum += (double) values[i * x.length + j] * x[j];
            }
            y[i] = sum;
        }
        return y;
    }

    private static double sigmoid(double x) {
        return 1 / (1 + Math.exp(-x));
    }

    private static void addScaled(double[] to, double[] from, double factor) {
        for (int i = 0; i < to.length; i++) {
            to[i] += factor * from[i];
        }
    }

    private static double[] row(float[] values, int row, int width) {
        double[] result = new double[width];
        for (int i = 0; i < width; i++) {
            result[i] = values[row * width + i];
        }
        return result;
    }

    private static float[] floats(SafetensorsFile file, String name) {
        float[] values = new float[(int) file.info(name).elements()];
        file.readFloats(name, 0, values, 0, values.length);
        return values;
    }

    private static void requireClose(double[] seen, double[] expected) {
        double difference = 0;
        double norm = 0;
        for (int i = 0; i < seen.length; i++) {
            difference += (seen[i] - expected[i]) * (seen[i] - expected[i]);
            norm += expected[i] * expected[i];
        }
        assertThat(Math.sqrt(difference / norm)).isLessThan(TOLERANCE);
    }
}
