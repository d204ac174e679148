package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/**
 * A device and a context on it, the root of everything allocated there: the primary context, which
 * it retains, or one that an engine owns. Closed by whoever opened it, after all that was made from
 * it. Never leaves itself current: work happens inside {@link #enter}. Safe for any thread.
 */
public final class Context implements AutoCloseable {
    private final Driver driver;
    private final int device;
    private final long handle;
    private final boolean retained;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Retains the primary context of a device.
     *
     * @param driver calls go through it
     * @param device number of the device
     */
    public Context(Driver driver, int device) {
        this.driver = driver;
        this.device = device;
        this.handle = driver.primaryContextRetain(device);
        this.retained = true;
    }

    private Context(Driver driver, int device, long handle) {
        this.driver = driver;
        this.device = device;
        this.handle = handle;
        this.retained = false;
    }

    /**
     * {@return a context that an engine created and destroys, after everything made from it was
     * closed}
     *
     * @param driver calls go through it
     * @param handle a CUcontext
     * @throws IllegalArgumentException if it cannot be made current
     */
    public static Context ofEngine(Driver driver, long handle) {
        try (Scope scope = driver.enter(handle)) {
            return new Context(driver, driver.contextDevice(), handle);
        } catch (CudaException e) {
            throw new IllegalArgumentException(
                    String.format(
                            "cudaContext=0x%x is no context that lives: pass the CUcontext of the"
                                    + " engine, or 0 for the primary context of the device",
                            handle),
                    e);
        }
    }

    /** {@return whether this is the primary context of the device, retained here} */
    public boolean isPrimary() {
        return retained;
    }

    /** {@return the driver} */
    public Driver driver() {
        return driver;
    }

    /** {@return the number of the device} */
    public int device() {
        return device;
    }

    /** {@return the raw context} */
    public long handle() {
        return handle;
    }

    /**
     * Makes the context current on this thread until the scope closes.
     *
     * @return the context; closing it does not destroy the engine's
     */
    public Scope enter() {
        if (closed.get()) {
            throw new IllegalStateException("the context of device " + device + " is closed");
        }
        return driver.enter(handle);
    }

    /**
     * {@return one attribute of the device}
     *
     * @param attribute which attribute
     */
    public int attribute(DeviceAttribute attribute) {
        return driver.deviceAttribute(device, attribute);
    }

    /** Releases the primary context; an engine's stays as it is. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true) && retained) {
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
