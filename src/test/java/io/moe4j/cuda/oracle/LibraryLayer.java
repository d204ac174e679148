package io.moe4j.cuda.oracle;

import io.moe4j.checker.Routing;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.oracle.LibraryBridge.Library;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.Bf16;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.ShortBuffer;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.IntStream;
import jcuda.Pointer;
import jcuda.jcudnn.JCudnn;
import jcuda.jcudnn.cudnnActivationDescriptor;
import jcuda.jcudnn.cudnnActivationMode;
import jcuda.jcudnn.cudnnDataType;
import jcuda.jcudnn.cudnnHandle;
import jcuda.jcudnn.cudnnNanPropagation;
import jcuda.jcudnn.cudnnSoftmaxAlgorithm;
import jcuda.jcudnn.cudnnSoftmaxMode;
import jcuda.jcudnn.cudnnStatus;
import jcuda.jcudnn.cudnnTensorDescriptor;
import jcuda.jcudnn.cudnnTensorFormat;

/**
 * One layer by NVIDIA's libraries: cuBLAS multiplies each expert's rows with row-major bfloat16
 * weights on the device, cuDNN computes the router's softmax or sigmoid and the sigmoid of the
 * activation. Shares no kernel with moe4j. Bias, product, top-k and the weighted sum are plain
 * Java.
 */
final class LibraryLayer implements AutoCloseable {
    private static final int THREADS = Runtime.getRuntime().availableProcessors();

    private final Context context;
    private final Deque<AutoCloseable> owned = new ArrayDeque<>();
    private final RandomWeights weights;
    private final RoutingRule rule;
    private final Activation activation;
    private final MoeShape shape;
    private final CublasGemm cublas;
    private final cudnnHandle cudnn = new cudnnHandle();
    private final long gateBase;
    private final long upBase;
    private final long downBase;
    private final long routerBase;
    private final long[] shared = new long[3];
    private final float[][] gateBias;
    private final float[][] upBias;
    private final float[][] downBias;
    private final DeviceBuffer in;
    private final DeviceBuffer middle;
    private final DeviceBuffer out;

    /** What the libraries computed. */
    record Result(Routing routing, double[] out) {}

    /** Bytes of device memory a preset needs here. */
    static long bytes(ModelPreset preset) {
        MoeShape s = preset.shape();
        return 2 * s.experts() * s.expertElements() + (1L << 30);
    }

    LibraryLayer(Context context, ModelPreset preset, RandomWeights weights, int maxTokens) {
        this.context = context;
        this.weights = weights;
        this.shape = preset.shape();
        this.rule = preset.rule();
        this.activation = preset.activation();
        try {
            cublas = own(new CublasGemm(context, 0));
            LibraryBridge.load(Library.CUDNN);
            try (Scope scope = context.enter()) {
                check("cudnnCreate", JCudnn.cudnnCreate(cudnn));
            }
            own(() -> JCudnn.cudnnDestroy(cudnn));
            long matrix = 2L * shape.intermediate() * shape.hidden();
            gateBase = allocate(matrix * shape.experts());
            upBase = allocate(matrix * shape.experts());
            downBase = allocate(matrix * shape.experts());
            gateBias = new float[shape.experts()][];
            upBias = new float[shape.experts()][];
            downBias = new float[shape.experts()][];
            upload();
            routerBase = uploadRouter();
            uploadShared();
            long rows = (long) maxTokens * shape.topK();
            int inner = Math.max(shape.intermediate(), shape.sharedIntermediate());
            int widest = Math.max(shape.hidden(), inner);
            in = buffer(8L * Math.max(rows * widest, (long) maxTokens * shape.experts()));
            middle = buffer(8L * Math.max(rows * widest, (long) maxTokens * shape.experts()));
            out = buffer(8L * Math.max(rows * widest, (long) maxTokens * shape.experts()));
        } catch (RuntimeException | Error e) {
            close();
            throw e;
        }
    }

    private <T extends AutoCloseable> T own(T resource) {
        owned.push(resource);
        return resource;
    }

    private DeviceBuffer buffer(long bytes) {
        return own(new DeviceBuffer(context, bytes));
    }

    private long allocate(long bytes) {
        return buffer(bytes).address();
    }

    // ------------------------------------------------------------------ weights

    /** All experts by all processors: decode, round, copy. */
    private void upload() {
        AtomicInteger next = new AtomicInteger();
        long elements = (long) shape.intermediate() * shape.hidden();
        ExecutorService pool = Executors.newFixedThreadPool(THREADS);
        try {
            List<Future<?>> running = new ArrayList<>();
            for (int thread = 0; thread < THREADS; thread++) {
                running.add(
                        pool.submit(
                                () -> {
                                    try (Uploader to = new Uploader(elements)) {
                                        for (int e = next.getAndIncrement();
                                                e < shape.experts();
                                                e = next.getAndIncrement()) {
                                            expert(to, e, 2 * elements * e);
                                        }
                                    }
                                }));
            }
            for (Future<?> future : running) {
                try {
                    future.get();
                } catch (Exception e) {
                    throw new IllegalStateException("uploading weights", e);
                }
            }
        } finally {
            pool.shutdownNow();
        }
    }

    private void expert(Uploader to, int expert, long offset) {
        ExpertWeights source = weights.expert(expert);
        to.copy(gateBase + offset, source.gate());
        to.copy(upBase + offset, source.up());
        to.copy(downBase + offset, source.down());
        gateBias[expert] = source.gateBias();
        upBias[expert] = source.upBias();
        downBias[expert] = source.downBias();
    }

    /** One thread's staging memory. */
    private final class Uploader implements AutoCloseable {
        private final float[] decoded;
        private final short[] rounded = new short[8192];
        private final PinnedBuffer host;
        private final Stream stream = new Stream(context);

        Uploader(long elements) {
            decoded = new float[Math.toIntExact(elements)];
            host = new PinnedBuffer(context, 2 * elements);
        }

        void copy(long to, WeightMatrix matrix) {
            int count = matrix.rows() * matrix.cols();
            matrix.read(decoded);
            ShortBuffer bits = host.bytes().order(ByteOrder.LITTLE_ENDIAN).asShortBuffer();
            for (int from = 0; from < count; from += rounded.length) {
                int n = Math.min(rounded.length, count - from);
                for (int i = 0; i < n; i++) {
                    rounded[i] = Bf16.fromFloat(decoded[from + i]);
                }
                bits.put(rounded, 0, n);
            }
            try (Scope scope = context.enter()) {
                context.driver().memcpyHtoDAsync(to, host.memory(), 0, 2L * count, stream.handle());
                context.driver().streamSynchronize(stream.handle());
            }
        }

        @Override
        public void close() {
            stream.close();
            host.close();
        }
    }

    private long uploadRouter() {
        float[] router = new float[shape.experts() * shape.hidden()];
        weights.router().read(router);
        long address = allocate(8L * router.length);
        writeF64(address, router);
        return address;
    }

    private void uploadShared() {
        ExpertWeights expert = weights.sharedExpert();
        if (expert != null) {
            long elements = (long) shape.sharedIntermediate() * shape.hidden();
            try (Uploader to = new Uploader(elements)) {
                List<WeightMatrix> all = List.of(expert.gate(), expert.up(), expert.down());
                for (int i = 0; i < 3; i++) {
                    shared[i] = allocate(2 * elements);
                    to.copy(shared[i], all.get(i));
                }
            }
        }
    }

    // ------------------------------------------------------------------ one step

    /** The layer's output for [T, H] hidden states that are bfloat16 values. */
    Result run(float[] hidden, int tokens) {
        float[] logits = logits(hidden, tokens);
        Routing routing = route(logits, tokens);
        double[] sum = new double[tokens * shape.hidden()];
        addRouted(sum, hidden, routing);
        if (shape.sharedIntermediate() > 0) {
            addShared(sum, hidden, tokens);
        }
        return new Result(routing, sum);
    }

    private float[] logits(float[] hidden, int tokens) {
        int e = shape.experts();
        writeF64(in.address(), hidden);
        cublas.multiplyF64(out.address(), in.address(), routerBase, tokens, e, shape.hidden());
        double[] exact = readF64(out.address(), tokens * e);
        float[] bias = weights.routerBias();
        float[] logits = new float[exact.length];
        for (int i = 0; i < logits.length; i++) {
            logits[i] = (float) (bias == null ? exact[i] : exact[i] + bias[i % e]);
        }
        return logits;
    }

    private Routing route(float[] logits, int tokens) {
        int k = shape.topK();
        int e = shape.experts();
        double[] scores =
                switch (rule.scoring()) {
                    case SOFTMAX -> softmax(widen(logits), tokens, e);
                    case SIGMOID -> sigmoidF64(widen(logits));
                    case TOPK_SOFTMAX -> widen(logits);
                };
        int[] ids = new int[tokens * k];
        double[] picked = new double[tokens * k];
        for (int token = 0; token < tokens; token++) {
            int[] chosen = choose(Arrays.copyOfRange(scores, token * e, (token + 1) * e));
            for (int i = 0; i < k; i++) {
                ids[token * k + i] = chosen[i];
                picked[token * k + i] = scores[token * e + chosen[i]];
            }
        }
        if (rule.scoring() == RoutingRule.Scoring.TOPK_SOFTMAX) {
            picked = softmax(picked, tokens, k);
        } else if (rule.renormalise()) {
            for (int token = 0; token < tokens; token++) {
                double sum = 0;
                for (int i = 0; i < k; i++) {
                    sum += picked[token * k + i];
                }
                for (int i = 0; i < k; i++) {
                    picked[token * k + i] /= sum;
                }
            }
        }
        float[] final32 = new float[picked.length];
        for (int i = 0; i < final32.length; i++) {
            final32[i] = (float) (picked[i] * rule.scale());
        }
        return new Routing(tokens, k, ids, final32);
    }

    /** The K best experts of the best groups by (corrected) score; ties: lowest index. */
    private int[] choose(double[] scores) {
        float[] correction = weights.correctionBias();
        double[] ranked = scores.clone();
        for (int i = 0; correction != null && i < ranked.length; i++) {
            ranked[i] += correction[i];
        }
        if (rule.groups() > 1) {
            int size = ranked.length / rule.groups();
            double[] groups = new double[rule.groups()];
            for (int g = 0; g < groups.length; g++) {
                double[] members = Arrays.copyOfRange(ranked, g * size, (g + 1) * size);
                Arrays.sort(members);
                groups[g] = members[size - 1] + members[size - 2];
            }
            List<Integer> kept = IntStream.of(best(groups, rule.topkGroups())).boxed().toList();
            for (int i = 0; i < ranked.length; i++) {
                if (!kept.contains(i / size)) {
                    ranked[i] = Double.NEGATIVE_INFINITY;
                }
            }
        }
        return best(ranked, shape.topK());
    }

    private static int[] best(double[] values, int count) {
        return IntStream.range(0, values.length)
                .boxed()
                .sorted((a, b) -> Double.compare(values[b], values[a])) // stable
                .limit(count)
                .mapToInt(i -> i)
                .toArray();
    }

    private void addRouted(double[] sum, float[] hidden, Routing routing) {
        int h = shape.hidden();
        long matrix = 2L * shape.intermediate() * h;
        List<List<int[]>> visits = new ArrayList<>();
        for (int e = 0; e < shape.experts(); e++) {
            visits.add(new ArrayList<>());
        }
        for (int i = 0; i < routing.ids().length; i++) {
            visits.get(routing.ids()[i]).add(new int[] {i / routing.topK(), i});
        }
        for (int e = 0; e < shape.experts(); e++) {
            List<int[]> mine = visits.get(e);
            if (mine.isEmpty()) {
                continue;
            }
            float[] rows = new float[mine.size() * h];
            for (int r = 0; r < mine.size(); r++) {
                System.arraycopy(hidden, mine.get(r)[0] * h, rows, r * h, h);
            }
            float[] result =
                    feedForward(
                            rows,
                            mine.size(),
                            shape.intermediate(),
                            gateBase + matrix * e,
                            upBase + matrix * e,
                            downBase + matrix * e,
                            gateBias[e],
                            upBias[e],
                            downBias[e]);
            for (int r = 0; r < mine.size(); r++) {
                double weight = routing.weights()[mine.get(r)[1]];
                for (int c = 0; c < h; c++) {
                    sum[mine.get(r)[0] * h + c] += weight * result[r * h + c];
                }
            }
        }
    }

    private void addShared(double[] sum, float[] hidden, int tokens) {
        float[] result =
                feedForward(
                        hidden,
                        tokens,
                        shape.sharedIntermediate(),
                        shared[0],
                        shared[1],
                        shared[2],
                        null,
                        null,
                        null);
        for (int i = 0; i < sum.length; i++) {
            sum[i] += result[i];
        }
    }

    private float[] feedForward(
            float[] x,
            int rows,
            int inner,
            long gate,
            long up,
            long down,
            float[] gateBias,
            float[] upBias,
            float[] downBias) {
        int h = shape.hidden();
        writeBf16(in.address(), x);
        cublas.multiplyToF32(middle.address(), in.address(), gate, rows, inner, h);
        float[] g = readF32(middle.address(), rows * inner);
        cublas.multiplyToF32(middle.address(), in.address(), up, rows, inner, h);
        float[] u = readF32(middle.address(), rows * inner);
        addBias(g, gateBias);
        addBias(u, upBias);
        writeBf16(in.address(), activate(g, u));
        cublas.multiplyToF32(out.address(), in.address(), down, rows, h, inner);
        float[] result = readF32(out.address(), rows * h);
        addBias(result, downBias);
        return result;
    }

    /** cuDNN has no clamped SwiGLU: the clamps are ours, the sigmoid is cuDNN's. */
    private float[] activate(float[] g, float[] u) {
        boolean clamped = activation.kind() == Activation.Kind.CLAMPED_SWIGLU;
        float limit = activation.limit();
        float[] argument = g.clone();
        for (int i = 0; clamped && i < g.length; i++) {
            g[i] = Math.min(g[i], limit);
            u[i] = Math.max(-limit, Math.min(u[i], limit)) + 1;
            argument[i] = activation.alpha() * g[i];
        }
        float[] sigmoid = sigmoidF32(argument);
        for (int i = 0; i < g.length; i++) {
            g[i] = g[i] * sigmoid[i] * u[i];
        }
        return g;
    }

    private static void addBias(float[] rows, float[] bias) {
        for (int i = 0; bias != null && i < rows.length; i++) {
            rows[i] += bias[i % bias.length];
        }
    }

    // ------------------------------------------------------------------ cuDNN

    private double[] softmax(double[] values, int rows, int width) {
        writeF64(in.address(), values);
        try (Scope scope = context.enter();
                Descriptor shapeOf = new Descriptor(cudnnDataType.CUDNN_DATA_DOUBLE, rows, width)) {
            check(
                    "cudnnSoftmaxForward",
                    JCudnn.cudnnSoftmaxForward(
                            cudnn,
                            cudnnSoftmaxAlgorithm.CUDNN_SOFTMAX_ACCURATE,
                            cudnnSoftmaxMode.CUDNN_SOFTMAX_MODE_INSTANCE,
                            Pointer.to(new double[] {1}),
                            shapeOf.tensor,
                            RawHandles.device(in.address()),
                            Pointer.to(new double[] {0}),
                            shapeOf.tensor,
                            RawHandles.device(out.address())));
        }
        return readF64(out.address(), values.length);
    }

    private double[] sigmoidF64(double[] values) {
        writeF64(in.address(), values);
        sigmoid(cudnnDataType.CUDNN_DATA_DOUBLE, values.length);
        return readF64(out.address(), values.length);
    }

    private float[] sigmoidF32(float[] values) {
        ByteBuffer bytes = direct(4 * values.length);
        bytes.asFloatBuffer().put(values);
        write(in.address(), bytes);
        sigmoid(cudnnDataType.CUDNN_DATA_FLOAT, values.length);
        return readF32(out.address(), values.length);
    }

    private void sigmoid(int dataType, int count) {
        boolean wide = dataType == cudnnDataType.CUDNN_DATA_DOUBLE;
        Pointer one = wide ? Pointer.to(new double[] {1}) : Pointer.to(new float[] {1});
        Pointer zero = wide ? Pointer.to(new double[] {0}) : Pointer.to(new float[] {0});
        cudnnActivationDescriptor mode = new cudnnActivationDescriptor();
        try (Scope scope = context.enter();
                Descriptor shapeOf = new Descriptor(dataType, 1, count)) {
            check("cudnnCreateActivationDescriptor", JCudnn.cudnnCreateActivationDescriptor(mode));
            try {
                check(
                        "cudnnSetActivationDescriptor",
                        JCudnn.cudnnSetActivationDescriptor(
                                mode,
                                cudnnActivationMode.CUDNN_ACTIVATION_SIGMOID,
                                cudnnNanPropagation.CUDNN_PROPAGATE_NAN,
                                0));
                check(
                        "cudnnActivationForward",
                        JCudnn.cudnnActivationForward(
                                cudnn,
                                mode,
                                one,
                                shapeOf.tensor,
                                RawHandles.device(in.address()),
                                zero,
                                shapeOf.tensor,
                                RawHandles.device(out.address())));
            } finally {
                JCudnn.cudnnDestroyActivationDescriptor(mode);
            }
        }
    }

    private static final class Descriptor implements AutoCloseable {
        final cudnnTensorDescriptor tensor = new cudnnTensorDescriptor();

        Descriptor(int dataType, int rows, int width) {
            check("cudnnCreateTensorDescriptor", JCudnn.cudnnCreateTensorDescriptor(tensor));
            check(
                    "cudnnSetTensor4dDescriptor",
                    JCudnn.cudnnSetTensor4dDescriptor(
                            tensor,
                            cudnnTensorFormat.CUDNN_TENSOR_NCHW,
                            dataType,
                            rows,
                            width,
                            1,
                            1));
        }

        @Override
        public void close() {
            JCudnn.cudnnDestroyTensorDescriptor(tensor);
        }
    }

    private static void check(String call, int code) {
        if (code != 0) {
            throw new IllegalStateException(call + " failed: " + cudnnStatus.stringFor(code));
        }
    }

    // ------------------------------------------------------------------ copies

    private static ByteBuffer direct(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
    }

    private void write(long to, ByteBuffer bytes) {
        try (Scope scope = context.enter()) {
            context.driver().memcpyHtoD(to, bytes);
        }
    }

    private ByteBuffer read(long from, int bytes) {
        ByteBuffer to = direct(bytes);
        try (Scope scope = context.enter()) {
            context.driver().contextSynchronize();
            context.driver().memcpyDtoH(to, from);
        }
        return to;
    }

    private void writeBf16(long to, float[] values) {
        ByteBuffer bytes = direct(2 * values.length);
        ShortBuffer bits = bytes.asShortBuffer();
        for (int i = 0; i < values.length; i++) {
            bits.put(i, Bf16.fromFloat(values[i]));
        }
        write(to, bytes);
    }

    private void writeF64(long to, float[] values) {
        writeF64(to, widen(values));
    }

    private void writeF64(long to, double[] values) {
        ByteBuffer bytes = direct(8 * values.length);
        bytes.asDoubleBuffer().put(values);
        write(to, bytes);
    }

    private float[] readF32(long from, int count) {
        float[] values = new float[count];
        FloatBuffer source = read(from, 4 * count).asFloatBuffer();
        source.get(values);
        return values;
    }

    private double[] readF64(long from, int count) {
        double[] values = new double[count];
        read(from, 8 * count).asDoubleBuffer().get(values);
        return values;
    }

    private static double[] widen(float[] values) {
        double[] wide = new double[values.length];
        for (int i = 0; i < wide.length; i++) {
            wide[i] = values[i];
        }
        return wide;
    }

    @Override
    public void close() {
        while (!owned.isEmpty()) {
            try {
                owned.pop().close();
            } catch (Exception e) {
                throw new IllegalStateException(e);
            }
        }
    }
}
