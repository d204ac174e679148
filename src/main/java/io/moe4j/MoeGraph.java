package io.moe4j;

/**
 * Steps (or phases of steps) captured once and replayed with any number of tokens and any routing:
 * token counts, ids, weights and hidden states are read from the bound memory at every replay. On
 * CUDA this is an executable CUDA graph; on the CPU backend a replay runs the same phases.
 *
 * <p>A graph pins the layers it was captured from: a layer that is closed while graphs exist
 * refuses further work at once, but its memory is freed only when the last of them is closed. Made
 * by {@link MoeLayer#capture}; one thread launches at a time; {@link #close} may be called from any
 * thread.
 */
public interface MoeGraph extends AutoCloseable {
    /**
     * Replays the graph on {@code stream}. On CUDA the call returns at once.
     *
     * @param stream a CUstream handle the caller owns; 0 on the CPU backend
     * @throws IllegalStateException after close of the graph or of a layer it was captured from
     */
    void launch(long stream);

    /** {@return the number of nodes: kernels on CUDA, phases on the CPU backend} */
    long nodeCount();

    /** Frees the graph, after the replays in flight. Idempotent. */
    @Override
    void close();
}
