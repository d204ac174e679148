package io.moe4j;

import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.List;
import java.util.SplittableRandom;

/** Runs a layer on host arrays through the public API, on any backend. */
public final class Harness implements AutoCloseable {
    /** The tokens of one rank. */
    public record Batch(float[][] hidden, int[][] ids, float[][] weights) {
        public int tokens() {
            return hidden.length;
        }

        public Batch token(int t) {
            return new Batch(
                    new float[][] {hidden[t]}, new int[][] {ids[t]}, new float[][] {weights[t]});
        }

        public static Batch empty() {
            return new Batch(new float[0][], new int[0][], new float[0][]);
        }

        public Batch plus(Batch more) {
            return new Batch(
                    concat(hidden, more.hidden),
                    concat(ids, more.ids),
                    concat(weights, more.weights));
        }

        public Batch permuted(int[] order) {
            Batch result = empty();
            for (int t : order) {
                result = result.plus(token(t));
            }
            return result;
        }

        private static <T> T[] concat(T[] a, T[] b) {
            T[] both = java.util.Arrays.copyOf(a, a.length + b.length);
            System.arraycopy(b, 0, both, a.length, b.length);
            return both;
        }
    }

    public final MoeLayer layer;
    private final MoeConfig config;
    private final List<StepTensors> tensors = new ArrayList<>();
    private final BoundStep step;

    private final long stream;

    public Harness(MoeConfig config) {
        this(config, false, 0L);
    }

    public Harness(MoeConfig config, boolean accumulate, long stream) {
        this(Moe.open(config), accumulate, stream);
    }

    /** Takes over a layer that is not prepared yet. */
    public Harness(MoeLayer layer, boolean accumulate, long stream) {
        this.config = layer.config();
        this.stream = stream;
        this.layer = layer;
        layer.prepare();
        tensors.addAll(allocate(accumulate));
        step = layer.bind(tensors);
    }

    private List<StepTensors> allocate(boolean accumulate) {
        List<StepTensors> tensors = new ArrayList<>();
        BackendMemory memory = layer.memory();
        long m = config.maxTokensPerRank();
        long k = config.shape().topK();
        for (int r = 0; r < config.localRanks(); r++) {
            Tensor hidden = memory.allocate(config.hiddenDType(), m, config.shape().hidden());
            Tensor out = memory.allocate(config.outDType(), m, config.shape().hidden());
            Tensor count = memory.allocate(DType.I32, 1);
            StepTensors t =
                    switch (config.routingInput()) {
                        case TOPK ->
                                StepTensors.topk(
                                        out,
                                        hidden,
                                        memory.allocate(DType.I32, m, k),
                                        memory.allocate(DType.F32, m, k),
                                        count);
                        case LOGITS ->
                                StepTensors.logits(
                                        out,
                                        hidden,
                                        memory.allocate(DType.F32, m, config.shape().experts()),
                                        count);
                        case HIDDEN -> StepTensors.hidden(out, hidden, count);
                    };
            tensors.add(accumulate ? t.accumulating() : t);
        }
        return tensors;
    }

    /** A second step of the same layer on another handle, with tensors of its own; one rank. */
    public Second second(int handle) {
        List<StepTensors> own = allocate(false);
        return new Second(own, layer.bind(own, handle));
    }

    /** See {@link #second}. */
    public final class Second {
        private final List<StepTensors> own;
        private final BoundStep bound;

        private Second(List<StepTensors> own, BoundStep bound) {
            this.own = own;
            this.bound = bound;
        }

        public BoundStep step() {
            return bound;
        }

        public void write(Batch batch) {
            Harness.this.write(own, List.of(batch));
        }

        public float[][] outputs() {
            return Harness.this.outputs(own)[0];
        }
    }

    public List<StepTensors> tensors() {
        return tensors;
    }

    public BoundStep step() {
        return step;
    }

    /** Writes the batches, one per rank; everything past a batch's tokens becomes poison. */
    public void write(List<Batch> batches) {
        write(tensors, batches);
    }

    private void write(List<StepTensors> tensors, List<Batch> batches) {
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        for (int r = 0; r < config.localRanks(); r++) {
            Batch batch = batches.get(r);
            float[] hidden = new float[m * h];
            int[] ids = new int[m * k];
            float[] weights = new float[m * k];
            java.util.Arrays.fill(hidden, Float.NaN);
            java.util.Arrays.fill(ids, 0x7fffffff);
            java.util.Arrays.fill(weights, Float.NaN);
            for (int t = 0; t < Math.min(m, batch.tokens()); t++) {
                System.arraycopy(batch.hidden[t], 0, hidden, t * h, h);
                if (batch.ids.length > 0) {
                    System.arraycopy(batch.ids[t], 0, ids, t * k, k);
                    System.arraycopy(batch.weights[t], 0, weights, t * k, k);
                }
            }
            StepTensors t = tensors.get(r);
            put(t.hidden(), hidden);
            if (config.routingInput() == RoutingInput.TOPK) {
                layer.memory().write(t.topkIds(), Tensor.ofInts(ids, m, k));
                put(t.topkWeights(), weights);
            }
            layer.memory().write(t.tokenCount(), Tensor.ofInts(new int[] {batch.tokens()}, 1));
        }
    }

    public void tokenCount(int rank, int tokens) {
        layer.memory().write(tensors.get(rank).tokenCount(), Tensor.ofInts(new int[] {tokens}, 1));
    }

    public void put(Tensor to, float[] values) {
        Tensor host = Tensor.allocateHost(to.dtype(), to.shape());
        host.setFloats(values);
        layer.memory().write(to, host);
    }

    /** One step over the batches; returns [rank][M][H]. The output starts as {@code initial}. */
    public float[][][] run(List<Batch> batches, float initial) {
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        write(batches);
        for (StepTensors t : tensors) {
            float[] fill = new float[m * h];
            java.util.Arrays.fill(fill, initial);
            put(t.out(), fill);
        }
        layer.enqueue(stream, step);
        layer.synchronize(stream);
        layer.check();
        return outputs();
    }

    public float[][][] run(List<Batch> batches) {
        return run(batches, -12345f);
    }

    public float[][] run(Batch batch) {
        return run(List.of(batch))[0];
    }

    public float[][][] outputs() {
        return outputs(tensors);
    }

    private float[][][] outputs(List<StepTensors> tensors) {
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        float[][][] out = new float[config.localRanks()][m][h];
        for (int r = 0; r < config.localRanks(); r++) {
            Tensor host = Tensor.allocateHost(config.outDType(), m, h);
            layer.memory().read(host, tensors.get(r).out());
            for (int t = 0; t < m; t++) {
                host.readFloats((long) t * h, out[r][t], 0, h);
            }
        }
        return out;
    }

    @Override
    public void close() {
        layer.close();
    }

    /** Random tokens with distinct experts; hidden values exact in bfloat16. */
    public static Batch random(MoeShape shape, int tokens, long seed) {
        SplittableRandom random = new SplittableRandom(seed);
        float[][] hidden = new float[tokens][shape.hidden()];
        int[][] ids = new int[tokens][shape.topK()];
        float[][] weights = new float[tokens][shape.topK()];
        for (int t = 0; t < tokens; t++) {
            for (int j = 0; j < shape.hidden(); j++) {
                hidden[t][j] = (random.nextInt(511) - 255) / 128f;
            }
            int[] all = new int[shape.experts()];
            for (int e = 0; e < all.length; e++) {
                int at = random.nextInt(e + 1);
                all[e] = all[at];
                all[at] = e;
            }
            System.arraycopy(all, 0, ids[t], 0, shape.topK());
            for (int k = 0; k < shape.topK(); k++) {
                weights[t][k] = (float) random.nextDouble(0.05, 1.0);
            }
        }
        return new Batch(hidden, ids, weights);
    }

    /** As {@link #random}, hidden values in {−2, −1, 0, 1, 2}: products stay exact in bfloat16. */
    public static Batch small(MoeShape shape, int tokens, long seed) {
        Batch batch = random(shape, tokens, seed);
        SplittableRandom random = new SplittableRandom(~seed);
        for (float[] row : batch.hidden()) {
            for (int j = 0; j < row.length; j++) {
                row[j] = random.nextInt(-2, 3);
            }
        }
        return batch;
    }

    /** Splits tokens over ranks round-robin by a seed; returns [rank] → token indices. */
    public static int[][] spread(int tokens, int ranks, long seed) {
        SplittableRandom random = new SplittableRandom(seed);
        List<List<Integer>> lists = new ArrayList<>();
        for (int r = 0; r < ranks; r++) {
            lists.add(new ArrayList<>());
        }
        for (int t = 0; t < tokens; t++) {
            lists.get(random.nextInt(ranks)).add(t);
        }
        return lists.stream()
                .map(l -> l.stream().mapToInt(Integer::intValue).toArray())
                .toArray(int[][]::new);
    }

    /**
     * Experts whose output is exactly {@code factor(e) · x}: gate = 0 with bias 32 (silu(32) is 32
     * in float32), up = identity / 32, down = factor · identity. Needs I = H.
     */
    public static LayerWeights scalingExperts(MoeShape shape, float[] factors) {
        int h = shape.hidden();
        float[] zero = new float[h * h];
        float[] bias = new float[h];
        java.util.Arrays.fill(bias, 32f);
        WeightMatrix gate = WeightMatrix.of(zero, h, h);
        WeightMatrix up = WeightMatrix.of(diagonal(h, 1f / 32), h, h);
        return new LayerWeights() {
            @Override
            public MoeShape shape() {
                return shape;
            }

            @Override
            public ExpertWeights expert(int e) {
                WeightMatrix down = WeightMatrix.of(diagonal(h, factors[e]), h, h);
                return new ExpertWeights(gate, up, down, bias, new float[h], new float[h]);
            }

            @Override
            public boolean hasBias() {
                return true;
            }

            @Override
            public WeightMatrix router() {
                return null;
            }

            @Override
            public float[] routerBias() {
                return null;
            }

            @Override
            public float[] correctionBias() {
                return null;
            }

            @Override
            public ExpertWeights sharedExpert() {
                return null;
            }

            @Override
            public float[] sharedExpertGate() {
                return null;
            }

            @Override
            public String description() {
                return "scaling experts";
            }
        };
    }

    private static float[] diagonal(int n, float value) {
        float[] matrix = new float[n * n];
        for (int i = 0; i < n; i++) {
            matrix[i * n + i] = value;
        }
        return matrix;
    }
}
