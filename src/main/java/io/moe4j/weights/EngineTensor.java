package io.moe4j.weights;

import io.moe4j.model.WeightMatrix;
import java.nio.ByteBuffer;
import java.util.Objects;

/**
 * Weights in an engine's own host memory: {@code matrices} matrices of {@code [rows, cols]} =
 * {@code [out, in]} one after the other, row-major, as in a GGUF file or an engine's tensor. Owns
 * and copies nothing; a layer reads it once, in {@code prepare}, from several threads, and the
 * memory must stay mapped until then. Immutable.
 */
public final class EngineTensor {
    /** Memory that hands out views of itself; safe for concurrent use. */
    @FunctionalInterface
    public interface Memory {
        /**
         * {@return a view of {@code bytes} bytes from {@code offset} on, at position 0}
         *
         * @param offset first byte
         * @param bytes how many, below 2 GiB
         */
        ByteBuffer slice(long offset, int bytes);
    }

    private final Memory memory;
    private final GgufType type;
    private final int matrices;
    private final int rows;
    private final int cols;
    private final long rowBytes;

    private EngineTensor(Memory memory, GgufType type, int matrices, int rows, int cols) {
        this.memory = memory;
        this.type = type;
        this.matrices = matrices;
        this.rows = rows;
        this.cols = cols;
        this.rowBytes = type.rowBytes(cols);
    }

    /**
     * A tensor of any size.
     *
     * @param memory the tensor's bytes; of a {@code MemorySegment}: {@code (at, n) ->
     *     segment.asSlice(at, n).asByteBuffer()}
     * @param bytes how many bytes {@code memory} has
     * @param type how elements are stored
     * @param matrices number of matrices, one after the other
     * @param rows rows of each, its outputs
     * @param cols columns of each, its inputs
     * @return the tensor; it keeps no copy
     * @throws IllegalArgumentException if a size is not positive, a row does not end with a block,
     *     or the memory is too small; names the field and the cure
     */
    public static EngineTensor of(
            Memory memory, long bytes, GgufType type, int matrices, int rows, int cols) {
        Objects.requireNonNull(memory, "memory");
        Objects.requireNonNull(type, "type");
        requirePositive("matrices", matrices);
        requirePositive("rows", rows);
        requirePositive("cols", cols);
        EngineTensor tensor = new EngineTensor(memory, type, matrices, rows, cols);
        long needed = Math.multiplyExact(Math.multiplyExact(tensor.rowBytes, rows), matrices);
        if (bytes < needed) {
            throw new IllegalArgumentException(
                    "the memory has "
                            + bytes
                            + " bytes but "
                            + tensor
                            + " needs "
                            + needed
                            + ": give the whole tensor, with its own type and sizes");
        }
        if (tensor.rowBytes > Integer.MAX_VALUE) {
            throw new IllegalArgumentException("cols=" + cols + " makes rows above 2 GiB");
        }
        return tensor;
    }

    /**
     * {@return a tensor below 2 GiB, from the buffer's position on; the buffer's byte order is
     * ignored}
     *
     * @param memory must stay valid until the layer is prepared
     * @param type how elements are stored
     * @param matrices number of matrices, one after the other
     * @param rows rows of each, its outputs
     * @param cols columns of each, its inputs
     * @throws IllegalArgumentException if the buffer is too small
     */
    public static EngineTensor of(
            ByteBuffer memory, GgufType type, int matrices, int rows, int cols) {
        ByteBuffer view = memory.slice();
        return of(
                (offset, bytes) -> view.slice(Math.toIntExact(offset), bytes),
                view.remaining(),
                type,
                matrices,
                rows,
                cols);
    }

    /**
     * A single matrix.
     *
     * @param memory must stay valid until the layer is prepared
     * @param type how elements are stored
     * @param rows rows, the outputs
     * @param cols columns, the inputs
     * @return the tensor
     * @throws IllegalArgumentException if the buffer is too small
     */
    public static EngineTensor of(ByteBuffer memory, GgufType type, int rows, int cols) {
        return of(memory, type, 1, rows, cols);
    }

    /** {@return the only matrix, or the first} */
    public WeightMatrix matrix() {
        return matrix(0);
    }

    /**
     * {@return matrix {@code index}, the expert's number in a tensor of all experts}
     *
     * @param index 0 to {@code matrices − 1}
     * @throws IndexOutOfBoundsException if there is no such matrix
     */
    public WeightMatrix matrix(int index) {
        return matrix(index, 0, 1, rows);
    }

    /**
     * Rows of matrix {@code index} as a matrix of their own: the first half for a gate that is
     * stored in front of its up matrix, every second row for interleaved ones.
     *
     * @param index the expert's number
     * @param first first row taken
     * @param step distance between rows taken
     * @param count rows taken
     * @return a view of these rows
     */
    public WeightMatrix matrix(int index, int first, int step, int count) {
        Objects.checkIndex(index, matrices);
        if (first < 0 || step < 1 || count < 1 || first + (count - 1L) * step >= rows) {
            throw new IllegalArgumentException(
                    "first="
                            + first
                            + " step="
                            + step
                            + " count="
                            + count
                            + " leave the "
                            + rows
                            + " rows of "
                            + this);
        }
        return new Rows(index, first, step, count);
    }

    /** For example {@code Q8_0[60, 1408, 2048]}. */
    @Override
    public String toString() {
        return type + "[" + matrices + ", " + rows + ", " + cols + "]";
    }

    private static void requirePositive(String field, int value) {
        if (value < 1) {
            throw new IllegalArgumentException(
                    field + "=" + value + " is not positive: give the tensor's own sizes");
        }
    }

    private final class Rows implements WeightMatrix {
        private final int index;
        private final int first;
        private final int step;
        private final int count;

        Rows(int index, int first, int step, int count) {
            this.index = index;
            this.first = first;
            this.step = step;
            this.count = count;
        }

        @Override
        public int rows() {
            return count;
        }

        @Override
        public int cols() {
            return cols;
        }

        @Override
        public void read(float[] to) {
            for (int row = 0; row < count; row++) {
                long stored = (long) index * rows + first + (long) row * step;
                ByteBuffer bytes = memory.slice(stored * rowBytes, (int) rowBytes);
                type.decodeRow(bytes, to, row * cols, cols);
            }
        }
    }
}
