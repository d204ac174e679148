package io.moe4j.cuda;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.HandlePool;
import io.moe4j.LanePart;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLanes;
import io.moe4j.MoeLayer;
import io.moe4j.ProgressListener;
import io.moe4j.Recovery;
import io.moe4j.SoftCounters;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.ep.PeerStatistics;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;

/**
 * A layer that does something more around the calls of another, which it owns. Steps it binds know
 * it as their layer; {@link #inner} finds those of the layer inside.
 */
abstract class ForwardingLayer implements MoeLayer {
    private final MoeLayer layer;

    ForwardingLayer(MoeLayer layer) {
        this.layer = layer;
    }

    /** A step of the layer inside, which knows this one as its layer. */
    private record OuterStep(ForwardingLayer outer, BoundStep inner) implements BoundStep {
        @Override
        public MoeLayer layer() {
            return outer;
        }

        @Override
        public int handleIndex() {
            return inner.handleIndex();
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

    /** What the layer inside bound; any other step as it is, for that layer to refuse. */
    static BoundStep inner(BoundStep step) {
        return step instanceof OuterStep outer ? outer.inner : step;
    }

    static List<GraphPart> inner(List<GraphPart> parts) {
        List<GraphPart> inner = new ArrayList<>();
        for (GraphPart part : parts) {
            inner.add(new GraphPart(inner(part.step()), part.first(), part.last()));
        }
        return inner;
    }

    static List<LanePart> innerLanes(List<LanePart> parts) {
        List<LanePart> inner = new ArrayList<>();
        for (LanePart one : parts) {
            inner.add(new LanePart(inner(List.of(one.part())).get(0), one.lane(), one.after()));
        }
        return inner;
    }

    @Override
    public MoeLanes lanes(List<LanePart> parts) {
        return layer.lanes(innerLanes(parts));
    }

    @Override
    public BoundStep bind(List<StepTensors> ranks, int handle) {
        return new OuterStep(this, layer.bind(ranks, handle));
    }

    @Override
    public void prepare() {
        prepare(ProgressListener.NONE);
    }

    @Override
    public void prepare(ProgressListener progress) {
        layer.prepare(progress);
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
    public List<PeerStatistics> peers() {
        return layer.peers();
    }

    @Override
    public Recovery recover(Set<Integer> lost) {
        return layer.recover(lost);
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
