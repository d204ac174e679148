package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/** A non-blocking stream of our own; streams of others are plain {@code long} handles. */
public final class Stream implements AutoCloseable {
    private final Context context;
    private final long handle;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Creates a stream.
     *
     * @param context everything is made and used in it
     */
    public Stream(Context context) {
        this.context = context;
        try (Scope scope = context.enter()) {
            this.handle = context.driver().streamCreate();
        }
    }

    /** {@return the raw stream} */
    public long handle() {
        if (closed.get()) {
            throw new IllegalStateException("the stream is closed");
        }
        return handle;
    }

    /** {@return the context of the stream} */
    public Context context() {
        return context;
    }

    /** Waits for everything enqueued. */
    public void synchronize() {
        try (Scope scope = context.enter()) {
            context.driver().streamSynchronize(handle());
        }
    }

    /** Destroys the stream. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().streamDestroy(handle));
        }
    }
}
