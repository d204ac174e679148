package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/** Device memory of another process, mapped here; unmapped on close. The other process owns it. */
public final class ImportedBuffer implements AutoCloseable {
    /**
     * why: two ranks of a process that map the same memory at the same time may be refused
     * (ALREADY_MAPPED); one after the other both get the same address, which the driver counts.
     */
    private static final Object MAPPING = new Object();

    private final Context context;
    private final long address;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Maps it.
     *
     * @param context everything is made and used in it
     * @param handle the 64 bytes that the owner got for it
     */
    public ImportedBuffer(Context context, byte[] handle) {
        this.context = context;
        try (Scope scope = context.enter()) {
            synchronized (MAPPING) {
                this.address = context.driver().ipcOpenMemHandle(handle);
            }
        }
    }

    /** {@return where it is in this process} */
    public long address() {
        if (closed.get()) {
            throw new IllegalStateException("the imported buffer is closed");
        }
        return address;
    }

    /** Unmaps it. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            synchronized (MAPPING) {
                context.release(() -> context.driver().ipcCloseMemHandle(address));
            }
        }
    }
}
