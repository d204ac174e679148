package io.moe4j.cuda;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HandlePool;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.cuda.nvtx.Ranges;
import java.util.ArrayList;
import java.util.List;

/**
 * A layer whose prepare, capture, enqueue and graph launches are NVTX ranges of the calling thread.
 * Everything else is the layer's own. A layer that is not asked for ranges carries no trace of
 * this. Names are made when the layer is opened.
 */
final class RangedLayer implements MoeLayer {
    private final MoeLayer layer;
    private final Ranges ranges;
    private final long prepare;
    private final long capture;
    private final long replay;
    private final long[][] phases;

    /** Owns {@code layer}, whose number in events is {@code number}. */
    RangedLayer(MoeLayer layer, Ranges ranges, int number) {
        this.layer = layer;
        this.ranges = ranges;
        this.prepare = ranges.name("moe4j: prepare, layer " + number);
        this.capture = ranges.name("moe4j: capture, layer " + number);
        this.replay = ranges.name("moe4j: replay, layer " + number);
        int count = Phase.values().length;
        this.phases = new long[count][count];
        for (int first = 0; first < count; first++) {
            for (int last = first; last < count; last++) {
                phases[first][last] = ranges.name(name(first, last, count) + ", layer " + number);
            }
        }
    }

    private static String name(int first, int last, int count) {
        if (first == 0 && last == count - 1) {
            return "moe4j: step";
        }
        String begin = "moe4j: " + Phase.values()[first];
        return first == last ? begin : begin + ".." + Phase.values()[last];
    }

    /** A step of the layer inside, which knows this one as its layer. */
    private record RangedStep(RangedLayer ranged, BoundStep inner) implements BoundStep {
        @Override
        public MoeLayer layer() {
            return ranged;
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

    @Override
    public void prepare() {
        prepare(ProgressListener.NONE);
    }

    @Override
    public void prepare(ProgressListener progress) {
        ranges.push(prepare);
        try {
            layer.prepare(progress);
        } finally {
            ranges.pop();
        }
    }

    @Override
    public BoundStep bind(List<StepTensors> tensors, int handle) {
        return new RangedStep(this, layer.bind(tensors, handle));
    }

    @Override
    public void enqueue(long stream, BoundStep step, Phase first, Phase last) {
        // why max: the layer refuses phases in the wrong order, and says so
        int end = Math.max(first.ordinal(), last.ordinal());
        ranges.push(phases[first.ordinal()][end]);
        try {
            layer.enqueue(stream, inner(step), first, last);
        } finally {
            ranges.pop();
        }
    }

    @Override
    public MoeGraph capture(long stream, List<GraphPart> parts) {
        List<GraphPart> inner = new ArrayList<>();
        for (GraphPart part : parts) {
            inner.add(new GraphPart(inner(part.step()), part.first(), part.last()));
        }
        ranges.push(capture);
        try {
            return new RangedGraph(layer.capture(stream, inner), ranges, replay);
        } finally {
            ranges.pop();
        }
    }

    private static BoundStep inner(BoundStep step) {
        return step instanceof RangedStep ranged ? ranged.inner : step;
    }

    /** A graph whose launches are ranges. */
    private record RangedGraph(MoeGraph graph, Ranges ranges, long replay) implements MoeGraph {
        @Override
        public void launch(long stream) {
            ranges.push(replay);
            try {
                graph.launch(stream);
            } finally {
                ranges.pop();
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
        return layer.backendReason();
    }

    @Override
    public MemoryPlan plan() {
        return layer.plan();
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
