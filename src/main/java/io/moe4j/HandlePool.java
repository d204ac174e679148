package io.moe4j;

import java.util.Optional;
import java.util.concurrent.atomic.AtomicInteger;

/**
 * Hands out the handles of a layer, so that steps in flight together never share buffers. The
 * handles themselves are allocated when the layer is prepared; claiming and releasing one changes a
 * bit and allocates no device memory. Safe for any thread.
 *
 * <p>Releasing a handle says that no more work will be enqueued on it, not that the device is done:
 * the next claimer enqueues on the same stream or waits for an event of the old one.
 */
public final class HandlePool {
    private final int size;
    private final AtomicInteger claimed = new AtomicInteger();

    /**
     * A pool of handles 0 to {@code size − 1}, all free; 16 at most.
     *
     * @param size 1 to 16
     * @throws IllegalArgumentException if it is not
     */
    public HandlePool(int size) {
        if (size < 1 || size > 16) {
            throw new IllegalArgumentException("size=" + size + " is outside 1..16");
        }
        this.size = size;
    }

    /** A claimed handle; closing it gives it back. */
    public final class Handle implements AutoCloseable {
        private final int index;
        private boolean released;

        private Handle(int index) {
            this.index = index;
        }

        /** {@return its number, for {@link MoeLayer#bind(java.util.List, int)}} */
        public int index() {
            return index;
        }

        /** Gives the handle back. Idempotent. */
        @Override
        public synchronized void close() {
            if (!released) {
                released = true;
                claimed.getAndUpdate(bits -> bits & ~(1 << index));
            }
        }
    }

    /**
     * Claims the lowest free handle.
     *
     * @return the handle; closing it gives it back
     * @throws IllegalStateException if all are claimed
     */
    public Handle claim() {
        return tryClaim()
                .orElseThrow(
                        () ->
                                new IllegalStateException(
                                        "all "
                                                + size
                                                + " handles are claimed: release one, or open the"
                                                + " layer with more handles(...)"));
    }

    /**
     * Claims the lowest free handle, or nothing if all are claimed.
     *
     * @return the handle, or empty
     */
    public Optional<Handle> tryClaim() {
        while (true) {
            int bits = claimed.get();
            int index = Integer.numberOfTrailingZeros(~bits);
            if (index >= size) {
                return Optional.empty();
            }
            if (claimed.compareAndSet(bits, bits | 1 << index)) {
                return Optional.of(new Handle(index));
            }
        }
    }

    /** {@return the number of handles that are free now} */
    public int free() {
        return size - Integer.bitCount(claimed.get());
    }
}
