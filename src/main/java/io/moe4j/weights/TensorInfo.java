package io.moe4j.weights;

import java.util.Arrays;
import java.util.List;

/**
 * What a safetensors header says about one tensor. Immutable.
 *
 * @param type element type
 * @param shape extents, outermost first; empty for a scalar
 * @param begin first byte, counted from the start of the file's data section
 * @param end byte after the last one
 */
public record TensorInfo(StoredType type, List<Long> shape, long begin, long end) {
    /**
     * Copies the shape.
     *
     * @param type {@link #type()}
     * @param shape {@link #shape()}
     * @param begin {@link #begin()}
     * @param end {@link #end()}
     */
    public TensorInfo {
        shape = List.copyOf(shape);
    }

    /** {@return the number of bytes in the file} */
    public long bytes() {
        return end - begin;
    }

    /** {@return the number of elements} */
    public long elements() {
        return shape.stream().reduce(1L, (a, b) -> a * b);
    }

    /**
     * {@return true if the shape is exactly {@code expected}}
     *
     * @param expected the sizes, outermost first
     */
    public boolean hasShape(long... expected) {
        return shape.equals(Arrays.stream(expected).boxed().toList());
    }
}
