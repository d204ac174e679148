package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.Bf16;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.ShortBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

/**
 * Brings a layer's weights to the device: several host threads decode experts to bfloat16 in pinned
 * staging memory, a kernel packs each into tiles. Lives for the length of prepare; its staging is
 * freed by close.
 */
final class CudaWeights implements AutoCloseable {
    private static final int MAX_WORKERS = 8;
    private static final int BF16 = 2;

    private final Context context;
    private final LoadedKernels kernels;
    private final MoeConfig config;
    private final DeviceLayout layout;
    private final long base;
    private final Owned owned = new Owned();

    CudaWeights(
            Context context,
            LoadedKernels kernels,
            MoeConfig config,
            DeviceLayout layout,
            long base) {
        this.context = context;
        this.kernels = kernels;
        this.config = config;
        this.layout = layout;
        this.base = base;
    }

    /** Uploads and packs everything; returns when the device has it. */
    void run(ProgressListener progress) {
        LayerWeights weights = config.weights();
        uploadVectors(weights);
        if (weights instanceof DeviceRandomWeights random) {
            fillRandom(random);
            return;
        }
        int first = firstExpert();
        int experts = config.localExperts();
        int workers = Math.max(1, Math.min(Math.min(config.threads(), MAX_WORKERS), experts));
        AtomicInteger next = new AtomicInteger();
        AtomicLong done = new AtomicLong();
        ExecutorService pool = Executors.newFixedThreadPool(workers);
        try {
            List<Future<?>> running = new ArrayList<>();
            for (int worker = 0; worker < workers; worker++) {
                Worker w = new Worker();
                Callable<Void> work =
                        () -> {
                            for (int e = next.getAndIncrement();
                                    e < experts;
                                    e = next.getAndIncrement()) {
                                w.routed(e, weights.expert(first + e));
                                progress.progress(done.incrementAndGet(), experts);
                            }
                            return null;
                        };
                running.add(pool.submit(work));
            }
            for (Future<?> future : running) {
                join(future);
            }
            if (config.usesSharedExpert()) {
                new Worker().shared(weights.sharedExpert());
            }
        } finally {
            pool.shutdownNow();
        }
    }

    /** The first expert whose weights lie here. */
    private int firstExpert() {
        return Math.min(
                config.shape().experts(), config.firstLocalRank() * config.expertsPerRank());
    }

    private static void join(Future<?> future) {
        try {
            future.get();
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            throw new IllegalStateException("interrupted while loading weights", e);
        } catch (ExecutionException e) {
            if (e.getCause() instanceof RuntimeException cause) {
                throw cause;
            }
            if (e.getCause() instanceof Error cause) {
                throw cause;
            }
            throw new IllegalStateException(e.getCause());
        }
    }

    private void uploadVectors(LayerWeights weights) {
        if (layout.weights().has("router")) {
            WeightMatrix router = weights.router();
            float[] values = new float[Math.multiplyExact(router.rows(), router.cols())];
            router.read(values);
            upload("router", values);
            upload("router_bias", weights.routerBias());
        }
        if (layout.weights().has("correction_bias")) {
            upload("correction_bias", weights.correctionBias());
        }
        if (config.usesSharedExpert()) {
            upload("shared_gate", weights.sharedExpertGate());
        }
    }

    /** For benches: the matrices are written by a kernel, only biases come from the host. */
    private void fillRandom(DeviceRandomWeights random) {
        Stream stream = own(new Stream(context));
        ParamArena arena = own(new ParamArena(context));
        fill(
                arena,
                stream,
                "w_gate_up",
                random.gateUp().part(firstExpert(), config.localExperts()));
        fill(arena, stream, "w_down", random.down().part(firstExpert(), config.localExperts()));
        if (config.usesSharedExpert()) {
            fill(arena, stream, "w_shared_gate_up", random.sharedGateUp());
            fill(arena, stream, "w_shared_down", random.sharedDown());
        }
        if (config.expertBias()) {
            uploadBiases(random);
        }
        stream.synchronize();
    }

    private void fill(
            ParamArena arena, Stream stream, String buffer, DeviceRandomWeights.Buffer random) {
        if (!layout.weights().has(buffer)) {
            return;
        }
        KernelParams params = arena.params(DeviceStructs.FILL_PARAMS.size());
        var writer = DeviceStructs.FILL_PARAMS.writer(params.bytes(0));
        writer.put("packed", base + layout.weights().offset(buffer));
        writer.put("seed", random.seed());
        writer.put("experts", random.experts());
        writer.put("rows", random.rows());
        writer.put("cols", random.cols());
        writer.put("row_tiles", random.rowTiles());
        writer.put("column_blocks", random.columnBlocks());
        writer.put("gate_up", random.gateUp() ? 1 : 0);
        writer.put("scale", random.scale());
        try (Scope scope = context.enter()) {
            kernels.kernel("moe_fill_random").launch(context.driver(), 1, stream.handle(), params);
        }
    }

    /** Biases in packed order, as the pack kernels leave them. */
    private void uploadBiases(LayerWeights weights) {
        int experts = config.localExperts();
        if (experts == 0) {
            return;
        }
        int gateUpRows = layout.gateUpRows();
        int downRows = layout.downRows();
        float[] gateUp = new float[Math.multiplyExact(experts, gateUpRows)];
        float[] down = new float[Math.multiplyExact(experts, downRows)];
        for (int e = 0; e < experts; e++) {
            ExpertWeights expert = weights.expert(firstExpert() + e);
            for (int i = 0; i < config.shape().intermediate(); i++) {
                int packed = e * gateUpRows + i / 8 * 16 + i % 8;
                gateUp[packed] = expert.gateBias()[i];
                gateUp[packed + 8] = expert.upBias()[i];
            }
            System.arraycopy(expert.downBias(), 0, down, e * downRows, config.shape().hidden());
        }
        upload("bias_gate_up", gateUp);
        upload("bias_down", down);
    }

    private void upload(String buffer, float[] values) {
        if (values == null) {
            return;
        }
        ByteBuffer bytes =
                ByteBuffer.allocateDirect(Math.multiplyExact(values.length, 4))
                        .order(ByteOrder.LITTLE_ENDIAN);
        bytes.asFloatBuffer().put(values);
        try (Scope scope = context.enter()) {
            context.driver().memcpyHtoD(base + layout.weights().offset(buffer), bytes);
            context.driver().streamSynchronize(0L); // why: the copy may still be under way
        }
    }

    private synchronized <T extends AutoCloseable> T own(T resource) {
        return owned.add(resource);
    }

    @Override
    public void close() {
        owned.close("freeing what packed the weights");
    }

    /** One thread's stream, staging memory and scratch. */
    private final class Worker {
        private final Stream stream = own(new Stream(context));
        private final ParamArena arena = own(new ParamArena(context));
        private final KernelParams params = arena.params(DeviceStructs.PACK_PARAMS.size());
        private final long elements;
        private final PinnedBuffer host;
        private final DeviceBuffer device;
        private final float[] decoded;
        private final short[] rounded = new short[8192];

        Worker() {
            long width =
                    Math.max(
                            config.shape().intermediate(),
                            config.usesSharedExpert() ? config.shape().sharedIntermediate() : 0);
            elements = width * config.shape().hidden();
            long biases = 4L * (2 * width + config.shape().hidden());
            host = own(new PinnedBuffer(context, 4 * elements + biases));
            device = own(new DeviceBuffer(context, 4 * elements + biases));
            decoded = new float[Math.toIntExact(elements)];
        }

        void routed(int expert, ExpertWeights weights) {
            gateUp(
                    weights,
                    expertAddress("w_gate_up", expert),
                    expertAddress("bias_gate_up", expert),
                    layout.gateUpRows());
            down(weights, expertAddress("w_down", expert), expertAddress("bias_down", expert));
        }

        void shared(ExpertWeights weights) {
            int rows = 2 * DeviceLayout.pad(config.shape().sharedIntermediate());
            gateUp(weights, base + layout.weights().offset("w_shared_gate_up"), 0L, rows);
            down(weights, base + layout.weights().offset("w_shared_down"), 0L);
        }

        private long expertAddress(String buffer, int expert) {
            if (!layout.weights().has(buffer)) {
                return 0L;
            }
            long bytes = layout.weights().field(buffer).bytes() / config.localExperts();
            return base + layout.weights().offset(buffer) + bytes * expert;
        }

        private void gateUp(ExpertWeights weights, long packed, long packedBias, int packedRows) {
            int rows = weights.gate().rows();
            int cols = weights.gate().cols();
            long matrix = 2L * rows * cols;
            stage(weights.gate(), 0);
            stage(weights.up(), matrix);
            long bias = 2 * matrix;
            stageBias(weights.gateBias(), bias);
            stageBias(weights.upBias(), bias + 4L * rows);
            boolean biased = packedBias != 0;
            var writer = DeviceStructs.PACK_PARAMS.writer(params.bytes(0));
            writer.put("first", device.address());
            writer.put("second", device.address() + matrix);
            writer.put("first_bias", biased ? device.address() + bias : 0L);
            writer.put("second_bias", biased ? device.address() + bias + 4L * rows : 0L);
            writer.put("packed", packed);
            writer.put("packed_bias", packedBias);
            run("moe_pack_gate_up", writer, rows, cols, packedRows, bias + 8L * rows);
        }

        private void down(ExpertWeights weights, long packed, long packedBias) {
            int rows = weights.down().rows();
            int cols = weights.down().cols();
            long matrix = 2L * rows * cols;
            stage(weights.down(), 0);
            stageBias(weights.downBias(), matrix);
            boolean biased = packedBias != 0;
            var writer = DeviceStructs.PACK_PARAMS.writer(params.bytes(0));
            writer.put("first", device.address());
            writer.put("second", 0L);
            writer.put("first_bias", biased ? device.address() + matrix : 0L);
            writer.put("second_bias", 0L);
            writer.put("packed", packed);
            writer.put("packed_bias", packedBias);
            run("moe_pack_down", writer, rows, cols, layout.downRows(), matrix + 4L * rows);
        }

        private void run(
                String kernel,
                io.moe4j.cuda.layout.CStruct.Writer writer,
                int rows,
                int cols,
                int packedRows,
                long stagedBytes) {
            int columnBlocks = DeviceLayout.pad(cols) / DeviceLayout.PAD;
            writer.put("dtype", BF16);
            writer.put("rows", rows);
            writer.put("cols", cols);
            writer.put("row_tiles", packedRows / DeviceLayout.TILE_ROWS);
            writer.put("column_blocks", columnBlocks);
            try (Scope scope = context.enter()) {
                context.driver()
                        .memcpyHtoDAsync(
                                device.address(), host.memory(), 0, stagedBytes, stream.handle());
                kernels.kernel(kernel).launch(context.driver(), 1, stream.handle(), params);
                context.driver().streamSynchronize(stream.handle());
            }
        }

        private void stage(WeightMatrix matrix, long at) {
            int count = Math.multiplyExact(matrix.rows(), matrix.cols());
            matrix.read(decoded);
            ShortBuffer to =
                    host.bytes()
                            .slice(Math.toIntExact(at), 2 * count)
                            .order(ByteOrder.LITTLE_ENDIAN)
                            .asShortBuffer();
            for (int from = 0; from < count; from += rounded.length) {
                int n = Math.min(rounded.length, count - from);
                for (int i = 0; i < n; i++) {
                    rounded[i] = Bf16.fromFloat(decoded[from + i]);
                }
                to.put(rounded, 0, n);
            }
        }

        private void stageBias(float[] bias, long at) {
            if (bias != null) {
                FloatBuffer to =
                        host.bytes()
                                .slice(Math.toIntExact(at), 4 * bias.length)
                                .order(ByteOrder.LITTLE_ENDIAN)
                                .asFloatBuffer();
                to.put(bias);
            }
        }
    }
}
