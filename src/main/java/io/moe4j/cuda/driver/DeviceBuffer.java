package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
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

    /**
     * Copies bytes to the beginning and waits until they are there. Fit for a time when another
     * stream is being captured.
     *
     * @param bytes from position to limit, at most as many as the buffer has
     */
    public void upload(ByteBuffer bytes) {
        int count = bytes.remaining();
        // why a stream of its own: the legacy stream may wait for one that is being captured
        try (Scope scope = context.enter();
                PinnedBuffer pinned = new PinnedBuffer(context, count);
                Stream stream = new Stream(context)) {
            pinned.bytes().put(0, bytes, bytes.position(), count);
            context.driver().memcpyHtoDAsync(address(), pinned.memory(), 0, count, stream.handle());
            stream.synchronize();
        }
    }

    /** Frees the memory; waits for the device. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().memFree(address));
        }
    }
}
