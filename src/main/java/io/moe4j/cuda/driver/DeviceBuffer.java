package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/** Device memory, freed on close. Not zeroed; whoever closes it knows that no work uses it. */
public final class DeviceBuffer implements AutoCloseable {
    private final Context context;
    private final long address;
    private final long size;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Allocates {@code size} bytes, at least 1.
     *
     * @param context everything is made and used in it
     * @param size how many bytes
     */
    public DeviceBuffer(Context context, long size) {
        this.context = context;
        this.size = size;
        try (Scope scope = context.enter()) {
            this.address = context.driver().memAlloc(size);
        }
    }

    /** {@return where it is} */
    public long address() {
        if (closed.get()) {
            throw new IllegalStateException("the device buffer is closed");
        }
        return address;
    }

    /** {@return the size in bytes} */
    public long size() {
        return size;
    }

    /** Frees the memory; waits for the device. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().memFree(address));
        }
    }
}
