package com.example.hello;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Random;

/** One Mixture-of-Experts layer on the best backend that this machine has, checked by hand. */
public final class HelloMoe {
    private static final long SEED = 1;
    private static final int MAX_TOKENS = 16;
    private static final int TOKENS = 5;

    /** A CPU computes in float32; a GPU multiplies in bfloat16. */
    private static final double CPU_TOLERANCE = 1e-5;

    private static final double GPU_TOLERANCE = 6e-3;

    private HelloMoe() {}

    /**
     * Runs a step and compares it.
     *
     * @param args nothing, or the backend: auto, cpu or cuda
     */
    public static void main(String[] args) {
        if (args.length > 1) {
            System.err.println("usage: hello-moe [auto|cpu|cuda]");
            System.exit(2);
        }
        System.exit(run(args.length == 1 ? args[0] : "auto") ? 0 : 1);
    }

    private static boolean run(String backend) {
        // H=256, I=128, 16 experts, 4 of them for each token; softmax routing as in Mixtral
        MoeShape shape = MoeShape.of(256, 128, 16, 4);
        LayerWeights weights = RandomWeights.of(shape, SEED);
        MoeConfig config =
                MoeConfig.builder()
                        .weights(weights)
                        .rule(RoutingRule.softmaxTopK(true))
                        .routingInput(RoutingInput.HIDDEN) // the layer routes by its own router
                        .hiddenDType(DType.F32)
                        .maxTokensPerRank(MAX_TOKENS)
                        .backend(backend)
                        .build();

        float[] hidden = random(MAX_TOKENS * shape.hidden());
        float[] output;
        String ranOn;
        try (MoeLayer layer = Moe.open(config)) {
            layer.prepare(); // allocates everything, packs the weights
            BackendMemory memory = layer.memory();
            Tensor x = memory.allocate(DType.F32, MAX_TOKENS, shape.hidden());
            Tensor y = memory.allocate(DType.F32, MAX_TOKENS, shape.hidden());
            Tensor count = memory.allocate(DType.I32, 1);
            BoundStep step = layer.bind(List.of(StepTensors.hidden(y, x, count)));

            memory.write(x, Tensor.ofFloats(hidden, MAX_TOKENS, shape.hidden()));
            memory.write(count, Tensor.ofInts(new int[] {TOKENS}, 1)); // any number, each step
            layer.enqueue(0, step); // 0: the default stream; the CPU has no streams
            layer.synchronize(0); // only because this program reads y on the host
            layer.check();

            Tensor host = Tensor.allocateHost(DType.F32, MAX_TOKENS, shape.hidden());
            memory.read(host, y);
            output = host.toFloats();
            ranOn = layer.backend(); // why this one: layer.backendReason(), and one line of the log
        }
        return compare(shape, weights, hidden, output, ranOn);
    }

    private static boolean compare(
            MoeShape shape, LayerWeights weights, float[] hidden, float[] output, String backend) {
        double tolerance = backend.equals("cuda") ? GPU_TOLERANCE : CPU_TOLERANCE;
        int h = shape.hidden();
        boolean agrees = true;
        for (int t = 0; t < TOKENS; t++) {
            double[] expected =
                    reference(shape, weights, Arrays.copyOfRange(hidden, t * h, (t + 1) * h));
            double difference = 0;
            double size = 0;
            for (int i = 0; i < h; i++) {
                difference += square(output[t * h + i] - expected[i]);
                size += square(expected[i]);
            }
            double error = Math.sqrt(difference / size);
            agrees &= error <= tolerance; // false for NaN
            System.out.printf(
                    Locale.ROOT,
                    "token %d  y[0] %+.6f  reference %+.6f  relative error %.2e%n",
                    t,
                    output[t * h],
                    expected[0],
                    error);
        }
        System.out.printf(
                Locale.ROOT,
                "%s: %d tokens on the %s backend, tolerance %.0e%n",
                agrees ? "OK" : "DIFFERENT",
                TOKENS,
                backend,
                tolerance);
        return agrees;
    }

    /** The layer for one token: sum over the chosen experts of p · down(silu(gate x) · up x). */
    private static double[] reference(MoeShape shape, LayerWeights weights, float[] x) {
        double[] token = new double[x.length];
        Arrays.setAll(token, i -> x[i]);
        double[] logits = multiply(weights.router(), token);
        Integer[] byLogit = new Integer[logits.length];
        Arrays.setAll(byLogit, e -> e);
        Arrays.sort(byLogit, (a, b) -> Double.compare(logits[b], logits[a]));
        List<Integer> chosen = Arrays.asList(byLogit).subList(0, shape.topK());
        double best = logits[chosen.get(0)];
        double sum = chosen.stream().mapToDouble(e -> Math.exp(logits[e] - best)).sum();

        double[] y = new double[x.length];
        for (int e : chosen) {
            double p = Math.exp(logits[e] - best) / sum;
            double[] gate = multiply(weights.expert(e).gate(), token);
            double[] up = multiply(weights.expert(e).up(), token);
            double[] activated = new double[gate.length];
            Arrays.setAll(activated, i -> gate[i] / (1 + Math.exp(-gate[i])) * up[i]);
            double[] down = multiply(weights.expert(e).down(), activated);
            for (int i = 0; i < y.length; i++) {
                y[i] += p * down[i];
            }
        }
        return y;
    }

    private static double[] multiply(WeightMatrix matrix, double[] x) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values); // row-major [outputs, inputs]
        double[] y = new double[matrix.rows()];
        for (int row = 0; row < y.length; row++) {
            for (int col = 0; col < x.length; col++) {
                y[row] += (double) values[row * x.length + col] * x[col];
            }
        }
        return y;
    }

    private static float[] random(int length) {
        Random random = new Random(SEED);
        float[] values = new float[length];
        for (int i = 0; i < length; i++) {
            values[i] = (float) random.nextGaussian();
        }
        return values;
    }

    private static double square(double x) {
        return x * x;
    }
}
