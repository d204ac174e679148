package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * Page-locked host memory that every device can address; owned by whoever called {@link
 * Driver#hostAlloc} until {@link Driver#hostFree}. Its bytes must not be touched after that.
 *
 * @param address host address
 * @param deviceAddress address at which kernels reach the same bytes
 * @param bytes the memory, little endian, position 0 to its size
 */
public record HostMemory(long address, long deviceAddress, ByteBuffer bytes) {
    /**
     * Checks that the memory is direct; sets little-endian order.
     *
     * @param address {@link #address()}
     * @param deviceAddress {@link #deviceAddress()}
     * @param bytes {@link #bytes()}
     * @throws IllegalArgumentException if a value is refused; the message names field and value
     */
    public HostMemory {
        if (!bytes.isDirect()) {
            throw new IllegalArgumentException("host memory needs a direct buffer");
        }
        bytes = bytes.duplicate().order(ByteOrder.LITTLE_ENDIAN);
        bytes.clear();
    }

    /** {@return the size in bytes} */
    public long size() {
        return bytes.capacity();
    }

    /**
     * Checks that {@code count} bytes from {@code offset} lie inside.
     *
     * @param offset first byte
     * @param count how many bytes
     * @throws IndexOutOfBoundsException with the range and the size
     */
    public void checkRange(long offset, long count) {
        if (offset < 0 || count < 0 || offset > size() - count) {
            throw new IndexOutOfBoundsException(
                    "bytes " + offset + "+" + count + " are outside of " + size() + " bytes");
        }
    }
}
