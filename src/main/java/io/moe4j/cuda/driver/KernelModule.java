package io.moe4j.cuda.driver;

import java.util.concurrent.atomic.AtomicBoolean;

/** A loaded kernel image, unloaded on close; its functions die with it. */
public final class KernelModule implements AutoCloseable {
    private final Context context;
    private final String name;
    private final long handle;
    private final AtomicBoolean closed = new AtomicBoolean();

    /**
     * Loads a cubin, a fat binary or PTX text.
     *
     * @param context everything is made and used in it
     * @param name for messages
     * @param image the image; PTX ends with a zero byte
     */
    public KernelModule(Context context, String name, byte[] image) {
        this.context = context;
        this.name = name;
        try (Scope scope = context.enter()) {
            this.handle = context.driver().moduleLoad(image);
        }
    }

    /**
     * {@return the kernel of that name, ready to launch; call before any capture}
     *
     * @param kernel its symbol
     */
    public long function(String kernel) {
        if (closed.get()) {
            throw new IllegalStateException("module " + name + " is closed");
        }
        try (Scope scope = context.enter()) {
            return context.driver().moduleGetFunction(handle, kernel);
        }
    }

    /**
     * {@return the kernel of that name, allowed to use that much dynamic shared memory}
     *
     * @param kernel its symbol
     * @param dynamicSharedBytes bytes of dynamic shared memory of a block
     */
    public long function(String kernel, int dynamicSharedBytes) {
        long function = function(kernel);
        try (Scope scope = context.enter()) {
            context.driver()
                    .funcSetAttribute(
                            function, FuncAttribute.MAX_DYNAMIC_SHARED_BYTES, dynamicSharedBytes);
        }
        return function;
    }

    /** Unloads the image. Idempotent. */
    @Override
    public void close() {
        if (closed.compareAndSet(false, true)) {
            context.release(() -> context.driver().moduleUnload(handle));
        }
    }
}
