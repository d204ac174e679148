package io.moe4j.observe;

import io.moe4j.MoeConfig;
import io.moe4j.SoftCounters;
import jdk.jfr.Category;
import jdk.jfr.DataAmount;
import jdk.jfr.Description;
import jdk.jfr.Event;
import jdk.jfr.FlightRecorder;
import jdk.jfr.FlightRecorderListener;
import jdk.jfr.Label;
import jdk.jfr.Name;
import jdk.jfr.Period;
import jdk.jfr.StackTrace;
import jdk.jfr.Timespan;

/** The events of the Flight Recorder. Two are periodic, so that a step makes none. */
final class JfrEvents implements Events {
    private JfrEvents() {}

    /** Hooks the periodic events in as soon as something records, which may be never. */
    static Events start() {
        if (FlightRecorder.isAvailable()) {
            FlightRecorder.addListener(
                    new FlightRecorderListener() {
                        @Override
                        public void recorderInitialized(FlightRecorder recorder) {
                            FlightRecorder.addPeriodicEvent(
                                    CountersEvent.class, LayerTrace::reportAll);
                            FlightRecorder.addPeriodicEvent(
                                    ReplaysEvent.class, GraphTrace::reportAll);
                        }
                    });
        }
        return new JfrEvents();
    }

    @Name("moe4j.LayerOpen")
    @Label("Layer Open")
    @Category("moe4j")
    @Description("A layer was opened; nothing is allocated yet")
    static final class LayerOpenEvent extends Event {
        @Label("Layer")
        int layer;

        @Label("Backend")
        String backend;

        @Label("Backend Reason")
        String reason;

        @Label("Hidden Size")
        int hidden;

        @Label("Intermediate Size")
        int intermediate;

        @Label("Experts")
        int experts;

        @Label("Experts per Token")
        int topK;

        @Label("Ranks")
        int ranks;

        @Label("Maximum Tokens per Rank")
        int maxTokensPerRank;

        @Label("Handles")
        int handles;

        @Label("Planned Memory")
        @DataAmount
        long plannedBytes;
    }

    @Name("moe4j.LayerPrepare")
    @Label("Layer Prepare")
    @Category("moe4j")
    @Description("Memory was allocated and weights were packed")
    static final class LayerPrepareEvent extends Event {
        @Label("Layer")
        int layer;

        @Label("Planned Memory")
        @DataAmount
        long plannedBytes;

        @Label("Failure")
        String failure;
    }

    @Name("moe4j.GraphCapture")
    @Label("Graph Capture")
    @Category("moe4j")
    @Description("Steps were captured as a graph")
    static final class GraphCaptureEvent extends Event {
        @Label("Graph")
        int graph;

        @Label("Layer")
        @Description("The layer whose capture was called")
        int layer;

        @Label("Layers")
        int layers;

        @Label("Parts")
        int parts;

        @Label("Nodes")
        long nodes;

        @Label("Failure")
        String failure;
    }

    @Name("moe4j.Replays")
    @Label("Replays")
    @Category("moe4j")
    @Description("Replays of a graph since its last event")
    @StackTrace(false)
    @Period("1 s")
    static final class ReplaysEvent extends Event {
        @Label("Graph")
        int graph;

        @Label("Layer")
        int layer;

        @Label("Layers")
        int layers;

        @Label("Nodes")
        long nodes;

        @Label("Launches")
        long launches;

        @Label("Launches since Capture")
        long total;
    }

    @Name("moe4j.Counters")
    @Label("Counters")
    @Category("moe4j")
    @Description("Steps and tolerated input of a layer since it was prepared")
    @StackTrace(false)
    @Period("1 s")
    static final class CountersEvent extends Event {
        @Label("Layer")
        int layer;

        @Label("Calls of enqueue")
        long enqueues;

        @Label("Steps")
        long steps;

        @Label("Dropped Ids")
        long droppedIds;

        @Label("Duplicate Ids")
        long duplicateIds;

        @Label("Tokens over Capacity")
        long overCapacityTokens;
    }

    @Name("moe4j.Fault")
    @Label("Fault")
    @Category("moe4j")
    @Description("A step has no valid output")
    @StackTrace(false)
    static final class FaultEvent extends Event {
        @Label("Layer")
        int layer;

        @Label("Handle")
        int handle;

        @Label("Operation")
        String operation;

        @Label("Rank")
        int rank;

        @Label("Peer")
        int peer;

        @Label("Cause")
        String cause;

        @Label("Waited")
        @Timespan(Timespan.NANOSECONDS)
        long waited;

        @Label("Epoch Expected")
        long epochExpected;

        @Label("Epoch Seen")
        long epochSeen;

        @Label("Last Valid Epoch")
        long validEpoch;
    }

    @Override
    public void opened(LayerTrace layer) {
        LayerOpenEvent event = new LayerOpenEvent();
        if (event.shouldCommit()) {
            MoeConfig config = layer.layer().config();
            event.layer = layer.number();
            event.backend = layer.layer().backend();
            event.reason = layer.layer().backendReason();
            event.hidden = config.shape().hidden();
            event.intermediate = config.shape().intermediate();
            event.experts = config.shape().experts();
            event.topK = config.shape().topK();
            event.ranks = config.ranks();
            event.maxTokensPerRank = config.maxTokensPerRank();
            event.handles = config.handles();
            event.plannedBytes = layer.layer().plan().totalBytes();
            event.commit();
        }
    }

    @Override
    public Span prepare(LayerTrace layer) {
        LayerPrepareEvent event = new LayerPrepareEvent();
        event.begin();
        return (failure, nodes) -> {
            event.end();
            if (event.shouldCommit()) {
                event.layer = layer.number();
                event.plannedBytes = layer.layer().plan().totalBytes();
                event.failure = text(failure);
                event.commit();
            }
        };
    }

    @Override
    public Span capture(GraphTrace graph, int parts) {
        GraphCaptureEvent event = new GraphCaptureEvent();
        event.begin();
        return (failure, nodes) -> {
            event.end();
            if (event.shouldCommit()) {
                event.graph = graph.number();
                event.layer = graph.layer().number();
                event.layers = graph.layers();
                event.parts = parts;
                event.nodes = nodes;
                event.failure = text(failure);
                event.commit();
            }
        };
    }

    private static String text(Throwable failure) {
        return failure == null ? null : failure.toString();
    }

    @Override
    public boolean fault(LayerTrace layer, int handle, LayerFault fault) {
        FaultEvent event = new FaultEvent();
        if (!event.shouldCommit()) {
            return false;
        }
        event.layer = layer.number();
        event.handle = handle;
        event.operation = fault.operation();
        event.rank = fault.rank();
        event.peer = fault.peer();
        event.cause = fault.cause();
        event.waited = fault.waitedNs();
        event.epochExpected = fault.epochExpected();
        event.epochSeen = fault.epochSeen();
        event.validEpoch = fault.validEpoch();
        event.commit();
        return true;
    }

    @Override
    public boolean wantsCounters() {
        return new CountersEvent().isEnabled();
    }

    @Override
    public void counters(LayerTrace layer, SoftCounters counters) {
        CountersEvent event = new CountersEvent();
        event.layer = layer.number();
        event.enqueues = layer.enqueues();
        event.steps = counters.steps();
        event.droppedIds = counters.droppedIds();
        event.duplicateIds = counters.duplicateIds();
        event.overCapacityTokens = counters.overCapacityTokens();
        event.commit();
    }

    @Override
    public boolean wantsReplays() {
        return new ReplaysEvent().isEnabled();
    }

    @Override
    public void replays(GraphTrace graph, long launches, long total) {
        ReplaysEvent event = new ReplaysEvent();
        event.graph = graph.number();
        event.layer = graph.layer().number();
        event.layers = graph.layers();
        event.nodes = graph.nodes();
        event.launches = launches;
        event.total = total;
        event.commit();
    }
}
