package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/** An event, destroyed on close. */
public final class Event implements AutoCloseable {
    private final Context context;
    private final long handle;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Creates an event; timing costs a little more per record.
     *
     * @param context everything is made and used in it
     * @param timing whether it can measure times
     */
    public Event(Context context, boolean timing) {
        this.context = context;
        try (Scope scope = context.enter()) {
            this.handle = context.driver().eventCreate(timing);
        }
    }

    /** {@return the raw event} */
    public long handle() {
        if (closed.get()) {
            throw new IllegalStateException("the event is closed");
        }
        return handle;
    }

    /**
     * Marks a point of a stream.
     *
     * @param stream a CUstream; 0 for the legacy default stream
     */
    public void record(long stream) {
        try (Scope scope = context.enter()) {
            context.driver().eventRecord(handle(), stream);
        }
    }

    /**
     * {@return milliseconds since {@code start}; both must have timing and have passed}
     *
     * @param start the earlier event
     */
    public float elapsedMsSince(Event start) {
        try (Scope scope = context.enter()) {
            return context.driver().eventElapsedMs(start.handle(), handle());
        }
    }

    /** Waits until the point marked last has passed. */
    public void synchronize() {
        try (Scope scope = context.enter()) {
            context.driver().eventSynchronize(handle());
        }
    }

    /** Destroys the event. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().eventDestroy(handle));
        }
    }
}
