package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/**
 * A device and its retained primary context, the root of everything allocated on it. Owned by
 * whoever opened it, closed after all that was made from it. Never leaves itself current: work
 * happens inside {@link #enter}. Safe for any thread.
 */
public final class Context implements AutoCloseable {
    private final Driver driver;
    private final int device;
    private final long handle;
    private final AtomicBoolean closed = new AtomicBoolean();

    /** Retains the primary context of a device. */
    public Context(Driver driver, int device) {
        this.driver = driver;
        this.device = device;
        this.handle = driver.primaryContextRetain(device);
    }

    /** The driver. */
    public Driver driver() {
        return driver;
    }

    /** Number of the device. */
    public int device() {
        return device;
    }

    /** The raw context. */
    public long handle() {
        return handle;
    }

    /** Makes the context current on this thread until the scope closes. */
    public Scope enter() {
        if (closed.get()) {
            throw new IllegalStateException("the context of device " + device + " is closed");
        }
        return driver.enter(handle);
    }

    /** One attribute of the device. */
    public int attribute(DeviceAttribute attribute) {
        return driver.deviceAttribute(device, attribute);
    }

    /** Releases the primary context. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            ignoringLostContext(() -> driver.primaryContextRelease(device));
        }
    }

    /**
     * Frees something inside this context. A context that is lost has nothing left to free, so its
     * errors are not reported a second time.
     */
    void release(Runnable free) {
        ignoringLostContext(
                () -> {
                    try (Scope scope = enter()) {
                        free.run();
                    }
                });
    }

    private static void ignoringLostContext(Runnable free) {
        try {
            free.run();
        } catch (CudaException e) {
            if (!e.poisonsContext() && e.code() != CudaErrors.DEINITIALIZED) {
                throw e;
            }
        }
    }
}
