package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.util.concurrent.atomic.AtomicBoolean;

/** Page-locked, mapped host memory, freed on close; do not touch its bytes after that. */
public final class PinnedBuffer implements AutoCloseable {
    private final Context context;
    private final HostMemory memory;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Allocates {@code size} bytes, at least 1 and at most 2 GiB.
     *
     * @param context everything is made and used in it
     * @param size how many bytes
     */
    public PinnedBuffer(Context context, long size) {
        this.context = context;
        try (Scope scope = context.enter()) {
            this.memory = context.driver().hostAlloc(size);
        }
    }

    /** {@return the memory, for copies} */
    public HostMemory memory() {
        if (closed.get()) {
            throw new IllegalStateException("the pinned buffer is closed");
        }
        return memory;
    }

    /** {@return the bytes, little endian} */
    public ByteBuffer bytes() {
        return memory().bytes();
    }

    /** {@return where kernels reach it} */
    public long deviceAddress() {
        return memory().deviceAddress();
    }

    /** {@return the size in bytes} */
    public long size() {
        return memory.size();
    }

    /** Frees the memory; waits for the device. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().hostFree(memory));
        }
    }
}
