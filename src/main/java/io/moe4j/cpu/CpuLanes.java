package io.moe4j.cpu;

import io.moe4j.GraphPart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import java.util.List;

/** A schedule on one thread: its parts one after the other, in their order. */
final class CpuLanes implements MoeLanes {
    private final CpuLayer layer;
    private final List<GraphPart> parts;
    private volatile boolean closed;

    CpuLanes(CpuLayer layer, List<GraphPart> parts) {
        this.layer = layer;
        this.parts = parts;
    }

    @Override
    public void enqueue(long stream) {
        requireOpen();
        for (GraphPart part : parts) {
            part.step().layer().enqueue(stream, part.step(), part.first(), part.last());
        }
    }

    @Override
    public MoeGraph capture(long stream) {
        requireOpen();
        return layer.capture(stream, parts);
    }

    private void requireOpen() {
        if (closed) {
            throw new IllegalStateException("the schedule is closed: make a new one");
        }
    }

    @Override
    public void close() {
        closed = true;
    }
}
