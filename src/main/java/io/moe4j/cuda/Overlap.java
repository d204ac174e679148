package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.Phase;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Event;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;

/**
 * Two steps in one capture, on the stream that is captured and one beside it: the rows of one
 * travel while the experts of the other run. Lives as long as the capture.
 *
 * <pre>
 * stream   dispatch 1   dispatch 2   combine 1   combine 2
 * beside                experts 1    experts 2
 * </pre>
 *
 * <p>why all that waits for peers is on one stream: ranks then wait in the same order everywhere.
 * why all experts are on the other: blocks of an expert kernel wait for blocks of their own.
 */
final class Overlap implements AutoCloseable {
    private final Context context;
    private final long stream;
    private final Stream beside;
    private final Event dispatched;
    private final Event computed;
    private final Event dispatchedSecond;
    private final Event computedSecond;

    Overlap(Context context, long stream) {
        this.context = context;
        this.stream = stream;
        this.beside = new Stream(context);
        this.dispatched = new Event(context, false);
        this.computed = new Event(context, false);
        this.dispatchedSecond = new Event(context, false);
        this.computedSecond = new Event(context, false);
    }

    void enqueue(CudaLayer layer, BoundStep first, BoundStep second) {
        layer.enqueue(stream, first, Phase.ROUTE, Phase.DISPATCH_RECV);
        order(stream, dispatched, beside.handle());
        layer.enqueue(beside.handle(), first, Phase.EXPERTS, Phase.EXPERTS);
        computed.record(beside.handle());
        layer.enqueue(stream, second, Phase.ROUTE, Phase.DISPATCH_RECV);
        order(stream, dispatchedSecond, beside.handle());
        layer.enqueue(beside.handle(), second, Phase.EXPERTS, Phase.EXPERTS);
        computedSecond.record(beside.handle());
        await(computed);
        layer.enqueue(stream, first, Phase.COMBINE_SEND, Phase.COMBINE_RECV);
        await(computedSecond);
        layer.enqueue(stream, second, Phase.COMBINE_SEND, Phase.COMBINE_RECV);
    }

    private void order(long before, Event event, long after) {
        event.record(before);
        try (Scope scope = context.enter()) {
            context.driver().streamWaitEvent(after, event.handle());
        }
    }

    private void await(Event event) {
        try (Scope scope = context.enter()) {
            context.driver().streamWaitEvent(stream, event.handle());
        }
    }

    @Override
    public void close() {
        dispatched.close();
        computed.close();
        dispatchedSecond.close();
        computedSecond.close();
        beside.close();
    }
}
