package io.moe4j.cuda.layout;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * Named buffers at 256-byte aligned offsets of one allocation, each with the formula of its size.
 * Immutable once built.
 */
public final class Region {
    private static final long ALIGNMENT = 256;

    /** A region without buffers; add them in the order they are to lie. */
    public Region() {}

    /**
     * One buffer of a region.
     *
     * @param name as in docs/memory.md
     * @param formula of its size in bytes
     * @param offset from the region's start, a multiple of 256
     * @param bytes its size
     */
    public record Field(String name, String formula, long offset, long bytes) {}

    private final Map<String, Field> fields = new LinkedHashMap<>();
    private long size;

    /** Appends a buffer whose size is the exact product of {@code factors}; none if that is 0. */
    Region add(String name, String formula, long... factors) {
        long bytes = 1;
        for (long factor : factors) {
            bytes = Math.multiplyExact(bytes, factor);
        }
        if (bytes > 0) {
            fields.put(name, new Field(name, formula, size, bytes));
            size = Math.addExact(size, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        }
        return this;
    }

    /** {@return the bytes of the whole region} */
    public long size() {
        return size;
    }

    /**
     * {@return whether the region has that buffer}
     *
     * @param name name of the buffer
     */
    public boolean has(String name) {
        return fields.containsKey(name);
    }

    /**
     * {@return the offset of a buffer}
     *
     * @param name name of the buffer
     * @throws IllegalArgumentException if the region lacks it
     */
    public long offset(String name) {
        return field(name).offset();
    }

    /**
     * {@return the address of a buffer in a region that starts at {@code base}; 0 if the region
     * lacks it}
     *
     * @param base address of the region
     * @param name name of the buffer
     */
    public long address(long base, String name) {
        Field field = fields.get(name);
        return field == null ? 0L : base + field.offset();
    }

    /**
     * {@return a buffer}
     *
     * @param name name of the buffer
     * @throws IllegalArgumentException if the region lacks it
     */
    public Field field(String name) {
        Field field = fields.get(name);
        if (field == null) {
            throw new IllegalArgumentException("no buffer " + name + " in " + fields.keySet());
        }
        return field;
    }

    /** {@return all buffers in order} */
    public List<Field> fields() {
        return new ArrayList<>(fields.values());
    }
}
