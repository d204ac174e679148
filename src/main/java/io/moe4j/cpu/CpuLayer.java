package io.moe4j.cpu;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HandlePool;
import io.moe4j.LanePart;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.observe.LayerTrace;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.Collections;
import java.util.IdentityHashMap;
import java.util.List;
import java.util.Set;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.locks.ReentrantLock;

/**
 * A layer over R virtual ranks on the CPU. {@code enqueue} computes in the calling thread and the
 * layer's workers and returns when the output is written. A phase runs on all ranks before the next
 * phase begins, so every send precedes every wait.
 */
final class CpuLayer implements MoeLayer {
    private final MoeConfig config;
    private final String reason;
    private final ReentrantLock stepLock = new ReentrantLock();
    private final AtomicLong droppedIds = new AtomicLong();
    private final AtomicLong duplicateIds = new AtomicLong();
    private final AtomicLong overCapacityTokens = new AtomicLong();
    private final HandlePool pool;
    private final LayerTrace trace;
    private volatile long stepsDone;
    private volatile boolean closed;
    private volatile State state;

    CpuLayer(MoeConfig config, String reason) {
        this.config = config;
        this.reason = reason;
        this.pool = new HandlePool(config.handles());
        CpuMemoryPlan.maxPackedRows(config); // why: refuse sizes we cannot index before any work
        this.trace = LayerTrace.open(this);
    }

    /** All that prepare allocates; dropped as a whole by close. */
    private static final class State {
        CpuWorkers workers;
        CpuMaskedGemm gemm;
        CpuRouter router;
        float[] correctionBias;
        CpuExpert[][] experts;
        CpuExpert shared;
        float[] sharedGate;
        Handle[] handles;
        RowBuffer activated;
        ThreadLocal<RouterScratch> routerScratch;
        ThreadLocal<float[]> row;
    }

    /** The buffers and the epoch of one step in flight. */
    private static final class Handle {
        final CpuRank[] ranks;
        long epoch;
        volatile long validEpoch;
        CpuStep stepInFlight;
        Phase nextPhase = Phase.ROUTE;

        Handle(MoeConfig config) {
            ranks = new CpuRank[config.ranks()];
            for (int rank = 0; rank < ranks.length; rank++) {
                ranks[rank] = new CpuRank(config, rank);
            }
        }
    }

    private record RouterScratch(CpuRouterTopK topK, float[] logits, double[] sums) {}

    private record CpuStep(CpuLayer layer, StepTensors[] ranks, int handle) implements BoundStep {
        @Override
        public int handleIndex() {
            return handle;
        }

        @Override
        public List<StepTensors> tensors() {
            return List.of(ranks);
        }

        @Override
        public void requireAlive() {
            layer.requireOpen();
        }
    }

    @Override
    public MoeConfig config() {
        return config;
    }

    @Override
    public String backend() {
        return "cpu";
    }

    @Override
    public String backendReason() {
        return reason;
    }

    @Override
    public MemoryPlan plan() {
        return CpuMemoryPlan.of(config);
    }

    @Override
    public void prepare() {
        prepare(ProgressListener.NONE);
    }

    @Override
    public void prepare(ProgressListener progress) {
        stepLock.lock();
        try {
            requireOpen();
            if (state == null) {
                trace.prepare(() -> state = prepared(progress));
            }
        } finally {
            stepLock.unlock();
        }
    }

    private State prepared(ProgressListener progress) {
        State fresh = new State();
        fresh.workers = new CpuWorkers(config.threads());
        try {
            allocate(fresh);
            packWeights(fresh, progress);
        } catch (RuntimeException | Error e) {
            fresh.workers.close();
            throw e;
        }
        return fresh;
    }

    private void allocate(State s) {
        s.gemm = new CpuMaskedGemm(config, s.workers);
        s.handles = new Handle[config.handles()];
        for (int handle = 0; handle < s.handles.length; handle++) {
            s.handles[handle] = new Handle(config);
        }
        s.activated =
                new RowBuffer(CpuMemoryPlan.maxPackedRows(config), config.shape().intermediate());
        int hidden = config.shape().hidden();
        s.row = ThreadLocal.withInitial(() -> new float[hidden]);
    }

    private void packWeights(State s, ProgressListener progress) {
        LayerWeights weights = config.weights();
        int experts = config.shape().experts();
        int matrix = Math.multiplyExact(config.shape().intermediate(), config.shape().hidden());
        ThreadLocal<float[]> scratch = ThreadLocal.withInitial(() -> new float[matrix]);
        s.experts = new CpuExpert[config.ranks()][];
        for (int rank = 0; rank < config.ranks(); rank++) {
            s.experts[rank] = new CpuExpert[config.expertsOn(rank)];
        }
        AtomicLong done = new AtomicLong();
        s.workers.forEach(
                experts,
                e -> {
                    s.experts[config.rankOf(e)][e % config.expertsPerRank()] =
                            CpuExpert.pack(weights.expert(e), scratch.get());
                    progress.progress(done.incrementAndGet(), experts);
                });
        if (config.routingInput() == RoutingInput.HIDDEN) {
            s.router = new CpuRouter(weights.router(), weights.routerBias());
        }
        if (config.routingInput() != RoutingInput.TOPK) {
            s.correctionBias = weights.correctionBias();
            int e = config.shape().experts();
            int k = config.shape().topK();
            float[] correction = s.correctionBias;
            s.routerScratch =
                    ThreadLocal.withInitial(
                            () ->
                                    new RouterScratch(
                                            new CpuRouterTopK(config.rule(), correction, e, k),
                                            new float[e],
                                            new double[e]));
        }
        if (config.usesSharedExpert()) {
            ExpertWeights shared = weights.sharedExpert();
            s.shared =
                    CpuExpert.pack(
                            shared,
                            new float
                                    [Math.multiplyExact(
                                            shared.gate().rows(), shared.gate().cols())]);
            s.sharedGate = weights.sharedExpertGate();
        }
    }

    @Override
    public HandlePool handles() {
        return pool;
    }

    @Override
    public BoundStep bind(List<StepTensors> ranks, int handle) {
        requirePrepared();
        if (handle < 0 || handle >= config.handles()) {
            throw new IllegalArgumentException(
                    "handle="
                            + handle
                            + " is outside 0.."
                            + (config.handles() - 1)
                            + ": open the layer with more handles(...)");
        }
        if (ranks.size() != config.ranks()) {
            throw new IllegalArgumentException(
                    "got the tensors of "
                            + ranks.size()
                            + " ranks but the layer has ranks="
                            + config.ranks()
                            + ": give one StepTensors per rank");
        }
        for (int rank = 0; rank < ranks.size(); rank++) {
            StepTensors tensors = ranks.get(rank);
            try {
                tensors.validate(config);
                requireHost("hidden", tensors.hidden());
                requireHost("tokenCount", tensors.tokenCount());
                requireHost("topkIds", tensors.topkIds());
                requireHost("topkWeights", tensors.topkWeights());
                requireHost("routerLogits", tensors.routerLogits());
                requireHost("out", tensors.out());
            } catch (IllegalArgumentException e) {
                throw new IllegalArgumentException("rank " + rank + ": " + e.getMessage(), e);
            }
        }
        return new CpuStep(this, ranks.toArray(StepTensors[]::new), handle);
    }

    private static void requireHost(String name, Tensor tensor) {
        if (tensor != null && !tensor.isHost()) {
            throw new IllegalArgumentException(
                    name
                            + " is device memory but the CPU backend reads host memory: use"
                            + " Tensor.host or layer.memory().allocate");
        }
    }

    @Override
    public void enqueue(long stream, BoundStep step, Phase first, Phase last) {
        if (!(step instanceof CpuStep cpuStep) || cpuStep.layer != this) {
            throw new IllegalArgumentException(
                    "the step was bound by another layer: bind it with this one");
        }
        if (!stepLock.tryLock()) {
            throw new IllegalStateException(
                    "another thread is enqueueing on this layer: one step at a time");
        }
        try {
            State s = requirePrepared();
            Handle handle = s.handles[cpuStep.handle];
            if (first.compareTo(last) > 0) {
                throw new IllegalArgumentException("phase " + first + " comes after " + last);
            }
            if (first != handle.nextPhase
                    || (first != Phase.ROUTE && handle.stepInFlight != cpuStep)) {
                throw new IllegalStateException(
                        "phase "
                                + first
                                + " cannot run now: the next phase of this handle is "
                                + handle.nextPhase
                                + (handle.stepInFlight == null || handle.stepInFlight == cpuStep
                                        ? ""
                                        : " of another step"));
            }
            handle.stepInFlight = cpuStep;
            try {
                for (int phase = first.ordinal(); phase <= last.ordinal(); phase++) {
                    run(s, handle, cpuStep, Phase.values()[phase]);
                    handle.nextPhase = Phase.values()[(phase + 1) % Phase.values().length];
                }
                trace.enqueued();
            } catch (RuntimeException | Error e) {
                if (e instanceof MissingFlag missing) {
                    trace.faulted(cpuStep.handle, missing.fault(handle.validEpoch));
                }
                handle.nextPhase =
                        Phase.ROUTE; // why: a failed step is over, the next one starts anew
                handle.stepInFlight = null;
                throw e;
            }
        } finally {
            stepLock.unlock();
        }
    }

    private void run(State s, Handle handle, CpuStep step, Phase phase) {
        switch (phase) {
            case ROUTE -> route(s, handle, step);
            case DISPATCH_SEND ->
                    s.workers.forEach(
                            config.ranks(),
                            r ->
                                    CpuDispatch.send(
                                            handle.ranks, handle.ranks[r], config, handle.epoch));
            case DISPATCH_RECV ->
                    s.workers.forEach(
                            config.ranks(),
                            r -> CpuDispatch.receive(handle.ranks[r], config, handle.epoch));
            case EXPERTS -> {
                for (CpuRank rank : handle.ranks) {
                    s.gemm.gateUp(s.activated, rank, s.experts[rank.rank]);
                    s.gemm.down(rank, s.activated, s.experts[rank.rank]);
                }
            }
            case COMBINE_SEND ->
                    s.workers.forEach(
                            config.ranks(),
                            r ->
                                    CpuCombine.send(
                                            handle.ranks, handle.ranks[r], config, handle.epoch));
            case COMBINE_RECV -> combine(s, handle, step);
            default -> throw new IllegalArgumentException("phase " + phase);
        }
    }

    private void route(State s, Handle handle, CpuStep step) {
        handle.epoch++;
        for (CpuRank rank : handle.ranks) {
            StepTensors tensors = step.ranks[rank.rank];
            rank.tokens = clampTokens(tensors.tokenCount().getInt(0));
            s.workers.forEach(rank.tokens, token -> routeToken(s, tensors, rank, token));
        }
    }

    private int clampTokens(int asked) {
        int m = config.maxTokensPerRank();
        if (asked > m) {
            overCapacityTokens.addAndGet(asked - m);
        }
        return Math.max(0, Math.min(asked, m));
    }

    private void routeToken(State s, StepTensors tensors, CpuRank rank, int token) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int experts = config.shape().experts();
        int at = token * k;
        tensors.hidden().readFloats((long) token * h, rank.homeRows, token * h, h);
        switch (config.routingInput()) {
            case TOPK -> {
                for (int i = at; i < at + k; i++) {
                    rank.topkIds[i] = tensors.topkIds().getInt(i);
                    rank.topkWeights[i] = tensors.topkWeights().getFloat(i);
                }
            }
            case LOGITS -> {
                RouterScratch scratch = s.routerScratch.get();
                tensors.routerLogits()
                        .readFloats((long) token * experts, scratch.logits, 0, experts);
                scratch.topK.select(rank.topkIds, rank.topkWeights, at, scratch.logits, 0);
            }
            case HIDDEN -> {
                RouterScratch scratch = s.routerScratch.get();
                s.router.logits(scratch.logits, scratch.sums, rank.homeRows, token * h);
                scratch.topK.select(rank.topkIds, rank.topkWeights, at, scratch.logits, 0);
            }
            default -> throw new IllegalArgumentException("input " + config.routingInput());
        }
        sanitise(rank.topkIds, at, k, experts);
    }

    private void sanitise(int[] ids, int at, int k, int experts) {
        for (int i = at; i < at + k; i++) {
            if (ids[i] < 0 || ids[i] >= experts) {
                if (ids[i] != -1) {
                    droppedIds.incrementAndGet();
                }
                ids[i] = -1;
                continue;
            }
            for (int j = at; j < i; j++) {
                if (ids[j] == ids[i]) {
                    duplicateIds.incrementAndGet();
                    break;
                }
            }
        }
    }

    private void combine(State s, Handle handle, CpuStep step) {
        for (CpuRank rank : handle.ranks) {
            CpuDispatch.requireFlags("combine_recv", rank.rank, rank.combineFlags, handle.epoch);
            float[] scale = null;
            if (s.shared != null) {
                s.gemm.shared(rank, s.shared);
                scale = sharedScale(s, rank);
            }
            float[] sharedScale = scale;
            StepTensors tensors = step.ranks[rank.rank];
            s.workers.forEach(
                    rank.tokens,
                    token ->
                            CpuCombine.receive(
                                    tensors.out(),
                                    tensors.accumulate(),
                                    rank,
                                    token,
                                    config,
                                    sharedScale,
                                    s.row.get()));
        }
        stepsDone++;
        handle.validEpoch = handle.epoch;
        handle.stepInFlight = null;
    }

    private float[] sharedScale(State s, CpuRank rank) {
        if (s.sharedGate == null) {
            return null;
        }
        float[] scale = new float[rank.tokens];
        for (int token = 0; token < scale.length; token++) {
            double sum = 0;
            for (int j = 0; j < s.sharedGate.length; j++) {
                sum += (double) s.sharedGate[j] * rank.homeRows[token * s.sharedGate.length + j];
            }
            scale[token] = CpuSwiGlu.sigmoid((float) sum);
        }
        return scale;
    }

    @Override
    public MoeGraph capture(long stream, List<GraphPart> parts) {
        int layers = requireOwn(parts);
        return trace.capture(
                layers, parts.size(), watch -> new CpuGraph(parts, watch), CpuGraph::nodeCount);
    }

    /** Number of layers the parts belong to, all prepared ones of this backend. */
    private static int requireOwn(List<GraphPart> parts) {
        Set<CpuLayer> layers = Collections.newSetFromMap(new IdentityHashMap<>());
        for (GraphPart part : parts) {
            if (!(part.step() instanceof CpuStep step)) {
                throw new IllegalArgumentException(
                        "a step of another backend cannot be captured here: bind it with a CPU layer");
            }
            step.layer.requirePrepared();
            layers.add(step.layer);
        }
        return layers.size();
    }

    @Override
    public MoeLanes lanes(List<LanePart> parts) {
        List<GraphPart> inOrder =
                LanePart.requireOrder(parts).stream().map(LanePart::part).toList();
        requireOwn(inOrder);
        return new CpuLanes(this, inOrder);
    }

    @Override
    public void synchronize(long stream) {
        requireOpen();
    }

    @Override
    public void readRouting(int rank, int[] ids, float[] weights) {
        CpuRank from = requirePrepared().handles[0].ranks[rank];
        int count = from.tokens * config.shape().topK();
        System.arraycopy(from.topkIds, 0, ids, 0, count);
        System.arraycopy(from.topkWeights, 0, weights, 0, count);
    }

    @Override
    public StepInspection inspect(int handle, int rank) {
        requirePrepared();
        if (handle < 0 || handle >= config.handles() || rank < 0 || rank >= config.ranks()) {
            throw new IllegalArgumentException(
                    "there is no handle "
                            + handle
                            + " with rank "
                            + rank
                            + ": the layer has handles="
                            + config.handles()
                            + " and ranks="
                            + config.ranks());
        }
        return new CpuInspection(
                config,
                () -> requirePrepared().handles[handle].ranks[rank],
                (to, firstRow, count) -> activatedRows(to, handle, rank, firstRow, count));
    }

    /** Computed anew, because all ranks share the buffer a step writes. */
    private void activatedRows(float[] to, int handle, int rank, int firstRow, int count) {
        stepLock.lock();
        try {
            State s = requirePrepared();
            s.gemm.gateUpRows(to, s.handles[handle].ranks[rank], s.experts[rank], firstRow, count);
        } finally {
            stepLock.unlock();
        }
    }

    @Override
    public SoftCounters counters() {
        return new SoftCounters(
                stepsDone, droppedIds.get(), duplicateIds.get(), overCapacityTokens.get(), 0);
    }

    @Override
    public void check() {
        requireOpen();
    }

    @Override
    public long validEpoch(int handle) {
        return requirePrepared().handles[handle].validEpoch;
    }

    @Override
    public BackendMemory memory() {
        requireOpen();
        return HostMemory.INSTANCE;
    }

    @Override
    public void close() {
        trace.closing();
        closed = true;
        stepLock.lock(); // why: a step that is running finishes before its buffers go
        try {
            if (state != null) {
                state.workers.close();
                state = null;
            }
        } finally {
            stepLock.unlock();
        }
    }

    /** For tests: overwrites all scratch memory a step must not depend on. */
    void poison(float value, int count) {
        State s = requirePrepared();
        s.activated.fill(value);
        for (CpuRank rank : s.handles[0].ranks) {
            rank.expertOut.fill(value);
            java.util.Arrays.fill(rank.homeRows, value);
            java.util.Arrays.fill(rank.topkIds, count);
            java.util.Arrays.fill(rank.topkWeights, value);
            java.util.Arrays.fill(rank.expertRows, count);
            java.util.Arrays.fill(rank.packedRowOf, count);
            java.util.Arrays.fill(rank.expertCounts, count);
            java.util.Arrays.fill(rank.expertOffsets, count);
            for (int peer = 0; peer < config.ranks(); peer++) {
                java.util.Arrays.fill(rank.recvRows[peer], value);
                java.util.Arrays.fill(rank.recvWeights[peer], value);
                java.util.Arrays.fill(rank.recvIds[peer], count);
                java.util.Arrays.fill(rank.combineRows[peer], value);
            }
        }
    }

    /** For tests: the buffers of a rank. */
    CpuRank rank(int rank) {
        return requirePrepared().handles[0].ranks[rank];
    }

    private State requirePrepared() {
        requireOpen();
        State s = state;
        if (s == null) {
            throw new IllegalStateException("the layer is not prepared: call prepare() first");
        }
        return s;
    }

    private void requireOpen() {
        if (closed) {
            throw new IllegalStateException("the layer is closed: open a new one");
        }
    }

    /** Host memory needs no layer: buffers are direct and freed by the garbage collector. */
    private enum HostMemory implements BackendMemory {
        INSTANCE;

        @Override
        public Tensor allocate(DType dtype, long... shape) {
            return Tensor.allocateHost(dtype, shape);
        }

        @Override
        public void write(Tensor to, Tensor fromHost) {
            copy(to, fromHost);
        }

        @Override
        public void read(Tensor toHost, Tensor from) {
            copy(toHost, from);
        }

        private static void copy(Tensor to, Tensor from) {
            if (to.dtype() != from.dtype() || to.bytes() != from.bytes()) {
                throw new IllegalArgumentException(
                        "cannot copy " + from + " to " + to + ": type and size must be equal");
            }
            to.buffer().put(from.buffer().limit((int) from.bytes()));
        }
    }
}
