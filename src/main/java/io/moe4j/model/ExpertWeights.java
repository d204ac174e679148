package io.moe4j.model;

/**
 * The weights of one gated feed-forward expert (routed or shared): {@code down · activation(gate ·
 * x + gateBias, up · x + upBias) + downBias}.
 *
 * @param gate {@code [I, H]}
 * @param up {@code [I, H]}
 * @param down {@code [H, I]}
 * @param gateBias {@code [I]} or null
 * @param upBias {@code [I]} or null
 * @param downBias {@code [H]} or null
 */
public record ExpertWeights(
        WeightMatrix gate,
        WeightMatrix up,
        WeightMatrix down,
        float[] gateBias,
        float[] upBias,
        float[] downBias) {
    /**
     * Checks that the three matrices and the biases fit each other.
     *
     * @param gate {@code [I, H]}; gives I and H
     * @param up {@code [I, H]}
     * @param down {@code [H, I]}
     * @param gateBias {@code [I]}, or null together with the others
     * @param upBias {@code [I]} or null
     * @param downBias {@code [H]} or null
     * @throws IllegalArgumentException naming the matrix or bias that does not fit
     */
    public ExpertWeights {
        int intermediate = gate.rows();
        int hidden = gate.cols();
        requireMatrix("up", up, intermediate, hidden);
        requireMatrix("down", down, hidden, intermediate);
        requireBias("gateBias", gateBias, intermediate);
        requireBias("upBias", upBias, intermediate);
        requireBias("downBias", downBias, hidden);
        if ((gateBias == null) != (upBias == null) || (gateBias == null) != (downBias == null)) {
            throw new IllegalArgumentException(
                    "gateBias, upBias and downBias must be all given or all null");
        }
    }

    /**
     * {@return an expert without biases}
     *
     * @param gate {@code [I, H]}
     * @param up {@code [I, H]}
     * @param down {@code [H, I]}
     * @throws IllegalArgumentException naming the matrix that does not fit
     */
    public static ExpertWeights of(WeightMatrix gate, WeightMatrix up, WeightMatrix down) {
        return new ExpertWeights(gate, up, down, null, null, null);
    }

    /** {@return true if the expert has biases} */
    public boolean hasBias() {
        return gateBias != null;
    }

    private static void requireMatrix(String name, WeightMatrix matrix, int rows, int cols) {
        if (matrix.rows() != rows || matrix.cols() != cols) {
            throw new IllegalArgumentException(
                    name
                            + " is ["
                            + matrix.rows()
                            + ", "
                            + matrix.cols()
                            + "] but the gate matrix asks for ["
                            + rows
                            + ", "
                            + cols
                            + "]");
        }
    }

    private static void requireBias(String name, float[] bias, int length) {
        if (bias != null && bias.length != length) {
            throw new IllegalArgumentException(
                    name + " has " + bias.length + " elements, expected " + length);
        }
    }
}
