package io.moe4j;

import io.moe4j.ep.PeerStatistics;
import java.util.List;
import java.util.Set;

/**
 * One Mixture-of-Experts layer over R ranks, opened by {@link Moe#open}. The layer owns its
 * workspace and its packed weights; the caller owns hidden states, routing, token counts and
 * output.
 *
 * <p>Life cycle: {@link #plan} (nothing allocated yet) → {@link #prepare} (allocates everything) →
 * {@link #bind} (validates the caller's memory) → {@link #enqueue}, any number of times → {@link
 * #close}.
 *
 * <p>Threads: {@code enqueue} by one thread at a time; a second one is refused, not kept waiting.
 * {@code prepare} and {@code bind} by any thread, one after the other. Everything else may be
 * called by any thread while steps run, {@code close} included. On CUDA the calling thread needs no
 * context: the layer enters its own and restores what was current.
 *
 * <p>Streams: steps of a layer that share a handle are ordered by the stream they are enqueued on,
 * or by events between streams. Streams are raw CUstream handles of the layer's context, which the
 * caller owns; the CPU backend has none and takes 0.
 *
 * <p>Errors: misuse throws {@code IllegalArgumentException} or {@code IllegalStateException}, which
 * change nothing; after {@code close} what needs the layer's memory throws {@code
 * IllegalStateException}. A call of the driver that fails throws the backend's own exception. What
 * fails on the device later is told by {@link #check} and {@link #result}.
 */
public interface MoeLayer extends AutoCloseable {
    /** {@return the configuration the layer was opened with} */
    MoeConfig config();

    /** {@return the name of the backend: {@code cpu} or {@code cuda}} */
    String backend();

    /** {@return one line that says why this backend was chosen and what it runs on} */
    String backendReason();

    /** {@return what {@link #prepare} allocates; available before it is called} */
    MemoryPlan plan();

    /**
     * Allocates all buffers of the plan and packs the weights. Idempotent; takes as long as reading
     * the weights takes.
     *
     * @throws IllegalStateException after close
     * @throws OutOfMemoryError or a backend's own failure, with nothing left allocated
     */
    void prepare();

    /**
     * As {@link #prepare()}, reporting each expert as its weights are packed.
     *
     * @param progress is told done and total experts, by the threads that pack
     * @throws IllegalStateException after close
     * @throws OutOfMemoryError or a backend's own failure, with nothing left allocated
     */
    void prepare(ProgressListener progress);

    /**
     * {@return the pool that hands out this layer's handles to users that keep several steps in
     * flight}
     */
    HandlePool handles();

    /**
     * As {@link #bind(List, int)} with handle 0.
     *
     * @param ranks one element per local rank, in rank order
     * @return the step, valid until the layer is closed
     * @throws IllegalArgumentException if the tensors do not fit; names the tensor and the cure
     * @throws IllegalStateException before prepare or after close
     */
    default BoundStep bind(List<StepTensors> ranks) {
        return bind(ranks, 0);
    }

    /**
     * Validates the tensors of all local ranks and binds them to this layer and one of its handles.
     * Steps that share a handle must be ordered by their stream; steps that are in flight together
     * (two micro-batches, say) need different handles.
     *
     * <p>Allocates a little and waits for a small copy, so it is not for a step. Yet it may be
     * called while the calling thread captures a stream, for runtimes that tell their addresses
     * only then; nothing of it becomes part of the graph.
     *
     * @param ranks one element per local rank, in rank order
     * @param handle 0 to {@code config().handles() − 1}: which set of buffers and epochs to use
     * @return the step, valid until the layer is closed; the caller keeps the tensors' memory alive
     *     and in place
     * @throws IllegalArgumentException if the number of ranks, a dtype, a shape or the kind of
     *     memory does not fit; names the tensor and the cure
     * @throws IllegalStateException before prepare or after close
     */
    BoundStep bind(List<StepTensors> ranks, int handle);

    /**
     * Runs all phases of a step. On CUDA the call only enqueues work on {@code stream} and returns;
     * on the CPU backend it computes and returns when the output is written.
     *
     * @param stream a CUstream handle the caller owns; 0 on the CPU backend
     * @param step bound by this layer
     * @throws IllegalArgumentException if another layer bound the step, or the stream is not of the
     *     layer's context
     * @throws IllegalStateException after close, before prepare, or while another step of this
     *     layer is being enqueued
     */
    default void enqueue(long stream, BoundStep step) {
        enqueue(stream, step, Phase.ROUTE, Phase.COMBINE_RECV);
    }

    /**
     * Runs the phases from {@code first} to {@code last}, both included. A step's phases must be
     * enqueued in order and completely before the next step of its handle begins.
     *
     * @param stream a CUstream handle the caller owns; 0 on the CPU backend
     * @param step bound by this layer
     * @param first first phase to run
     * @param last last phase to run
     * @throws IllegalArgumentException if another layer bound the step, the stream is not of the
     *     layer's context, or {@code first} comes after {@code last}
     * @throws IllegalStateException after close, before prepare, while another thread enqueues, or
     *     if {@code first} does not follow the phase enqueued last
     */
    void enqueue(long stream, BoundStep step, Phase first, Phase last);

    /**
     * Captures phases of one or several steps as a graph, without running them. The steps may
     * belong to several layers of this backend; the order of the parts is the order of execution.
     *
     * @param stream a CUstream handle that is not capturing (not the legacy default stream); 0 on
     *     the CPU backend
     * @param parts in the order they are to run
     * @return the graph, which the caller closes; it keeps the layers' memory until then
     * @throws IllegalArgumentException if there is no part, or a step belongs to another backend
     * @throws IllegalStateException if a layer is closed or a capture is already under way
     */
    MoeGraph capture(long stream, List<GraphPart> parts);

    /**
     * Captures one whole step.
     *
     * @param stream a CUstream handle that is not capturing; 0 on the CPU backend
     * @param step bound by this layer
     * @return the graph, which the caller closes; it keeps the layer's memory until then
     * @throws IllegalArgumentException if the step belongs to another backend
     * @throws IllegalStateException if the layer is closed or a capture is already under way
     */
    default MoeGraph capture(long stream, BoundStep step) {
        return capture(stream, List.of(GraphPart.whole(step)));
    }

    /**
     * Prepares a schedule of phases on several streams, so that parts of different steps run at the
     * same time. The steps may belong to several layers of this backend; steps in flight together
     * have different handles. The CPU backend runs the parts one after the other.
     *
     * <p>Over several GPUs all ranks need the same schedule, and no part may wait for a peer that
     * comes to the matching send only after something that waits for this rank; {@code
     * io.moe4j.overlap} has schedules for which that is shown. Allocates streams and events; not
     * for a step.
     *
     * @param parts in the order they are to be enqueued, which must be one in which they could run
     *     one after the other
     * @return the schedule, which the caller closes; it keeps the layers' memory until then
     * @throws IllegalArgumentException if there is no part, one waits for a later one, or a step
     *     belongs to another backend
     * @throws IllegalStateException if a layer is closed or not prepared
     */
    MoeLanes lanes(List<LanePart> parts);

    /**
     * Waits until everything enqueued on {@code stream} is done (debugging and tools only).
     *
     * @param stream a CUstream handle; 0 for the default stream and on the CPU backend
     * @throws IllegalStateException after close
     */
    void synchronize(long stream);

    /**
     * Debug: copies the routing the last step of handle 0 used, after sanitising, in the order the
     * layer sums it. Waits for the device; not for use in a step. {@link #inspect} reads any
     * handle.
     *
     * @param rank local rank
     * @param ids destination, [M, K]; −1 for an id that was dropped; rows from T on stay untouched
     * @param weights destination, [M, K]
     * @throws IllegalStateException before prepare or after close
     */
    void readRouting(int rank, int[] ids, float[] weights);

    /**
     * Debug: host copies of one rank's stage outputs. Waits for the device; not for use in a step.
     *
     * @param handle 0 to {@code config().handles() − 1}
     * @param rank local rank
     * @return what the stages wrote, valid until the next phase of that handle is enqueued
     * @throws IllegalArgumentException if there is no such handle or rank
     * @throws IllegalStateException before prepare or after close, also from the methods of what is
     *     returned
     */
    StepInspection inspect(int handle, int rank);

    /** {@return counts of tolerated input} Reads host memory only, never waits for a device. */
    SoftCounters counters();

    /**
     * {@return what every local rank received from each rank of the group and how long it waited,
     * handle by handle; empty on backends without waits} Reads host memory only.
     *
     * @throws IllegalStateException before prepare or after close
     */
    default List<PeerStatistics> peers() {
        return List.of();
    }

    /**
     * As {@link #recover(Set)} with all ranks.
     *
     * @return what the ranks agreed on
     */
    default Recovery recover() {
        return recover(Set.of());
    }

    /**
     * Begins a new generation after a fault: waits for the device, meets the other members, and
     * makes every handle ready for its first step; graphs captured before go on. All members call
     * it, each on a thread of its own ({@link io.moe4j.ep.Group#together}), while nobody enqueues
     * or launches graphs. Steps whose output was not valid are not repeated.
     *
     * @param lost ranks to leave out: no row goes to their experts, which contribute nothing, and
     *     nobody waits for them. A rank left out comes back by a later recovery in which it takes
     *     part
     * @return what the ranks agreed on
     * @throws io.moe4j.ep.GroupException if a member did not come; the layer stays as it is, and
     *     the call may be repeated
     * @throws IllegalArgumentException if {@code lost} holds this rank or no rank of the group
     * @throws IllegalStateException before prepare or after close, or if there were too many
     *     generations
     * @throws UnsupportedOperationException on backends whose faults cannot be recovered from
     */
    default Recovery recover(Set<Integer> lost) {
        throw new UnsupportedOperationException(
                "the " + backend() + " backend cannot recover: close the layer and open a new one");
    }

    /**
     * Throws if a step failed. A fault stays: every later call throws too, until the layer {@link
     * #recover recovers} or is closed. Reads host memory only; it is not a sync.
     *
     * @throws RankLostException if a wait between ranks failed
     * @throws MoeFaultException naming the operation, the rank and the epoch
     * @throws IllegalStateException after close
     */
    void check();

    /**
     * {@return the number of the last step of a handle that is valid; steps of a handle are
     * numbered from 1, or after a recovery from its {@link Recovery#epoch} + 1, in the order they
     * are enqueued} Exact once the caller has waited for the stream of the steps it asks about.
     * Reads host memory only; it is not a sync: while a step runs, its number may show before its
     * output is complete, and go away if it fails.
     *
     * @param handle 0 to {@code config().handles() − 1}
     * @throws IllegalStateException before prepare or after close
     */
    long validEpoch(int handle);

    /**
     * Confirms that a step's output is valid. The caller has waited for the step's stream (or an
     * event behind it) before.
     *
     * @param handle the step's handle
     * @param epoch the step's number on that handle, from 1
     * @throws MoeFaultException if the step did not produce a valid output, with the reason
     */
    default void result(int handle, long epoch) {
        check();
        long valid = validEpoch(handle);
        if (valid < epoch) {
            throw new MoeFaultException(
                    "step "
                            + epoch
                            + " of handle "
                            + handle
                            + " has no valid output: the last valid one is "
                            + valid
                            + "; wait for the stream before asking");
        }
    }

    /**
     * {@return allocation and copies in the memory this layer's backend uses} For small programs
     * and tools.
     *
     * @throws IllegalStateException after close
     */
    BackendMemory memory();

    /**
     * Frees everything the layer owns, once no step is being enqueued and no graph of it is left.
     * Waits for the device where it frees. Idempotent; may be called by any thread; later calls
     * that need its memory throw.
     */
    @Override
    void close();
}
