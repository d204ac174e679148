package io.moe4j.observe;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.WeakHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

/**
 * One graph as seen from outside. Owned by its graph, which calls {@link #launched} at each replay:
 * that adds one to a field. Events tell of many replays at once.
 */
public final class GraphTrace {
    private static final AtomicInteger NEXT = new AtomicInteger(1);
    private static final Set<GraphTrace> CAPTURED =
            Collections.synchronizedSet(Collections.newSetFromMap(new WeakHashMap<>()));

    private final int number = NEXT.getAndIncrement();
    private final LayerTrace layer;
    private final int layers;
    private final AtomicLong launches = new AtomicLong();
    private long nodes;
    private long reported;

    GraphTrace(LayerTrace layer, int layers) {
        this.layer = layer;
        this.layers = layers;
    }

    /** {@return a trace for a graph that no event tells of} */
    public static GraphTrace unwatched() {
        return new GraphTrace(null, 0);
    }

    int number() {
        return number;
    }

    LayerTrace layer() {
        return layer;
    }

    int layers() {
        return layers;
    }

    synchronized long nodes() {
        return nodes;
    }

    synchronized void captured(long graphNodes) {
        nodes = graphNodes;
        CAPTURED.add(this);
    }

    /** Counts a replay; by one thread at a time. */
    public void launched() {
        launches.setOpaque(launches.getPlain() + 1);
    }

    /** Called when the graph is closed: the replays not told yet. Idempotent. */
    public void closing() {
        if (CAPTURED.remove(this)) {
            report();
        }
    }

    /** Tells the replays of all graphs; called by the Flight Recorder. */
    static void reportAll() {
        List<GraphTrace> all;
        synchronized (CAPTURED) {
            all = new ArrayList<>(CAPTURED);
        }
        all.forEach(GraphTrace::report);
    }

    private synchronized void report() {
        long total = launches.getOpaque();
        if (total > reported && Events.HERE.wantsReplays()) {
            Events.HERE.replays(this, total - reported, total);
            reported = total;
        }
    }
}
