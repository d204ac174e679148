package io.moe4j.cpu;

import io.moe4j.GraphPart;
import io.moe4j.MoeGraph;
import io.moe4j.observe.GraphTrace;
import java.util.List;

/** A list of phases to run again; the layers' own checks apply at every replay. */
final class CpuGraph implements MoeGraph {
    private final List<GraphPart> parts;
    private final GraphTrace trace;
    private volatile boolean closed;

    CpuGraph(List<GraphPart> parts, GraphTrace trace) {
        this.parts = List.copyOf(parts);
        this.trace = trace;
    }

    @Override
    public void launch(long stream) {
        if (closed) {
            throw new IllegalStateException("the graph is closed: capture a new one");
        }
        for (GraphPart part : parts) {
            part.step().layer().enqueue(stream, part.step(), part.first(), part.last());
        }
        trace.launched();
    }

    @Override
    public long nodeCount() {
        return parts.stream().mapToLong(p -> p.last().ordinal() - p.first().ordinal() + 1).sum();
    }

    @Override
    public void close() {
        closed = true;
        trace.closing();
    }
}
