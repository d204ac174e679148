package io.moe4j.observe;

import io.moe4j.MoeFaultException;
import io.moe4j.MoeLayer;
import io.moe4j.SoftCounters;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.WeakHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.Function;
import java.util.function.ToLongFunction;

/**
 * One layer as seen from outside. Owned by its layer, which calls {@link #enqueued} once a step:
 * that adds one to a field and does nothing else. Everything that costs more is done when a layer
 * is opened, prepared, captured or closed, or by the thread of the Flight Recorder.
 */
public final class LayerTrace {
    private static final AtomicInteger NEXT = new AtomicInteger(1);

    /** why weak: a layer that nobody closed must not live because it is watched. */
    private static final Set<LayerTrace> PREPARED =
            Collections.synchronizedSet(Collections.newSetFromMap(new WeakHashMap<>()));

    private final int number = NEXT.getAndIncrement();
    private final MoeLayer layer;
    private final AtomicLong enqueues = new AtomicLong();
    private final LayerFault[] told;

    private LayerTrace(MoeLayer layer) {
        this.layer = layer;
        this.told = new LayerFault[layer.config().handles()];
    }

    /**
     * Called by a layer at the end of its constructor.
     *
     * @param layer that is open now
     * @return its trace
     */
    public static LayerTrace open(MoeLayer layer) {
        LayerTrace trace = new LayerTrace(layer);
        Events.HERE.opened(trace);
        return trace;
    }

    /** {@return the number of the layer, from 1 in the order of opening} */
    public int number() {
        return number;
    }

    MoeLayer layer() {
        return layer;
    }

    long enqueues() {
        return enqueues.getOpaque();
    }

    /**
     * Runs what prepare does.
     *
     * @param work allocates and copies; what it throws is told of and thrown on
     */
    public void prepare(Runnable work) {
        Events.Span span = Events.HERE.prepare(this);
        try {
            work.run();
        } catch (RuntimeException | Error e) {
            span.end(e, 0);
            throw e;
        }
        PREPARED.add(this);
        span.end(null, 0);
    }

    /** Counts a call of enqueue; by one thread at a time. */
    public void enqueued() {
        enqueues.setOpaque(enqueues.getPlain() + 1);
    }

    /**
     * Runs what capture does.
     *
     * @param layers how many layers the graph uses
     * @param parts of how many parts it is made
     * @param work makes the graph, which keeps its trace
     * @param nodes of the graph that was made
     * @param <G> kind of graph
     * @return the graph
     */
    public <G> G capture(
            int layers, int parts, Function<GraphTrace, G> work, ToLongFunction<G> nodes) {
        GraphTrace graph = new GraphTrace(this, layers);
        Events.Span span = Events.HERE.capture(graph, parts);
        try {
            G made = work.apply(graph);
            graph.captured(nodes.applyAsLong(made));
            span.end(null, graph.nodes());
            return made;
        } catch (RuntimeException | Error e) {
            span.end(e, 0);
            throw e;
        }
    }

    /**
     * Tells of a fault, once.
     *
     * @param handle where it happened
     * @param fault what happened
     */
    public synchronized void faulted(int handle, LayerFault fault) {
        if (!fault.equals(told[handle]) && Events.HERE.fault(this, handle, fault)) {
            told[handle] = fault;
        }
    }

    /** Called first thing when the layer is closed: the last counts. Idempotent. */
    public void closing() {
        if (PREPARED.remove(this)) {
            report();
        }
    }

    /** Tells the counts of all layers that are prepared; called by the Flight Recorder. */
    static void reportAll() {
        List<LayerTrace> all;
        synchronized (PREPARED) {
            all = new ArrayList<>(PREPARED);
        }
        all.forEach(LayerTrace::report);
    }

    private void report() {
        if (!Events.HERE.wantsCounters()) {
            return;
        }
        try {
            SoftCounters counters = layer.counters();
            Events.HERE.counters(this, counters);
            layer.check(); // a layer with a fault calls faulted
        } catch (MoeFaultException told) {
            // the event has been made
        } catch (IllegalStateException closedMeanwhile) {
            // nothing to tell any more
        }
    }
}
