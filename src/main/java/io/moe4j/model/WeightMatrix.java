package io.moe4j.model;

/**
 * One weight matrix in logical orientation {@code [rows = outputs, cols = inputs]}, decoded on
 * demand from wherever it is stored (a mapped file, a generator, an engine's own tensor).
 * Implementations are safe for concurrent reads.
 */
public interface WeightMatrix {
    /** {@return the number of outputs} */
    int rows();

    /** {@return the number of inputs} */
    int cols();

    /**
     * Decodes the whole matrix to float32, row-major.
     *
     * @param to destination, at least {@code rows · cols} long; elements past that stay untouched
     */
    void read(float[] to);

    /**
     * {@return a matrix over an array, {@code [rows, cols]} row-major; the array is not copied}
     *
     * @param values exactly {@code rows · cols}, row-major
     * @param rows number of outputs
     * @param cols number of inputs
     * @throws IllegalArgumentException if the number of values does not fit
     */
    static WeightMatrix of(float[] values, int rows, int cols) {
        if (values.length != Math.multiplyExact(rows, cols)) {
            throw new IllegalArgumentException(
                    "got " + values.length + " values for a matrix of " + rows + " x " + cols);
        }
        return new WeightMatrix() {
            @Override
            public int rows() {
                return rows;
            }

            @Override
            public int cols() {
                return cols;
            }

            @Override
            public void read(float[] to) {
                System.arraycopy(values, 0, to, 0, values.length);
            }
        };
    }
}
