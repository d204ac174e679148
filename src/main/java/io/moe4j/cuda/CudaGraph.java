package io.moe4j.cuda;

import io.moe4j.MoeGraph;
import io.moe4j.cuda.driver.GraphExec;
import io.moe4j.observe.GraphTrace;
import java.util.Set;
import java.util.concurrent.locks.ReentrantLock;

/**
 * An executable graph over the steps of one or several layers. Each layer counts the graphs that
 * use its memory and frees nothing while there is one.
 */
final class CudaGraph implements MoeGraph {
    private final GraphExec exec;
    private final CudaLayer[] layers; // why an array: a launch makes no iterator
    private final GraphTrace trace;
    private final ReentrantLock lock = new ReentrantLock();
    private boolean closed;

    /** Takes over the pins that {@code layers} already hold for this graph. */
    CudaGraph(GraphExec exec, Set<CudaLayer> layers, GraphTrace trace) {
        this.exec = exec;
        this.layers = layers.toArray(CudaLayer[]::new);
        this.trace = trace;
    }

    @Override
    public void launch(long stream) {
        lock.lock();
        try {
            if (closed) {
                throw new IllegalStateException("the graph is closed: capture a new one");
            }
            for (CudaLayer layer : layers) {
                layer.requireLaunchable();
            }
            exec.launch(stream);
            trace.launched();
        } finally {
            lock.unlock();
        }
    }

    @Override
    public long nodeCount() {
        return exec.nodeCount();
    }

    @Override
    public void close() {
        lock.lock();
        try {
            if (!closed) {
                closed = true;
                trace.closing();
                exec.close();
                for (CudaLayer layer : layers) {
                    layer.unpin();
                }
            }
        } finally {
            lock.unlock();
        }
    }
}
