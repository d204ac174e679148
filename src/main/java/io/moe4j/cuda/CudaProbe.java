package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceAttribute;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Event;
import io.moe4j.cuda.driver.GraphExec;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.Kernel;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.cuda.oracle.CublasGemm;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.observe.GraphTrace;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Set;
import java.util.function.Consumer;

/**
 * Internal, for {@code io.moe4j.bench}: what a benchmark needs beyond the public API. Times work by
 * events, launches parts of the experts phase again and again, fills weights on the device, and
 * runs cuBLAS as a baseline. Owns a stream and what it allocated; one thread.
 */
public final class CudaProbe implements AutoCloseable {
    /** What of the experts phase to launch. */
    public enum Part {
        /** All of it. */
        CHAIN,
        /** The first kernel. */
        GATE_UP,
        /** The second kernel. */
        DOWN
    }

    /** Which phases of a step to launch. */
    public enum Phases {
        /**
         * Dispatch and combine, with nothing between them: rows come home as an earlier step left
         * them.
         */
        PAIR,
        /** The experts, on rows that an earlier step left in the buffers. */
        EXPERTS,
        /** All of them. */
        STEP
    }

    private static final String FREEING = "freeing what a benchmark used";

    private final Context context;
    private final Stream stream;
    private final Owned owned = new Owned();

    /** A probe on device 0, or on the one that {@code moe4j.cuda.device} names. */
    public CudaProbe() {
        this(Integer.getInteger("moe4j.cuda.device", 0));
    }

    /**
     * A probe on a device.
     *
     * @param device its number
     */
    public CudaProbe(int device) {
        context = new Context(Drivers.open(), device);
        owned.add(context);
        stream = owned.add(new Stream(context));
    }

    /**
     * {@return the random weights that a kernel fills in on prepare; the host can read the same
     * numbers}
     *
     * @param shape the layer's sizes
     * @param vectors the vectors of the layer
     * @param seed seed of the values
     */
    public static LayerWeights randomWeights(MoeShape shape, RandomWeights vectors, long seed) {
        return new DeviceRandomWeights(shape, vectors, seed);
    }

    /** {@return the stream everything here runs on} */
    public long stream() {
        return stream.handle();
    }

    /** Waits for the stream. */
    public void synchronize() {
        stream.synchronize();
    }

    /** {@return the name of the GPU} */
    public String gpu() {
        return context.driver().deviceName(context.device());
    }

    /** {@return PCI bus address of the GPU} */
    public String pciBusId() {
        return context.driver().devicePciBusId(context.device());
    }

    /** {@return the newest CUDA version the driver supports, for example {@code 13.0}} */
    public String driverCuda() {
        int version = context.driver().version();
        return version / 1000 + "." + version % 1000 / 10;
    }

    /** {@return the highest SM clock in MHz} */
    public int maxSmClockMhz() {
        return context.attribute(DeviceAttribute.CLOCK_RATE_KHZ) / 1000;
    }

    /** {@return the kernel image in use} */
    public String kernels() {
        return KernelCatalog.choose(context.driver(), context.device()).description();
    }

    /** {@return how kernels that may start before their predecessor ends are launched} */
    public String pdl() {
        return context.driver().pdlSupport().reason();
    }

    /** {@return the free device memory in bytes} */
    public long freeBytes() {
        try (Scope scope = context.enter()) {
            return context.driver().memGetInfo().free();
        }
    }

    /**
     * {@return the kernels of a part of the experts phase, in order}
     *
     * @param step bound by a layer of the CUDA backend
     * @param part which part
     */
    public static List<String> kernels(BoundStep step, Part part) {
        return ((CudaStep) step).cudaLayer().expertSymbols(part);
    }

    /**
     * Enqueues a part of the experts phase, as a step launches it, on rows that an earlier step
     * left in the buffers. A layer that computes both products in one kernel launches one product
     * by the kernel that computes it alone.
     *
     * @param step bound by a layer of the CUDA backend
     * @param part which part
     */
    public void launchExperts(BoundStep step, Part part) {
        CudaStep cuda = (CudaStep) step;
        cuda.cudaLayer().launchExperts(stream(), cuda, part);
    }

    /**
     * Steps on the buffers of the first with the weights of each in turn: weights are then cold,
     * and rows are where a dispatch has just left them. All layers have one configuration and stay
     * open.
     *
     * @param steps bound by layers of the CUDA backend, one each
     * @return as many steps, in their order
     */
    public static List<BoundStep> rotatingWeights(List<? extends BoundStep> steps) {
        CudaStep first = (CudaStep) steps.get(0);
        List<BoundStep> rotating = new ArrayList<>();
        for (BoundStep step : steps) {
            CudaLayer other = ((CudaStep) step).cudaLayer();
            rotating.add(step == first ? first : first.cudaLayer().withWeightsOf(first, other));
        }
        return rotating;
    }

    /**
     * Enqueues phases of a step, outside the order in which a caller has to enqueue them.
     *
     * @param step bound by a layer of the CUDA backend
     * @param phases which; those of a group's ranks must be the same
     */
    public void launch(BoundStep step, Phases phases) {
        CudaStep cuda = (CudaStep) step;
        CudaLayer layer = cuda.cudaLayer();
        switch (phases) {
            case EXPERTS -> layer.launchExperts(stream(), cuda, Part.CHAIN);
            case STEP -> layer.launchAgain(stream(), cuda, Phase.ROUTE, Phase.COMBINE_RECV);
            case PAIR -> {
                layer.launchAgain(stream(), cuda, Phase.ROUTE, Phase.DISPATCH_RECV);
                layer.launchAgain(stream(), cuda, Phase.COMBINE_SEND, Phase.COMBINE_RECV);
            }
        }
    }

    /**
     * Captures {@code rounds} rounds of a part of the experts phase over steps of any layers.
     *
     * @param steps bound by layers of the CUDA backend
     * @param part which part
     * @param rounds how often
     * @return the graph, owned by the caller
     */
    public MoeGraph captureExperts(List<? extends BoundStep> steps, Part part, int rounds) {
        return capture(steps, step -> launchExperts(step, part), rounds);
    }

    /**
     * Captures {@code rounds} rounds of some phases over steps of any layers.
     *
     * @param steps bound by layers of the CUDA backend
     * @param phases which phases
     * @param rounds how often
     * @return the graph, owned by the caller
     */
    public MoeGraph capture(List<? extends BoundStep> steps, Phases phases, int rounds) {
        return capture(steps, step -> launch(step, phases), rounds);
    }

    private MoeGraph capture(
            List<? extends BoundStep> steps, Consumer<BoundStep> launch, int rounds) {
        Set<CudaLayer> pinned =
                StepCapture.pin(steps.stream().map(step -> ((CudaStep) step).cudaLayer()).toList());
        try {
            GraphExec exec =
                    GraphExec.capture(
                            context,
                            stream(),
                            () -> {
                                for (int round = 0; round < rounds; round++) {
                                    steps.forEach(launch);
                                }
                            });
            return new CudaGraph(exec, pinned, GraphTrace.unwatched());
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw e;
        }
    }

    /**
     * {@return the device time of {@code work}, which enqueues on {@link #stream}, in microseconds:
     * one sample per call, from the end of the one before to its own end}
     *
     * @param work enqueues what is timed
     * @param samples how many samples
     */
    public double[] deviceUs(Runnable work, int samples) {
        List<Event> events = new ArrayList<>();
        try {
            for (int i = 0; i <= samples; i++) {
                events.add(new Event(context, true));
            }
            work.run(); // why: the first sample then starts on a busy device, as the others do
            events.get(0).record(stream());
            for (int i = 1; i <= samples; i++) {
                work.run();
                events.get(i).record(stream());
            }
            events.get(samples).synchronize();
            double[] us = new double[samples];
            for (int i = 0; i < samples; i++) {
                us[i] = 1e3 * events.get(i + 1).elapsedMsSince(events.get(i));
            }
            return us;
        } finally {
            events.forEach(Event::close);
        }
    }

    /**
     * {@return the device time of one call of {@code work} on a stream with nothing before it, in
     * microseconds}
     *
     * @param work enqueues what is timed
     */
    public double deviceUs(Runnable work) {
        try (Event start = new Event(context, true);
                Event end = new Event(context, true)) {
            start.record(stream());
            work.run();
            end.record(stream());
            end.synchronize();
            return 1e3 * end.elapsedMsSince(start);
        }
    }

    /**
     * {@return the cuBLAS over the same experts, one call each, with the counts known on the host:
     * the way without a grouped kernel} Random weights and rows; no activation in between.
     *
     * @param counts rows of each expert; experts without rows are left out
     * @param hidden H
     * @param intermediate I
     * @param sets weight sets to rotate
     * @throws io.moe4j.BackendUnavailableException if cuBLAS cannot be used
     */
    public Cublas cublas(int[] counts, int hidden, int intermediate, int sets) {
        return new Cublas(counts, hidden, intermediate, sets);
    }

    /** The baseline: captures one round over all weight sets. Closed with its memory. */
    public final class Cublas implements AutoCloseable {
        private final Owned resources = new Owned();
        private final int[] counts;
        private final int hidden;
        private final int intermediate;
        private final int hit;
        private final CublasGemm gemm;
        private final long[] gateUp;
        private final long[] down;
        private final long in;
        private final long middle;
        private final long activated;
        private final long out;

        private Cublas(int[] counts, int hidden, int intermediate, int sets) {
            int[] rowsOfHit = Arrays.stream(counts).filter(c -> c > 0).toArray();
            this.counts = rowsOfHit;
            this.hit = rowsOfHit.length;
            this.hidden = hidden;
            this.intermediate = intermediate;
            long rows = Arrays.stream(rowsOfHit).sum();
            try {
                gemm = resources.add(new CublasGemm(context, stream()));
                gateUp = new long[sets];
                down = new long[sets];
                for (int set = 0; set < sets; set++) {
                    gateUp[set] = random(4L * hit * hidden * intermediate, set);
                    down[set] = random(2L * hit * hidden * intermediate, sets + set);
                }
                in = random(2 * rows * hidden, 2L * sets);
                middle = random(4 * rows * intermediate, 2L * sets + 1);
                activated = random(2 * rows * intermediate, 2L * sets + 2);
                out = random(2 * rows * hidden, 2L * sets + 3);
                enqueue(
                        Part.CHAIN,
                        0); // why: what cuBLAS sets up late must not fall into a capture
                synchronize();
            } catch (RuntimeException | Error e) {
                close();
                throw e;
            }
        }

        private long random(long bytes, long seed) {
            long tiles = (bytes + 16383) / 16384;
            DeviceBuffer buffer = resources.add(new DeviceBuffer(context, tiles * 16384));
            fillRandom(buffer.address(), Math.toIntExact(tiles), seed);
            return buffer.address();
        }

        /**
         * {@return a graph of {@code rounds} rounds over the first weight sets; the caller closes
         * it}
         *
         * @param part which part
         * @param weightSets sets of weights to go through, so that they are not in the cache
         * @param rounds how often
         */
        public Replay capture(Part part, int weightSets, int rounds) {
            return new Replay(
                    GraphExec.capture(
                            context,
                            stream(),
                            () -> {
                                for (int round = 0; round < rounds; round++) {
                                    for (int set = 0; set < weightSets; set++) {
                                        enqueue(part, set);
                                    }
                                }
                            }),
                    stream());
        }

        private void enqueue(Part part, int set) {
            if (part != Part.DOWN) {
                long row = 0;
                for (int e = 0; e < hit; e++) {
                    gemm.multiplyToBf16(
                            middle + 4 * row * intermediate,
                            in + 2 * row * hidden,
                            gateUp[set] + 4L * e * hidden * intermediate,
                            counts[e],
                            2 * intermediate,
                            hidden);
                    row += counts[e];
                }
            }
            if (part != Part.GATE_UP) {
                long row = 0;
                for (int e = 0; e < hit; e++) {
                    gemm.multiplyToBf16(
                            out + 2 * row * hidden,
                            activated + 2 * row * intermediate,
                            down[set] + 2L * e * hidden * intermediate,
                            counts[e],
                            hidden,
                            intermediate);
                    row += counts[e];
                }
            }
        }

        /** {@return the version of cuBLAS} */
        public int version() {
            return gemm.version();
        }

        @Override
        public void close() {
            resources.close(FREEING);
        }
    }

    /** A captured graph of a baseline. */
    public static final class Replay implements AutoCloseable {
        private final GraphExec exec;
        private final long stream;

        private Replay(GraphExec exec, long stream) {
            this.exec = exec;
            this.stream = stream;
        }

        /** Enqueues it. */
        public void launch() {
            exec.launch(stream);
        }

        @Override
        public void close() {
            exec.close();
        }
    }

    private LoadedKernels fillKernels;
    private ParamArena arena;

    /** Fills tiles of 16 KiB with random bfloat16 values in ±1/16. */
    private void fillRandom(long address, int tiles, long seed) {
        if (fillKernels == null) {
            KernelCatalog catalog = KernelCatalog.choose(context.driver(), context.device());
            fillKernels = owned.add(catalog.load(context, smallestLayer()));
            arena = owned.add(new ParamArena(context));
        }
        KernelParams params = arena.params(DeviceStructs.FILL_PARAMS.size());
        var writer = DeviceStructs.FILL_PARAMS.writer(params.bytes(0));
        writer.put("packed", address);
        writer.put("seed", seed);
        writer.put("experts", tiles);
        writer.put("rows", 128);
        writer.put("cols", 64);
        writer.put("row_tiles", 1);
        writer.put("column_blocks", 1);
        writer.put("gate_up", 0);
        writer.put("scale", 0.0625f);
        Kernel kernel = fillKernels.kernel("moe_fill_random");
        try (Scope scope = context.enter()) {
            Driver driver = context.driver();
            kernel.launch(driver, 1, stream(), params);
        }
    }

    private static MoeConfig smallestLayer() {
        return MoeConfig.builder().shape(MoeShape.of(64, 64, 1, 1)).maxTokensPerRank(1).build();
    }

    /** Frees everything; layers opened by the caller must be closed before. */
    @Override
    public void close() {
        owned.close(FREEING);
    }
}
