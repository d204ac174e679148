package io.moe4j.model;

import java.util.SplittableRandom;

/**
 * Reproducible random weights for benchmarks, demos and checks without a checkpoint. Every matrix
 * is a pure function of (seed, expert, matrix), values uniform in ±sqrt(3 / inputs) so that outputs
 * keep unit variance, rounded to bfloat16 so that all backends hold the same numbers.
 */
public final class RandomWeights implements LayerWeights {
    private final MoeShape shape;
    private final long seed;
    private final boolean bias;
    private final boolean sharedGate;
    private final boolean correction;

    private RandomWeights(
            MoeShape shape, long seed, boolean bias, boolean sharedGate, boolean correction) {
        this.shape = shape;
        this.seed = seed;
        this.bias = bias;
        this.sharedGate = sharedGate;
        this.correction = correction;
    }

    /**
     * {@return the weights of a layer without biases}
     *
     * @param shape the layer's sizes
     * @param seed equal seeds give equal weights
     */
    public static RandomWeights of(MoeShape shape, long seed) {
        return new RandomWeights(shape, seed, false, false, false);
    }

    /**
     * The same with expert and router biases (gpt-oss).
     *
     * @return new weights; these stay as they are
     */
    public RandomWeights withBias() {
        return new RandomWeights(shape, seed, true, sharedGate, correction);
    }

    /**
     * The same with a sigmoid gate on the shared expert (Qwen2-MoE).
     *
     * @return new weights; these stay as they are
     */
    public RandomWeights withSharedGate() {
        return new RandomWeights(shape, seed, bias, true, correction);
    }

    /**
     * The same with a correction bias for sigmoid routing (DeepSeek-V3).
     *
     * @return new weights; these stay as they are
     */
    public RandomWeights withCorrectionBias() {
        return new RandomWeights(shape, seed, bias, sharedGate, true);
    }

    @Override
    public MoeShape shape() {
        return shape;
    }

    @Override
    public ExpertWeights expert(int expert) {
        int h = shape.hidden();
        int i = shape.intermediate();
        long at = 16L * (expert + 1);
        return new ExpertWeights(
                matrix(at, i, h),
                matrix(at + 1, i, h),
                matrix(at + 2, h, i),
                bias ? vector(at + 3, i, 0.1f) : null,
                bias ? vector(at + 4, i, 0.1f) : null,
                bias ? vector(at + 5, h, 0.1f) : null);
    }

    @Override
    public boolean hasBias() {
        return bias;
    }

    @Override
    public WeightMatrix router() {
        return matrix(1, shape.experts(), shape.hidden());
    }

    @Override
    public float[] routerBias() {
        return bias ? vector(2, shape.experts(), 0.1f) : null;
    }

    @Override
    public float[] correctionBias() {
        return correction ? vector(3, shape.experts(), 0.1f) : null;
    }

    @Override
    public ExpertWeights sharedExpert() {
        int s = shape.sharedIntermediate();
        if (s == 0) {
            return null;
        }
        return ExpertWeights.of(
                matrix(4, s, shape.hidden()),
                matrix(5, s, shape.hidden()),
                matrix(6, shape.hidden(), s));
    }

    @Override
    public float[] sharedExpertGate() {
        return sharedGate && shape.sharedIntermediate() > 0
                ? vector(7, shape.hidden(), (float) Math.sqrt(3.0 / shape.hidden()))
                : null;
    }

    @Override
    public String description() {
        return "random weights, seed " + seed;
    }

    private WeightMatrix matrix(long stream, int rows, int cols) {
        float bound = (float) Math.sqrt(3.0 / cols);
        long matrixSeed = mix(seed * 0x9E3779B97F4A7C15L + stream);
        return new WeightMatrix() {
            @Override
            public int rows() {
                return rows;
            }

            @Override
            public int cols() {
                return cols;
            }

            @Override
            public void read(float[] to) {
                fill(to, Math.multiplyExact(rows, cols), matrixSeed, bound);
            }
        };
    }

    private float[] vector(long stream, int length, float bound) {
        float[] values = new float[length];
        fill(values, length, mix(seed * 0x9E3779B97F4A7C15L + stream), bound);
        return values;
    }

    /** SplittableRandom-quality 64-bit mix per pair of elements: fast and position-independent. */
    private static void fill(float[] to, int count, long seed, float bound) {
        SplittableRandom random = new SplittableRandom(seed);
        float unit = bound * 0x1p-31f;
        for (int i = 0; i < count; i += 2) {
            long bits = random.nextLong();
            to[i] = bf16(((int) bits) * unit);
            if (i + 1 < count) {
                to[i + 1] = bf16(((int) (bits >>> 32)) * unit);
            }
        }
    }

    private static float bf16(float value) {
        int bits = Float.floatToRawIntBits(value);
        return Float.intBitsToFloat((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000);
    }

    private static long mix(long z) {
        z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
        z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
        return z ^ (z >>> 31);
    }
}
