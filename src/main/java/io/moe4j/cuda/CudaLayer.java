package io.moe4j.cuda;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HandlePool;
import io.moe4j.LanePart;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.RankLostException;
import io.moe4j.Recovery;
import io.moe4j.RoutingInput;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.GraphExec;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.Kernel;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.CStruct;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.cuda.layout.Region;
import io.moe4j.ep.Group;
import io.moe4j.ep.PeerStatistics;
import io.moe4j.observe.LayerFault;
import io.moe4j.observe.LayerTrace;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.Deque;
import java.util.IdentityHashMap;
import java.util.List;
import java.util.Set;
import java.util.concurrent.locks.ReentrantLock;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import java.util.function.Supplier;

/**
 * A layer over R virtual ranks on one GPU, or over one rank of a group of GPUs. {@code enqueue}
 * launches a fixed list of kernels with one parameter that was packed at bind: no allocation, no
 * copy, no wait, whatever T and the routing are. Owns weights, handles and kernels; the caller owns
 * the stream and its tensors.
 *
 * <p>Close marks the layer closed at once; memory goes when no graph captured from it is left.
 */
final class CudaLayer implements MoeLayer {
    /** FaultCode kPeerAbort of step_params.cuh. */
    private static final int PEER_ABORT = 3;

    /** What 16 bits of an epoch can tell apart. */
    private static final int LAST_GENERATION = 65_535;

    private static final int ITEMS_MISSING = 4; // kInternal of step_params.cuh

    private final MoeConfig config;
    private final String reason;
    private final Context context;
    private final KernelCatalog catalog;
    private final DeviceLayout layout;
    private final HandlePool pool;
    private final CudaMemory memory;
    private final LayerTrace trace;
    private final ReentrantLock lock = new ReentrantLock();

    /** Read: the layer's memory is looked at outside of a step. Write: it is being freed. */
    private final ReentrantReadWriteLock freeing = new ReentrantReadWriteLock();

    private final Deque<AutoCloseable> owned = new ArrayDeque<>();
    private final List<CudaStep> steps = new ArrayList<>();

    /** What a layer of a group shares with the other ranks; null before prepare and without one. */
    private PeerMemory peers;

    private LoadedKernels kernels;
    private long weightsBase;
    private CudaHandle[] handles;
    private ParamArena arena;
    private int graphs;
    private boolean freed;
    private int generation;
    private volatile boolean prepared;
    private volatile boolean recovering;
    private volatile boolean closed;

    /** Takes over {@code context}, which is released when the layer's memory is freed. */
    CudaLayer(MoeConfig config, String reason, Context context, KernelCatalog catalog) {
        this.config = config;
        this.reason = reason;
        this.pool = new HandlePool(config.handles());
        this.context = context;
        this.catalog = catalog;
        this.layout = new DeviceLayout(config);
        this.memory = new CudaMemory(context);
        this.trace = LayerTrace.open(this);
    }

    @Override
    public MoeConfig config() {
        return config;
    }

    @Override
    public String backend() {
        return "cuda";
    }

    @Override
    public String backendReason() {
        return reason;
    }

    @Override
    public MemoryPlan plan() {
        return layout.plan();
    }

    @Override
    public void prepare() {
        prepare(ProgressListener.NONE);
    }

    @Override
    public void prepare(ProgressListener progress) {
        lock.lock();
        try {
            requireOpen();
            if (prepared) {
                return;
            }
            try {
                trace.prepare(() -> allocateOrJoin(progress));
            } catch (CudaException e) {
                freeOwned(e);
                throw e.inCapture() ? refusedInCapture("prepare", e) : e;
            } catch (RuntimeException | Error e) {
                freeOwned(e);
                throw e;
            }
            generation = 0;
            prepared = true;
        } finally {
            lock.unlock();
        }
    }

    /**
     * A layer of a group meets the others four times: what they have in common, where their memory
     * is, once all have written to it, and once all have seen what was written.
     *
     * <p>why the lock: two layers that a rank prepares at once would mix up their meetings.
     */
    private void allocateOrJoin(ProgressListener progress) {
        if (config.group() == null) {
            allocate(progress);
            return;
        }
        synchronized (config.group()) {
            peers = own(new PeerMemory(context, config, layout));
            peers.agree(catalog.description());
            peers.meet(
                    "addresses",
                    () -> {
                        allocate(progress);
                        warmUp();
                        return peers.export();
                    },
                    peers::addresses);
            peers.meet("the self-test's writes", () -> peers.connect(handles, kernels), all -> {});
            peers.meet("the self-test's result", () -> peers.verify(kernels), all -> {});
        }
    }

    private void allocate(ProgressListener progress) {
        kernels = own(catalog.load(context, config));
        DeviceBuffer weights = own(new DeviceBuffer(context, layout.weights().size()));
        weightsBase = weights.address();
        handles = new CudaHandle[config.handles()];
        for (int handle = 0; handle < handles.length; handle++) {
            handles[handle] =
                    own(
                            new CudaHandle(
                                    context,
                                    layout,
                                    config,
                                    peers == null ? null : peers::allocate));
        }
        arena = own(new ParamArena(context));
        try (CudaWeights upload = new CudaWeights(context, kernels, config, layout, weightsBase)) {
            upload.run(progress);
        }
    }

    /**
     * Runs a step without tokens over this rank alone, on its own memory. why: a kernel that was
     * never launched may be loaded only then, or may want a larger stack, and both wait for a GPU
     * that waits for a peer.
     */
    private void warmUp() {
        // why so large: a kernel may read a few tokens before it knows that there are none
        long eager = 64L + 8L * Math.max(config.shape().hidden(), config.shape().topK()) * 4;
        try (DeviceBuffer nothing = new DeviceBuffer(context, eager);
                Stream stream = new Stream(context);
                Scope scope = context.enter()) {
            context.driver().memsetD8(nothing.address(), (byte) 0, nothing.size());
            context.driver().streamSynchronize(0L); // why: a fill is asynchronous
            for (CudaHandle handle : handles) {
                CudaStep step = pack(List.of(noTokens(nothing)), handle, weightsBase, true);
                try {
                    for (Kernel kernel : warmUpFlow()) {
                        kernel.launch(context.driver(), 1, stream.handle(), step.params());
                    }
                    stream.synchronize();
                } finally {
                    step.free();
                }
                if (handle.errorCode(config.firstLocalRank()) != 0) {
                    throw new IllegalStateException(
                            "a step without tokens failed when the layer opened: "
                                    + describe(
                                            fault(
                                                    handle,
                                                    config.firstLocalRank(),
                                                    handle.errorCode(config.firstLocalRank()))));
                }
                handle.clear(-1L >>> (Long.SIZE - config.ranks()));
            }
        }
    }

    /** Every kernel of the layer: each phase alone, then a whole step. */
    private List<Kernel> warmUpFlow() {
        List<Kernel> flow = new ArrayList<>();
        for (Phase phase : PHASES) {
            flow.addAll(List.of(kernels.of(phase)));
        }
        flow.addAll(List.of(kernels.flow(Phase.ROUTE, Phase.COMBINE_RECV)));
        return flow;
    }

    /** Nothing is used but the count, which is 0. */
    private StepTensors noTokens(DeviceBuffer nothing) {
        Tensor count = Tensor.device(nothing.address(), DType.I32, 1);
        boolean topk = config.routingInput() == RoutingInput.TOPK;
        boolean logits = config.routingInput() == RoutingInput.LOGITS;
        Tensor any = Tensor.device(nothing.address(), DType.F32, 1);
        return new StepTensors(
                any, count, topk ? any : null, topk ? any : null, logits ? any : null, any, false);
    }

    private <T extends AutoCloseable> T own(T resource) {
        owned.push(resource);
        return resource;
    }

    @Override
    public HandlePool handles() {
        return pool;
    }

    @Override
    public BoundStep bind(List<StepTensors> ranks, int handle) {
        lock.lock();
        try {
            requirePrepared();
            if (handle < 0 || handle >= handles.length) {
                throw new IllegalArgumentException(
                        "handle="
                                + handle
                                + " is outside 0.."
                                + (handles.length - 1)
                                + ": open the layer with more handles(...)");
            }
            if (ranks.size() != config.localRanks()) {
                throw new IllegalArgumentException(
                        "got the tensors of "
                                + ranks.size()
                                + " ranks but the layer has "
                                + (config.group() == null
                                        ? "ranks="
                                                + config.ranks()
                                                + ": give one StepTensors per rank"
                                        : "rank "
                                                + config.group().rank()
                                                + " of the group alone: give its StepTensors"));
            }
            // why relaxed: some runtimes tell their addresses only while they capture
            try (Scope scope = context.enter();
                    Scope relaxed = context.driver().relaxCapture()) {
                for (int rank = 0; rank < ranks.size(); rank++) {
                    validate(rank, ranks.get(rank));
                }
                CudaStep step = pack(ranks, handles[handle], weightsBase, false);
                steps.add(step);
                return step;
            }
        } catch (CudaException e) {
            throw e.inCapture() ? refusedInCapture("bind", e) : e;
        } finally {
            lock.unlock();
        }
    }

    private static RuntimeException refusedInCapture(String method, CudaException e) {
        return new IllegalStateException(
                method
                        + " was called while this thread captures a stream: "
                        + method
                        + " before the capture begins; this one is broken, end it and start anew",
                e);
    }

    private void validate(int rank, StepTensors tensors) {
        try {
            tensors.validate(config);
            requireDevice("hidden", tensors.hidden());
            requireDevice("tokenCount", tensors.tokenCount());
            requireDevice("topkIds", tensors.topkIds());
            requireDevice("topkWeights", tensors.topkWeights());
            requireDevice("routerLogits", tensors.routerLogits());
            requireDevice("out", tensors.out());
            BoundMemory.requireReachable(tensors, context);
        } catch (IllegalArgumentException e) {
            throw new IllegalArgumentException("rank " + rank + ": " + e.getMessage(), e);
        }
    }

    private static void requireDevice(String name, Tensor tensor) {
        if (tensor != null && tensor.isHost()) {
            throw new IllegalArgumentException(
                    name
                            + " is host memory but the CUDA backend reads device memory: use"
                            + " Tensor.device or layer.memory().allocate");
        }
    }

    /** Asks the driver again, for {@link BoundStep#requireAlive}. */
    void requireAlive(List<StepTensors> ranks) {
        whileNotFreed(
                () -> {
                    requirePrepared();
                    for (int rank = 0; rank < ranks.size(); rank++) {
                        try (Scope scope = context.enter();
                                Scope relaxed = context.driver().relaxCapture()) {
                            BoundMemory.requireReachable(ranks.get(rank), context);
                        } catch (IllegalArgumentException e) {
                            throw new IllegalStateException(
                                    "bound memory is gone, rank " + rank + ": " + e.getMessage(),
                                    e);
                        }
                    }
                    return null;
                });
    }

    /**
     * Packs the parameters of a step.
     *
     * @param alone over this rank only, as rank 0 of 1
     */
    private CudaStep pack(
            List<StepTensors> ranks, CudaHandle handle, long weightsBase, boolean alone) {
        int size = DeviceStructs.LOCAL_RANK.size();
        ByteBuffer locals =
                ByteBuffer.allocateDirect(ranks.size() * size).order(ByteOrder.LITTLE_ENDIAN);
        for (int rank = 0; rank < ranks.size(); rank++) {
            locals.position(rank * size);
            CStruct.Writer to = DeviceStructs.LOCAL_RANK.writer(locals);
            packRank(to, config.firstLocalRank() + rank, ranks.get(rank), handle);
            packWeights(to, rank, weightsBase);
            if (alone) {
                to.put("rank", 0);
            }
        }
        DeviceBuffer buffer = new DeviceBuffer(context, locals.capacity());
        try (Scope scope = context.enter()) {
            upload(buffer.address(), locals.rewind());
            KernelParams params = arena.params(DeviceStructs.STEP_PARAMS.size());
            CStruct.Writer to = DeviceStructs.STEP_PARAMS.writer(params.bytes(0));
            packParams(to, buffer.address(), handle);
            if (alone) {
                to.put("num_ranks", 1);
                to.put("experts", config.expertsPerRank());
            }
            return new CudaStep(this, List.copyOf(ranks), handle, params, buffer);
        } catch (RuntimeException | Error e) {
            buffer.close();
            throw e;
        }
    }

    /** why a stream of its own: the legacy stream may wait for one that is being captured. */
    private void upload(long to, ByteBuffer from) {
        int bytes = from.remaining();
        try (PinnedBuffer pinned = new PinnedBuffer(context, bytes);
                Stream stream = new Stream(context)) {
            pinned.bytes().put(0, from, 0, bytes);
            context.driver().memcpyHtoDAsync(to, pinned.memory(), 0, bytes, stream.handle());
            stream.synchronize();
        }
    }

    private void packRank(CStruct.Writer to, int rank, StepTensors tensors, CudaHandle handle) {
        to.put("hidden", address(tensors.hidden()));
        to.put("token_count", address(tensors.tokenCount()));
        to.put("topk_ids", address(tensors.topkIds()));
        to.put("topk_weights", address(tensors.topkWeights()));
        to.put("router_logits", address(tensors.routerLogits()));
        to.put("out", address(tensors.out()));
        to.put("accumulate", tensors.accumulate() ? 1 : 0);
        to.put("rank", rank);
        to.put("local_experts", config.expertsOn(rank));
        for (String buffer :
                List.of(
                        "home_tokens",
                        "home_ids",
                        "home_weights",
                        "home_mask",
                        "logits",
                        "home_rows",
                        "expert_counts",
                        "expert_offsets",
                        "expert_rows",
                        "packed_row_of",
                        "activated",
                        "expert_out",
                        "shared_activated",
                        "shared_out",
                        "epoch",
                        "arrivals",
                        "totals",
                        "work",
                        "expert_done",
                        "members",
                        "peer_totals",
                        "received_totals")) {
            to.put(buffer, handle.workspace(rank, buffer));
        }
        to.put("error", handle.errorAddress(rank));
        to.put("counters", handle.countersAddress(rank));
        to.put("stats", handle.statsAddress(rank));
        to.put("received_rows", handle.receivedAddress(rank));
    }

    /** A rank's experts are consecutive in the layer's buffers, which hold the local ranks'. */
    private void packWeights(CStruct.Writer to, int localRank, long weightsBase) {
        int experts = config.localExperts();
        long first = (long) localRank * config.expertsPerRank();
        for (String buffer : List.of("w_gate_up", "w_down", "bias_gate_up", "bias_down")) {
            long base = layout.weights().address(weightsBase, buffer);
            if (base != 0 && first < experts) {
                base += layout.weights().field(buffer).bytes() / experts * first;
            }
            to.put(buffer, base);
        }
    }

    /**
     * For benches: a step on the same buffers with the weights of another layer of this
     * configuration, which must stay open as long.
     */
    CudaStep withWeightsOf(CudaStep step, CudaLayer other) {
        requirePrepared();
        other.requirePrepared();
        CudaStep twin = pack(step.tensors(), step.handle(), other.weightsBase, false);
        steps.add(twin);
        return twin;
    }

    private static long address(Tensor tensor) {
        return tensor == null ? 0L : tensor.address();
    }

    private void packParams(CStruct.Writer to, long locals, CudaHandle handle) {
        to.put("num_ranks", config.ranks());
        to.put("num_local_ranks", config.localRanks());
        to.put("max_tokens", config.maxTokensPerRank());
        to.put("top_k", config.shape().topK());
        to.put("experts", config.shape().experts());
        to.put("experts_per_rank", config.expertsPerRank());
        to.put("hidden", config.shape().hidden());
        to.put("hidden_pad", DeviceLayout.pad(config.shape().hidden()));
        to.put("intermediate", config.shape().intermediate());
        to.put("intermediate_pad", DeviceLayout.pad(config.shape().intermediate()));
        int shared = config.usesSharedExpert() ? config.shape().sharedIntermediate() : 0;
        to.put("shared", shared);
        to.put("shared_pad", DeviceLayout.pad(shared));
        to.put("hidden_dtype", dtype(config.hiddenDType()));
        to.put("out_dtype", dtype(config.outDType()));
        to.put("routing_input", config.routingInput().ordinal());
        boolean routes = config.routingInput() != RoutingInput.TOPK;
        to.put("scoring", routes ? config.rule().scoring().ordinal() : 0);
        to.put("renormalise", routes && config.rule().renormalise() ? 1 : 0);
        to.put("groups", routes ? config.rule().groups() : 1);
        to.put("topk_groups", routes ? config.rule().topkGroups() : 1);
        to.put("scale", routes ? config.rule().scale() : 1f);
        to.put("activation", config.activation().kind().ordinal());
        to.put("alpha", config.activation().alpha());
        to.put("limit", config.activation().limit());
        to.put("timeout_ns", config.stepTimeout().toNanos());
        to.put("first_timeout_ns", config.firstStepTimeout().toNanos());
        for (String buffer :
                List.of(
                        "dispatch_flags",
                        "combine_flags",
                        "abort_words",
                        "recv_tokens",
                        "recv_ids",
                        "recv_weights",
                        "recv_rows",
                        "combine_rows")) {
            to.put("off_" + buffer, layout.symmetric().offset(buffer));
        }
        boolean lines = layout.symmetric().has("dispatch_lines");
        to.put("wire", lines ? 1 : 0);
        for (String buffer : List.of("dispatch_lines", "combine_lines")) {
            to.put("off_" + buffer, lines ? layout.symmetric().offset(buffer) : 0L);
        }
        to.put("ranks", handle.rankViews());
        to.put("locals", locals);
        boolean ownRouter = config.routingInput() == RoutingInput.HIDDEN;
        to.put("router", layout.weights().address(weightsBase, "router"));
        to.put(
                "router_bias",
                ownRouter && config.weights().routerBias() != null
                        ? layout.weights().address(weightsBase, "router_bias")
                        : 0L);
        to.put(
                "correction_bias",
                routes && config.weights().correctionBias() != null
                        ? layout.weights().address(weightsBase, "correction_bias")
                        : 0L);
        to.put("w_shared_gate_up", layout.weights().address(weightsBase, "w_shared_gate_up"));
        to.put("w_shared_down", layout.weights().address(weightsBase, "w_shared_down"));
        to.put(
                "shared_gate",
                shared > 0 && config.weights().sharedExpertGate() != null
                        ? layout.weights().address(weightsBase, "shared_gate")
                        : 0L);
    }

    private static int dtype(DType dtype) {
        return switch (dtype) {
            case F32 -> 0;
            case F16 -> 1;
            case BF16 -> 2;
            default -> throw new IllegalArgumentException("hidden states of type " + dtype);
        };
    }

    @Override
    public void enqueue(long stream, BoundStep step, Phase first, Phase last) {
        if (!(step instanceof CudaStep cudaStep) || cudaStep.cudaLayer() != this) {
            throw new IllegalArgumentException(
                    "the step was bound by another layer: bind it with this one");
        }
        if (!lock.tryLock()) {
            throw new IllegalStateException(
                    "another thread is enqueueing on this layer: one step at a time");
        }
        try {
            requirePrepared();
            requireNext(cudaStep, first, last);
            try (Scope scope = context.enter()) {
                launch(stream, cudaStep, first, last);
                trace.enqueued();
            } catch (RuntimeException | Error e) {
                cudaStep.handle().nextPhase = Phase.ROUTE; // why: a failed step is over
                cudaStep.handle().stepInFlight = null;
                throw refusedStream(stream, e);
            }
        } finally {
            lock.unlock();
        }
    }

    /** Names the stream if it is what the driver did not take; else rethrows. */
    private RuntimeException refusedStream(long stream, Throwable e) {
        if (e instanceof CudaException refused && refused.invalidHandle()) {
            return new IllegalArgumentException(
                    String.format(
                            "stream=0x%x is no stream of the layer's context 0x%x%s: it was"
                                    + " destroyed, or made in another context; open the layer with"
                                    + " cudaContext(...) of the stream's",
                            stream,
                            context.handle(),
                            context.isPrimary() ? ", the device's primary context" : ""),
                    e);
        }
        if (e instanceof Error error) {
            throw error;
        }
        return (RuntimeException) e;
    }

    private static void requireNext(CudaStep step, Phase first, Phase last) {
        if (first.compareTo(last) > 0) {
            throw new IllegalArgumentException("phase " + first + " comes after " + last);
        }
        CudaHandle handle = step.handle();
        if (first != handle.nextPhase || (first != Phase.ROUTE && handle.stepInFlight != step)) {
            throw new IllegalStateException(
                    "phase "
                            + first
                            + " cannot run now: the next phase of this handle is "
                            + handle.nextPhase
                            + (handle.stepInFlight == null || handle.stepInFlight == step
                                    ? ""
                                    : " of another step"));
        }
    }

    /** The flow: a fixed list of kernels a phase. */
    private void launch(long stream, CudaStep step, Phase first, Phase last) {
        CudaHandle handle = step.handle();
        handle.stepInFlight = step;
        for (Kernel kernel : kernels.flow(first, last)) {
            kernel.launch(context.driver(), config.localRanks(), stream, step.params());
        }
        handle.nextPhase = next(last);
        if (last == Phase.COMBINE_RECV) {
            handle.stepInFlight = null;
        }
    }

    /** For benches: the kernels of the experts phase, in order. */
    List<String> expertSymbols() {
        return expertSymbols(CudaProbe.Part.CHAIN);
    }

    /** For benches: the kernels of a part of the experts phase, in order. */
    List<String> expertSymbols(CudaProbe.Part part) {
        return Arrays.stream(expertKernels(part)).map(Kernel::symbol).toList();
    }

    private Kernel[] expertKernels(CudaProbe.Part part) {
        requirePrepared();
        return switch (part) {
            case CHAIN -> kernels.of(Phase.EXPERTS);
            case GATE_UP -> new Kernel[] {kernels.gateUp()};
            case DOWN -> new Kernel[] {kernels.down()};
        };
    }

    /**
     * For benches: launches the experts phase, or one of its products, on rows that an earlier step
     * left in the buffers; as often as wanted and outside the order of phases.
     */
    void launchExperts(long stream, CudaStep step, CudaProbe.Part part) {
        Kernel[] flow = expertKernels(part);
        try (Scope scope = context.enter()) {
            for (Kernel kernel : flow) {
                kernel.launch(context.driver(), config.localRanks(), stream, step.params());
            }
        }
    }

    /** For benches: launches phases of a step outside their order, as often as wanted. */
    void launchAgain(long stream, CudaStep step, Phase first, Phase last) {
        requirePrepared();
        try (Scope scope = context.enter()) {
            launch(stream, step, first, last);
        }
    }

    private static Phase next(Phase phase) {
        Phase[] all = PHASES;
        return all[(phase.ordinal() + 1) % all.length];
    }

    private static final Phase[] PHASES = Phase.values();

    @Override
    public MoeGraph capture(long stream, List<GraphPart> parts) {
        if (parts.isEmpty()) {
            throw new IllegalArgumentException("nothing to capture: give at least one part");
        }
        Set<CudaLayer> layers = layersOf(parts);
        return capture(
                stream,
                layers.toArray(CudaLayer[]::new),
                parts.size(),
                () -> {
                    for (GraphPart part : parts) {
                        part.step().layer().enqueue(stream, part.step(), part.first(), part.last());
                    }
                });
    }

    private static Set<CudaLayer> layersOf(List<GraphPart> parts) {
        Set<CudaLayer> layers = Collections.newSetFromMap(new IdentityHashMap<>());
        for (GraphPart part : parts) {
            if (!(part.step() instanceof CudaStep step)) {
                throw new IllegalArgumentException(
                        "a step of another backend cannot be captured here: bind it with a CUDA"
                                + " layer");
            }
            layers.add(step.cudaLayer());
        }
        return layers;
    }

    /** Captures what {@code enqueue} enqueues on the stream and on others that join it again. */
    MoeGraph capture(long stream, CudaLayer[] layers, int parts, Runnable enqueue) {
        Set<CudaLayer> pinned = Collections.newSetFromMap(new IdentityHashMap<>());
        try {
            for (CudaLayer layer : layers) {
                layer.pin();
                pinned.add(layer);
            }
            try (Scope scope = context.enter()) {
                if (stream != 0 && context.driver().streamIsCapturing(stream)) {
                    throw new IllegalStateException(
                            "the stream is capturing already: call enqueue to add a step to your"
                                    + " own capture");
                }
            }
            return trace.capture(
                    layers.length,
                    parts,
                    watch ->
                            new CudaGraph(
                                    GraphExec.capture(context, stream, enqueue), pinned, watch),
                    CudaGraph::nodeCount);
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw refusedStream(stream, e);
        }
    }

    @Override
    public MoeLanes lanes(List<LanePart> parts) {
        Set<CudaLayer> layers =
                layersOf(LanePart.requireOrder(parts).stream().map(LanePart::part).toList());
        Set<CudaLayer> pinned = Collections.newSetFromMap(new IdentityHashMap<>());
        try {
            for (CudaLayer layer : layers) {
                layer.pin();
                pinned.add(layer);
            }
            return new CudaLanes(this, context, parts, pinned);
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw e;
        }
    }

    /** Keeps the memory while a graph uses it; {@link #unpin} undoes it. */
    void pin() {
        lock.lock();
        try {
            requirePrepared();
            graphs++;
        } finally {
            lock.unlock();
        }
    }

    /** Called when a graph that used this layer is gone. */
    void unpin() {
        lock.lock();
        try {
            graphs--;
            freeIfUnused();
        } finally {
            lock.unlock();
        }
    }

    @Override
    public void synchronize(long stream) {
        whileNotFreed(
                () -> {
                    requireOpen();
                    try (Scope scope = context.enter()) {
                        context.driver().streamSynchronize(stream);
                    }
                    return null;
                });
    }

    @Override
    public void readRouting(int rank, int[] ids, float[] weights) {
        StepInspection from = inspect(0, rank);
        int tokens = from.tokens();
        int[] allIds = from.routedIds(0, tokens);
        float[] allWeights = from.routedWeights(0, tokens);
        System.arraycopy(allIds, 0, ids, 0, allIds.length);
        System.arraycopy(allWeights, 0, weights, 0, allWeights.length);
    }

    @Override
    public StepInspection inspect(int handle, int rank) {
        return whileNotFreed(
                () -> {
                    requirePrepared();
                    if (handle < 0
                            || handle >= config.handles()
                            || rank < 0
                            || rank >= config.localRanks()) {
                        throw new IllegalArgumentException(
                                "there is no handle "
                                        + handle
                                        + " with rank "
                                        + rank
                                        + ": the layer has handles="
                                        + config.handles()
                                        + " and ranks="
                                        + config.localRanks());
                    }
                    return new CudaInspection(
                            config,
                            handles[handle],
                            config.firstLocalRank() + rank,
                            this::readDevice);
                });
    }

    private ByteBuffer readDevice(long address, int bytes) {
        return whileNotFreed(
                () -> {
                    requirePrepared();
                    ByteBuffer copy =
                            ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
                    try (Scope scope = context.enter()) {
                        context.driver().contextSynchronize();
                        if (bytes > 0) {
                            context.driver().memcpyDtoH(copy, address);
                        }
                    }
                    return copy;
                });
    }

    /** Runs something that reads the layer's memory; close waits for it. */
    private <T> T whileNotFreed(Supplier<T> reading) {
        freeing.readLock().lock();
        try {
            return reading.get();
        } finally {
            freeing.readLock().unlock();
        }
    }

    @Override
    public SoftCounters counters() {
        return whileNotFreed(this::sumCounters);
    }

    private SoftCounters sumCounters() {
        requirePrepared();
        long steps = 0;
        long dropped = 0;
        long duplicates = 0;
        long overCapacity = 0;
        long lost = 0;
        for (CudaHandle handle : handles) {
            steps += handle.steps(config.firstLocalRank());
            for (int rank = firstRank(); rank < endRank(); rank++) {
                dropped += handle.counter(rank, "dropped_ids");
                duplicates += handle.counter(rank, "duplicate_ids");
                overCapacity += handle.counter(rank, "over_capacity_tokens");
                lost += handle.counter(rank, "lost_rows");
            }
        }
        return new SoftCounters(steps, dropped, duplicates, overCapacity, lost);
    }

    @Override
    public List<PeerStatistics> peers() {
        return whileNotFreed(
                () -> {
                    requirePrepared();
                    List<PeerStatistics> all = new ArrayList<>();
                    for (int handle = 0; handle < handles.length; handle++) {
                        for (int rank = firstRank(); rank < endRank(); rank++) {
                            for (int peer = 0; peer < config.ranks(); peer++) {
                                all.add(handles[handle].statistics(handle, rank, peer));
                            }
                        }
                    }
                    return all;
                });
    }

    @Override
    public void check() {
        LayerFault fault = whileNotFreed(this::firstFault);
        if (fault == null) {
            return;
        }
        if (fault.operation().endsWith("_recv")) {
            throw new RankLostException(
                    describe(fault),
                    fault.operation(),
                    fault.rank(),
                    fault.peer(),
                    fault.epochExpected(),
                    fault.epochSeen(),
                    Duration.ofNanos(fault.waitedNs()));
        }
        throw new MoeFaultException(describe(fault));
    }

    private LayerFault firstFault() {
        requireOpen();
        for (int handle = 0; prepared && handle < handles.length; handle++) {
            int failed = -1;
            for (int rank = firstRank(); rank < endRank(); rank++) {
                int code = handles[handle].errorCode(rank);
                // why: a rank that was aborted by its peer is not the cause
                if (code != 0 && (failed < 0 || handles[handle].errorCode(failed) == PEER_ABORT)) {
                    failed = rank;
                }
            }
            if (failed >= 0) {
                LayerFault fault =
                        fault(handles[handle], failed, handles[handle].errorCode(failed));
                trace.faulted(handle, fault);
                return fault;
            }
        }
        return null;
    }

    private int firstRank() {
        return config.firstLocalRank();
    }

    private int endRank() {
        return config.firstLocalRank() + config.localRanks();
    }

    private static LayerFault fault(CudaHandle handle, int rank, int code) {
        String operation =
                switch (handle.errorInt(rank, "op")) {
                    case 1 -> "dispatch_recv";
                    case 2 -> "combine_recv";
                    case 3 -> "experts";
                    default -> "operation " + handle.errorInt(rank, "op");
                };
        String what =
                switch (code) {
                    case 1 -> "timed out";
                    case 2 -> "saw an epoch that does not fit";
                    case PEER_ABORT -> "was aborted by its peer";
                    case ITEMS_MISSING -> "waited for its own gate and up products";
                    default -> "failed with code " + code;
                };
        return new LayerFault(
                operation,
                handle.errorInt(rank, "rank"),
                handle.errorInt(rank, "peer"),
                what,
                handle.errorLong(rank, "waited_ns"),
                handle.errorLong(rank, "epoch_expected"),
                handle.errorLong(rank, "epoch_seen"),
                handle.validEpoch(rank));
    }

    private static String describe(LayerFault fault) {
        if (fault.operation().equals("experts")) {
            return String.format(
                    "experts on rank %d %s: after %.1f ms %d of an expert's %d half tiles were"
                            + " finished; the last valid epoch is %d",
                    fault.rank(),
                    fault.cause(),
                    fault.waitedNs() / 1e6,
                    fault.epochSeen(),
                    fault.epochExpected(),
                    fault.validEpoch());
        }
        return String.format(
                "%s on rank %d %s: waited %.1f ms for rank %d, epoch expected %s, seen %s; the last"
                        + " valid epoch is %s",
                fault.operation(),
                fault.rank(),
                fault.cause(),
                fault.waitedNs() / 1e6,
                fault.peer(),
                Recovery.describe(fault.epochExpected()),
                Recovery.describe(fault.epochSeen()),
                Recovery.describe(fault.validEpoch()));
    }

    /**
     * The steps of docs/protocol.md. why the flag: a graph takes no lock of the layer when it is
     * launched.
     */
    @Override
    public Recovery recover(Set<Integer> lost) {
        Set<Integer> members = membersWithout(lost);
        lock.lock();
        try {
            requirePrepared();
            recovering = true;
            try (Scope scope = context.enter()) {
                if (config.group() != null && members.size() > 1) {
                    abortMembers(members);
                }
                context.driver().contextSynchronize();
                Recovery agreed = agree(members);
                long mask = PeerMemory.maskOf(members);
                for (CudaHandle handle : handles) {
                    handle.begin(agreed.epoch(), mask);
                }
                generation = agreed.generation();
                return agreed;
            } finally {
                recovering = false;
            }
        } finally {
            lock.unlock();
        }
    }

    private Set<Integer> membersWithout(Set<Integer> lost) {
        Set<Integer> members = Group.allBut(config.ranks(), lost);
        if (members.size() != config.ranks() - lost.size()) {
            throw new IllegalArgumentException(
                    "lost=" + lost + " holds a rank outside 0.." + (config.ranks() - 1));
        }
        if (config.group() == null ? !lost.isEmpty() : !members.contains(firstRank())) {
            throw new IllegalArgumentException(
                    "lost=" + lost + " holds a rank of this layer, which cannot do without");
        }
        return members;
    }

    /**
     * Peers that still wait for this rank end at once. why only where it has no fault of its own:
     * it has told them on the device then.
     */
    private void abortMembers(Set<Integer> members) {
        try (DeviceBuffer word = new DeviceBuffer(context, 8);
                Stream stream = new Stream(context)) {
            ByteBuffer value = ByteBuffer.allocateDirect(8).order(ByteOrder.LITTLE_ENDIAN);
            upload(word.address(), value.putLong(0, generation + 1L));
            long at = layout.symmetric().offset("abort_words") + 8L * firstRank();
            for (int handle = 0; handle < handles.length; handle++) {
                boolean told = handles[handle].errorCode(firstRank()) != 0;
                for (int rank : members) {
                    if (rank != firstRank() && !told) {
                        context.driver()
                                .memcpyDtoDAsync(
                                        peers.address(handle, rank) + at,
                                        word.address(),
                                        8,
                                        stream.handle());
                    }
                }
            }
            stream.synchronize();
        }
    }

    /** Meets the other members; alone there is nobody to ask. */
    private Recovery agree(Set<Integer> members) {
        long[] valid = new long[handles.length];
        for (int handle = 0; handle < handles.length; handle++) {
            valid[handle] = lastValid(handle);
        }
        int oldest = generation;
        if (config.group() != null) {
            oldest = peers.agreeOnGeneration(generation, members, valid);
        }
        if (oldest >= LAST_GENERATION) {
            throw new IllegalStateException(
                    "the layer has recovered " + oldest + " times: close it and open a new one");
        }
        int next = oldest + 1;
        return new Recovery(
                next, members, Recovery.epochOf(next), Arrays.stream(valid).boxed().toList());
    }

    private long lastValid(int handle) {
        long epoch = Long.MAX_VALUE;
        for (int rank = firstRank(); rank < endRank(); rank++) {
            epoch = Math.min(epoch, handles[handle].validEpoch(rank));
        }
        return epoch;
    }

    @Override
    public long validEpoch(int handle) {
        return whileNotFreed(
                () -> {
                    requirePrepared();
                    return lastValid(handle);
                });
    }

    @Override
    public BackendMemory memory() {
        requireOpen();
        return memory;
    }

    /**
     * For tests: fills every buffer that a step must rewrite before it reads; flags, epochs,
     * arrival counters and totals, which live from step to step, stay.
     */
    void poison(byte value) {
        requirePrepared();
        List<String> lasting =
                List.of(
                        "dispatch_flags",
                        "combine_flags",
                        "abort_words",
                        "dispatch_lines",
                        "combine_lines",
                        "members",
                        "peer_totals",
                        "received_totals",
                        "epoch",
                        "arrivals",
                        "totals",
                        "work",
                        "expert_done");
        try (Scope scope = context.enter()) {
            context.driver().contextSynchronize();
            for (CudaHandle handle : handles) {
                for (int rank = firstRank(); rank < endRank(); rank++) {
                    for (Region.Field field : layout.symmetric().fields()) {
                        if (!lasting.contains(field.name())) {
                            context.driver()
                                    .memsetD8(
                                            handle.symmetric(rank, field.name()),
                                            value,
                                            field.bytes());
                        }
                    }
                    for (Region.Field field : layout.workspace().fields()) {
                        if (!lasting.contains(field.name())) {
                            context.driver()
                                    .memsetD8(
                                            handle.workspace(rank, field.name()),
                                            value,
                                            field.bytes());
                        }
                    }
                }
            }
            context.driver().contextSynchronize();
        }
    }

    @Override
    public void close() {
        trace.closing();
        closed = true;
        memory.refuse();
        lock.lock();
        try {
            freeIfUnused();
        } finally {
            lock.unlock();
        }
    }

    private void freeIfUnused() {
        if (closed && graphs == 0 && !freed) {
            freed = true;
            RuntimeException failure = new RuntimeException("closing the layer");
            freeOwned(failure);
            if (failure.getSuppressed().length > 0) {
                throw failure;
            }
        }
    }

    /** Number of the layer in events and ranges. */
    int number() {
        return trace.number();
    }

    /** Which handle this is. */
    int indexOf(CudaHandle handle) {
        return Arrays.asList(handles).indexOf(handle);
    }

    /** For tests: the buffers of a handle. */
    CudaHandle handle(int handle) {
        requirePrepared();
        return handles[handle];
    }

    /** For tests: where the device has some weights. */
    long weights(String buffer) {
        requirePrepared();
        return layout.weights().address(weightsBase, buffer);
    }

    /** Frees in reverse order; errors are added to {@code cause}. */
    private void freeOwned(Throwable cause) {
        freeing.writeLock().lock();
        try {
            prepared = false;
            freeAll(cause);
        } finally {
            freeing.writeLock().unlock();
        }
    }

    private void freeAll(Throwable cause) {
        List<AutoCloseable> all = new ArrayList<>();
        steps.forEach(step -> all.add(step::free));
        steps.clear();
        while (!owned.isEmpty()) {
            all.add(owned.pop());
        }
        if (closed) {
            all.add(memory);
            all.add(context);
        }
        for (AutoCloseable resource : all) {
            try {
                resource.close();
            } catch (Exception e) {
                cause.addSuppressed(e);
            }
        }
    }

    void requireOpen() {
        if (closed) {
            throw new IllegalStateException("the layer is closed: open a new one");
        }
    }

    /** For a graph of this layer, before it is launched. */
    void requireLaunchable() {
        requireOpen();
        if (recovering) {
            throw new IllegalStateException(
                    "the layer recovers from a fault: launch graphs when recover() has returned");
        }
    }

    private void requirePrepared() {
        requireOpen();
        if (!prepared) {
            throw new IllegalStateException("the layer is not prepared: call prepare() first");
        }
    }
}
