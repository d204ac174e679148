package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.cuda.nvtx.Ranges;
import java.util.List;

/**
 * A layer whose prepare, capture, enqueue and graph launches are NVTX ranges of the calling thread.
 * Everything else is the layer's own. A layer that is not asked for ranges carries no trace of
 * this. Names are made when the layer is opened.
 */
final class RangedLayer extends ForwardingLayer {
    private final MoeLayer layer;
    private final Ranges ranges;
    private final long prepare;
    private final long capture;
    private final long replay;
    private final long[][] phases;

    /** Owns {@code layer}, whose number in events is {@code number}. */
    RangedLayer(MoeLayer layer, Ranges ranges, int number) {
        super(layer);
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
        ranges.push(capture);
        try {
            return new RangedGraph(layer.capture(stream, inner(parts)), ranges, replay);
        } finally {
            ranges.pop();
        }
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
}
