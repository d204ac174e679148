package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/**
 * An executable graph: what was enqueued once, launched again by one call. It holds the addresses
 * seen at capture, so their memory must outlive it. One launch at a time is in flight; the driver
 * orders launches of the same graph.
 */
public final class GraphExec implements AutoCloseable {
    private final Context context;
    private final long handle;
    private final long nodeCount;
    private final AtomicBoolean closed = new AtomicBoolean();

    private GraphExec(Context context, long handle, long nodeCount) {
        this.context = context;
        this.handle = handle;
        this.nodeCount = nodeCount;
    }

    /**
     * Captures what {@code enqueue} enqueues on a stream and makes it executable. If anything fails
     * the capture is ended, so the stream stays usable.
     *
     * @param context everything is made and used in it
     * @param stream any stream but the legacy default stream; must not be capturing
     * @param enqueue enqueues on the stream
     * @return the executable graph, owned by the caller
     * @throws IllegalArgumentException for the legacy default stream
     */
    public static GraphExec capture(Context context, long stream, Runnable enqueue) {
        if (stream == 0) {
            throw new IllegalArgumentException(
                    "the legacy default stream cannot be captured: create a stream");
        }
        Driver driver = context.driver();
        try (Scope scope = context.enter()) {
            driver.streamBeginCapture(stream);
            try {
                enqueue.run();
            } catch (Throwable t) {
                abandon(driver, stream, t);
                throw t;
            }
            long graph = driver.streamEndCapture(stream);
            try {
                long nodes = driver.graphNodeCount(graph);
                long exec = driver.graphInstantiate(graph);
                return uploaded(context, stream, exec, nodes);
            } finally {
                driver.graphDestroy(graph);
            }
        }
    }

    private static void abandon(Driver driver, long stream, Throwable cause) {
        try {
            long graph = driver.streamEndCapture(stream);
            if (graph != 0) {
                driver.graphDestroy(graph);
            }
        } catch (CudaException e) {
            cause.addSuppressed(e);
        }
    }

    private static GraphExec uploaded(Context context, long stream, long exec, long nodes) {
        try {
            context.driver().graphUpload(exec, stream);
            return new GraphExec(context, exec, nodes);
        } catch (CudaException e) {
            context.driver().graphExecDestroy(exec);
            throw e;
        }
    }

    /**
     * Enqueues the graph on a stream of the same context.
     *
     * @param stream a CUstream; 0 for the legacy default stream
     */
    public void launch(long stream) {
        if (closed.get()) {
            throw new IllegalStateException("the graph is closed");
        }
        try (Scope scope = context.enter()) {
            context.driver().graphLaunch(handle, stream);
        }
    }

    /** {@return the number of nodes captured} */
    public long nodeCount() {
        return nodeCount;
    }

    /** Destroys the graph; launches already enqueued still run. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().graphExecDestroy(handle));
        }
    }
}
