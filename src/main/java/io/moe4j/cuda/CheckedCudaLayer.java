package io.moe4j.cuda;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HandlePool;
import io.moe4j.HostSyncCheckedLayer;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.CheckedDriver;
import java.util.ArrayList;
import java.util.List;

/**
 * A CUDA layer on a checked driver: {@code enqueue} and graph launches run inside a no-sync zone.
 * Everything else is the layer's own. A layer that is not checked carries no trace of this.
 */
final class CheckedCudaLayer implements HostSyncCheckedLayer {
    private final CudaLayer layer;
    private final CheckedDriver driver;

    /** Owns {@code layer}, which uses {@code driver}. */
    CheckedCudaLayer(CudaLayer layer, CheckedDriver driver) {
        this.layer = layer;
        this.driver = driver;
    }

    /** A step of the layer inside, which knows this one as its layer. */
    private record CheckedStep(CheckedCudaLayer checked, BoundStep inner) implements BoundStep {
        @Override
        public MoeLayer layer() {
            return checked;
        }

        @Override
        public List<StepTensors> tensors() {
            return inner.tensors();
        }

        @Override
        public void requireAlive() {
            inner.requireAlive();
        }
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
    public BoundStep bind(List<StepTensors> ranks, int handle) {
        return new CheckedStep(this, layer.bind(ranks, handle));
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
        List<GraphPart> inner = new ArrayList<>();
        for (GraphPart part : parts) {
            inner.add(new GraphPart(inner(part.step()), part.first(), part.last()));
        }
        return new CheckedGraph(layer.capture(stream, inner), driver);
    }

    private static BoundStep inner(BoundStep step) {
        return step instanceof CheckedStep checked ? checked.inner : step;
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
    public MoeConfig config() {
        return layer.config();
    }

    @Override
    public String backend() {
        return layer.backend();
    }

    @Override
    public String backendReason() {
        return layer.backendReason() + ", host syncs checked";
    }

    @Override
    public MemoryPlan plan() {
        return layer.plan();
    }

    @Override
    public void prepare() {
        layer.prepare();
    }

    @Override
    public void prepare(ProgressListener progress) {
        layer.prepare(progress);
    }

    @Override
    public void synchronize(long stream) {
        layer.synchronize(stream);
    }

    @Override
    public void readRouting(int rank, int[] ids, float[] weights) {
        layer.readRouting(rank, ids, weights);
    }

    @Override
    public StepInspection inspect(int handle, int rank) {
        return layer.inspect(handle, rank);
    }

    @Override
    public SoftCounters counters() {
        return layer.counters();
    }

    @Override
    public void check() {
        layer.check();
    }

    @Override
    public HandlePool handles() {
        return layer.handles();
    }

    @Override
    public long validEpoch(int handle) {
        return layer.validEpoch(handle);
    }

    @Override
    public BackendMemory memory() {
        return layer.memory();
    }

    @Override
    public void close() {
        layer.close();
    }
}
