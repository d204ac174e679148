package io.moe4j.cuda;

import io.moe4j.GraphPart;
import io.moe4j.LanePart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Event;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import java.util.List;
import java.util.Set;
import java.util.concurrent.locks.ReentrantLock;

/**
 * A schedule on streams of its own and the caller's. Lanes begin behind an event on the caller's
 * stream, which in the end waits for the last part of each; between lanes a part waits for events
 * of the parts it comes after. Each layer counts it like a graph and frees nothing while there is
 * one.
 */
final class CudaLanes implements MoeLanes {
    private static final int NONE = -1;

    private final StepCapture capture;
    private final CudaLayer[] layers;
    private final Context context;
    private final LanePart[] parts;

    /** Events a part waits for, by position; and whether it has one of its own. */
    private final int[][] waits;

    private final Event[] events;
    private final Stream[] streams;

    /** Last part of each lane, or none. */
    private final int[] last;

    private final Event fork;
    private final Owned owned = new Owned();
    private final ReentrantLock lock = new ReentrantLock();
    private boolean closed;

    /** Takes over the pins that {@code layers} already hold for it. */
    CudaLanes(
            StepCapture capture, Context context, List<LanePart> schedule, Set<CudaLayer> layers) {
        this.capture = capture;
        this.context = context;
        this.layers = layers.toArray(CudaLayer[]::new);
        this.parts = schedule.toArray(LanePart[]::new);
        this.last = new int[LanePart.MOST_LANES];
        this.waits = new int[parts.length][];
        boolean[] awaited = new boolean[parts.length];
        java.util.Arrays.fill(last, NONE);
        for (int i = 0; i < parts.length; i++) {
            int lane = parts[i].lane();
            waits[i] =
                    parts[i].after().stream()
                            .mapToInt(Integer::intValue)
                            .filter(before -> parts[before].lane() != lane)
                            .toArray();
            for (int before : waits[i]) {
                awaited[before] = true;
            }
            last[lane] = i;
        }
        this.streams = new Stream[LanePart.MOST_LANES];
        this.events = new Event[parts.length];
        try {
            fork = owned.add(new Event(context, false));
            for (int lane = 1; lane < last.length; lane++) {
                if (last[lane] != NONE) {
                    streams[lane] = owned.add(new Stream(context));
                    awaited[last[lane]] = true;
                }
            }
            for (int i = 0; i < parts.length; i++) {
                events[i] = awaited[i] ? owned.add(new Event(context, false)) : null;
            }
        } catch (RuntimeException | Error e) {
            owned.close(e);
            throw e;
        }
    }

    @Override
    public void enqueue(long stream) {
        if (!lock.tryLock()) {
            throw new IllegalStateException(
                    "another thread is enqueueing this schedule: one at a time");
        }
        try {
            requireOpen();
            run(stream);
        } finally {
            lock.unlock();
        }
    }

    private void run(long stream) {
        Driver driver = context.driver();
        try (Scope scope = context.enter()) {
            driver.eventRecord(fork.handle(), stream);
            for (int lane = 1; lane < streams.length; lane++) {
                if (streams[lane] != null) {
                    driver.streamWaitEvent(streams[lane].handle(), fork.handle());
                }
            }
            for (int i = 0; i < parts.length; i++) {
                long on = parts[i].lane() == 0 ? stream : streams[parts[i].lane()].handle();
                for (int before : waits[i]) {
                    driver.streamWaitEvent(on, events[before].handle());
                }
                GraphPart part = parts[i].part();
                part.step().layer().enqueue(on, part.step(), part.first(), part.last());
                if (events[i] != null) {
                    driver.eventRecord(events[i].handle(), on);
                }
            }
            for (int lane = 1; lane < streams.length; lane++) {
                if (streams[lane] != null) {
                    driver.streamWaitEvent(stream, events[last[lane]].handle());
                }
            }
        }
    }

    @Override
    public MoeGraph capture(long stream) {
        lock.lock();
        try {
            requireOpen();
            return capture.graph(stream, List.of(layers), parts.length, () -> run(stream));
        } finally {
            lock.unlock();
        }
    }

    private void requireOpen() {
        if (closed) {
            throw new IllegalStateException("the schedule is closed: make a new one");
        }
        for (CudaLayer layer : layers) {
            layer.requireOpen();
        }
    }

    @Override
    public void close() {
        lock.lock();
        try {
            if (!closed) {
                closed = true;
                try {
                    owned.close("closing a schedule");
                } finally {
                    for (CudaLayer layer : layers) {
                        layer.unpin();
                    }
                }
            }
        } finally {
            lock.unlock();
        }
    }
}
