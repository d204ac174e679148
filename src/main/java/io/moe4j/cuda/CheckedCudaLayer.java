package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HostSyncCheckedLayer;
import io.moe4j.LanePart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.Phase;
import io.moe4j.cuda.driver.CheckedDriver;
import java.util.List;

/**
 * A CUDA layer on a checked driver: {@code enqueue} and graph launches run inside a no-sync zone.
 * Everything else is the layer's own. A layer that is not checked carries no trace of this.
 */
final class CheckedCudaLayer extends ForwardingLayer implements HostSyncCheckedLayer {
    private final CudaLayer layer;
    private final CheckedDriver driver;

    /** Owns {@code layer}, which uses {@code driver}. */
    CheckedCudaLayer(CudaLayer layer, CheckedDriver driver) {
        super(layer);
        this.layer = layer;
        this.driver = driver;
    }

    /** Number of the layer in events and ranges. */
    int number() {
        return layer.number();
    }

    @Override
    public List<String> violations() {
        return driver.violations().stream().map(CheckedDriver.Violation::toString).toList();
    }

    @Override
    public void enqueue(long stream, BoundStep step, Phase first, Phase last) {
        step.requireAlive();
        try (CheckedDriver.Zone zone = driver.noSyncZone("enqueue")) {
            layer.enqueue(stream, inner(step), first, last);
        }
    }

    @Override
    public MoeGraph capture(long stream, List<GraphPart> parts) {
        return new CheckedGraph(layer.capture(stream, inner(parts)), driver);
    }

    @Override
    public MoeLanes lanes(List<LanePart> parts) {
        return new CheckedLanes(layer.lanes(innerLanes(parts)), driver);
    }

    /** A schedule that is enqueued inside a no-sync zone, and so are graphs of it. */
    private record CheckedLanes(MoeLanes lanes, CheckedDriver driver) implements MoeLanes {
        @Override
        public void enqueue(long stream) {
            try (CheckedDriver.Zone zone = driver.noSyncZone("enqueue")) {
                lanes.enqueue(stream);
            }
        }

        @Override
        public MoeGraph capture(long stream) {
            return new CheckedGraph(lanes.capture(stream), driver);
        }

        @Override
        public void close() {
            lanes.close();
        }
    }

    /** A graph whose launches run inside a no-sync zone. */
    private record CheckedGraph(MoeGraph graph, CheckedDriver driver) implements MoeGraph {
        @Override
        public void launch(long stream) {
            try (CheckedDriver.Zone zone = driver.noSyncZone("graph launch")) {
                graph.launch(stream);
            }
        }

        @Override
        public long nodeCount() {
            return graph.nodeCount();
        }

        @Override
        public void close() {
            graph.close();
        }
    }

    @Override
    public String backendReason() {
        return layer.backendReason() + ", host syncs checked";
    }
}
