package io.moe4j.cuda;

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
import io.moe4j.Recovery;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.Kernel;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.ep.Group;
import io.moe4j.ep.PeerStatistics;
import io.moe4j.observe.LayerFault;
import io.moe4j.observe.LayerTrace;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
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
    /** What 16 bits of an epoch can tell apart. */
    private static final int LAST_GENERATION = 65_535;

    private final MoeConfig config;
    private final String reason;
    private volatile String groupNote = "";
    private final Context context;
    private final DeviceLayout layout;
    private final HandlePool pool;
    private final CudaMemory memory;
    private final LayerTrace trace;
    private final StepCapture capture;
    private final CudaResources resources;
    private final ReentrantLock lock = new ReentrantLock();

    /** Read: the layer's memory is looked at outside of a step. Write: it is being freed. */
    private final ReentrantReadWriteLock freeing = new ReentrantReadWriteLock();

    private final List<CudaStep> steps = new ArrayList<>();

    /** Of {@link #resources} since prepare; peers is null without a group. */
    private CudaHandle[] handles;

    private PeerMemory peers;
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
        this.layout = new DeviceLayout(config);
        this.memory = new CudaMemory(context);
        this.trace = LayerTrace.open(this);
        this.capture = new StepCapture(context, trace);
        this.resources = new CudaResources(this, context, catalog, layout);
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
        return reason + groupNote;
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
                trace.prepare(() -> resources.open(progress));
            } catch (CudaException e) {
                freeOwned(e);
                throw e.inCapture() ? StepCapture.refusedInCapture("prepare", e) : e;
            } catch (RuntimeException | Error e) {
                freeOwned(e);
                throw e;
            }
            handles = resources.handles();
            peers = resources.peers();
            groupNote = resources.groupNote();
            generation = 0;
            prepared = true;
        } finally {
            lock.unlock();
        }
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
            // why relaxed: some runtimes tell their addresses only while they capture
            try (Scope scope = context.enter();
                    Scope relaxed = context.driver().relaxCapture()) {
                BoundMemory.validate(ranks, config, context);
                CudaStep step =
                        resources.packer().pack(ranks, handles[handle], resources.weights());
                steps.add(step);
                return step;
            }
        } catch (CudaException e) {
            throw e.inCapture() ? StepCapture.refusedInCapture("bind", e) : e;
        } finally {
            lock.unlock();
        }
    }

    /** Asks the driver again, for {@link BoundStep#requireAlive}. */
    void requireAlive(List<StepTensors> ranks) {
        whileNotFreed(
                () -> {
                    requirePrepared();
                    try (Scope scope = context.enter();
                            Scope relaxed = context.driver().relaxCapture()) {
                        BoundMemory.requireAlive(ranks, context);
                    }
                    return null;
                });
    }

    /**
     * For benches: a step on the same buffers with the weights of another layer of this
     * configuration, which must stay open as long.
     */
    CudaStep withWeightsOf(CudaStep step, CudaLayer other) {
        requirePrepared();
        other.requirePrepared();
        CudaStep twin =
                resources.packer().pack(step.tensors(), step.handle(), other.resources.weights());
        steps.add(twin);
        return twin;
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
            requireStreamOfItsOwn(stream);
            StepFlow.requireNext(cudaStep, first, last);
            try (Scope scope = context.enter()) {
                resources.flow().launch(stream, cudaStep, first, last);
                trace.enqueued();
            } catch (RuntimeException | Error e) {
                StepFlow.giveUp(cudaStep); // why: a failed step is over
                throw capture.refusedStream(stream, e);
            }
        } finally {
            lock.unlock();
        }
    }

    private void requireStreamOfItsOwn(long stream) {
        if (stream == 0 && peers != null && peers.sharing() > 1) {
            throw new IllegalArgumentException(
                    "stream=0 is one stream for all ranks of the GPU, which wait for each other:"
                            + " enqueue each on a stream of its own");
        }
    }

    /** For benches: the kernels of the experts phase, in order. */
    List<String> expertSymbols() {
        return expertSymbols(CudaProbe.Part.CHAIN);
    }

    /** For benches: the kernels of a part of the experts phase, in order. */
    List<String> expertSymbols(CudaProbe.Part part) {
        requirePrepared();
        return Arrays.stream(resources.flow().experts(part)).map(Kernel::symbol).toList();
    }

    /**
     * For benches: launches the experts phase, or one of its products, on rows that an earlier step
     * left in the buffers; as often as wanted and outside the order of phases.
     */
    void launchExperts(long stream, CudaStep step, CudaProbe.Part part) {
        requirePrepared();
        try (Scope scope = context.enter()) {
            resources.flow().launchExperts(stream, step, part);
        }
    }

    /** For benches: launches phases of a step outside their order, as often as wanted. */
    void launchAgain(long stream, CudaStep step, Phase first, Phase last) {
        requirePrepared();
        try (Scope scope = context.enter()) {
            resources.flow().launch(stream, step, first, last);
        }
    }

    @Override
    public MoeGraph capture(long stream, List<GraphPart> parts) {
        return capture.graph(stream, parts);
    }

    @Override
    public MoeLanes lanes(List<LanePart> parts) {
        return capture.lanes(parts);
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
                    CudaInspection.requireThere(config, handle, rank);
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
        throw Faults.exception(fault);
    }

    private LayerFault firstFault() {
        requireOpen();
        for (int handle = 0; prepared && handle < handles.length; handle++) {
            LayerFault fault = Faults.first(handles[handle], firstRank(), endRank());
            if (fault != null) {
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
            word.upload(value.putLong(0, generation + 1L));
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

    /** For tests: {@link CudaHandle#poison} of every handle. */
    void poison(byte value) {
        requirePrepared();
        try (Scope scope = context.enter()) {
            context.driver().contextSynchronize();
            for (CudaHandle handle : handles) {
                handle.poison(value);
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
        return layout.weights().address(resources.weights(), buffer);
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
        Owned all = new Owned();
        if (closed) {
            all.add(context);
            all.add(memory);
        }
        all.add(() -> resources.free(cause));
        steps.forEach(step -> all.add(step::free));
        steps.clear();
        all.close(cause);
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
