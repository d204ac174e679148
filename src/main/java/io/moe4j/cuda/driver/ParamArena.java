package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.List;

/**
 * Page-locked memory for {@link KernelParams}, taken in chunks so that packing many launches costs
 * few allocations. Why page-locked: it is the only memory whose address both JCuda and JNA take
 * without reflection into the JDK. Owned by whoever opened it; close it after the last launch call
 * has returned. Not thread-safe.
 */
public final class ParamArena implements AutoCloseable {
    private static final int ALIGNMENT = 16;

    private final Context context;
    private final int chunkBytes;
    private final List<PinnedBuffer> chunks = new ArrayList<>();
    private int used;
    private boolean closed;

    /**
     * An arena with chunks of 16 KiB; allocates the first at once.
     *
     * @param context everything is made and used in it
     */
    public ParamArena(Context context) {
        this(context, 16 << 10);
    }

    /**
     * An arena with chunks of at least {@code chunkBytes}; allocates the first at once.
     *
     * @param context everything is made and used in it
     * @param chunkBytes least size of a chunk
     */
    public ParamArena(Context context, int chunkBytes) {
        this.context = context;
        this.chunkBytes = chunkBytes;
        chunks.add(new PinnedBuffer(context, chunkBytes));
    }

    /**
     * {@return the zeroed arguments of the given sizes in bytes, in the order of the kernel's
     * parameters} A kernel with one parameter struct has one argument.
     *
     * @param sizes bytes of each argument
     * @throws IllegalArgumentException if a size is below 1 or all exceed the 32,764 bytes a kernel
     *     can take
     */
    public KernelParams params(int... sizes) {
        if (closed) {
            throw new IllegalStateException("the arena is closed");
        }
        int[] offsets = new int[sizes.length];
        int bytes = 0;
        for (int i = 0; i < sizes.length; i++) {
            if (sizes[i] < 1 || sizes[i] > 32_764 || bytes > 32_764 * ALIGNMENT) {
                throw new IllegalArgumentException(
                        "argument " + i + " has " + sizes[i] + " bytes: 1 to 32764 are possible");
            }
            offsets[i] = bytes;
            bytes += alignUp(sizes[i]);
        }
        int tableOffset = bytes;
        bytes += alignUp(8 * Math.max(1, sizes.length));

        int start = reserve(bytes);
        HostMemory chunk = chunks.get(chunks.size() - 1).memory();
        ByteBuffer all = chunk.bytes().slice(start, bytes).order(ByteOrder.LITTLE_ENDIAN);
        for (int i = 0; i < bytes; i += 8) {
            all.putLong(i, 0);
        }
        for (int i = 0; i < sizes.length; i++) {
            all.putLong(tableOffset + 8 * i, chunk.address() + start + offsets[i]);
        }
        ByteBuffer values = all.slice(0, tableOffset).order(ByteOrder.LITTLE_ENDIAN);
        return new KernelParams(
                values, chunk.address() + start + tableOffset, offsets, sizes.clone());
    }

    /** Frees the memory. Idempotent. */
    @Override
    public void close() {
        if (!closed) {
            closed = true;
            chunks.forEach(PinnedBuffer::close);
        }
    }

    private int reserve(int bytes) {
        if (used + bytes > chunks.get(chunks.size() - 1).size()) {
            chunks.add(new PinnedBuffer(context, Math.max(chunkBytes, bytes)));
            used = 0;
        }
        int start = used;
        used += bytes;
        return start;
    }

    private static int alignUp(int bytes) {
        return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
}
