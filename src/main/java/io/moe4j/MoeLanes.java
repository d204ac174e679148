package io.moe4j;

/**
 * A schedule of phases on several streams, ready to be enqueued any number of times. Made by {@link
 * MoeLayer#lanes}. Owns the streams of its lanes but the first, and the events between them; keeps
 * its layers' memory until it is closed, as a graph does. One thread enqueues or captures at a
 * time; {@link #close} may be called from any thread.
 */
public interface MoeLanes extends AutoCloseable {
    /**
     * Enqueues all parts. They run after what is on {@code stream} now, and what is enqueued on it
     * later runs after them all. Legal in a capture of the caller's own: the lanes become branches
     * of its graph.
     *
     * @param stream a CUstream handle the caller owns, lane 0; 0 on the CPU backend
     * @throws IllegalStateException after close of this or of a layer, while a layer is being
     *     enqueued by another thread, or if a part is not its step's next
     */
    void enqueue(long stream);

    /**
     * Captures all parts as one graph, without running them.
     *
     * @param stream a CUstream handle that is not capturing; 0 on the CPU backend
     * @return the graph, which the caller closes; it outlives this, and keeps the layers' memory
     * @throws IllegalStateException after close of this or of a layer, or if a capture is already
     *     under way
     */
    MoeGraph capture(long stream);

    /** Frees streams and events; what was enqueued still runs. Idempotent. */
    @Override
    void close();
}
