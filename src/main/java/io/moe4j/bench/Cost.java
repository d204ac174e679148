package io.moe4j.bench;

/**
 * What a stage has to move and to compute, at least: weights of the experts that have rows, rows in
 * and out, multiply-adds of valid rows; all bfloat16.
 *
 * @param bytes moved
 * @param weightBytes of them weights
 * @param flops two per multiply-add
 */
public record Cost(double bytes, double weightBytes, double flops) {
    /** Bytes per second a floor assumes: an H200's memory. */
    public static final double FLOOR_BYTES_PER_S = 4.3e12;

    /** Operations per second a floor assumes: an H200's bfloat16 tensor cores. */
    public static final double FLOOR_FLOPS_PER_S = 790e12;

    /**
     * {@return the experts of one rank} Rows of g1 are read with width H and written with 2·I,
     * those of g2 with I and H, those of the chain with H and H.
     *
     * @param stage G1, G2 or CHAIN
     * @param hidden H
     * @param intermediate I
     * @param rows rows over all experts
     * @param hit experts that have rows
     */
    public static Cost experts(Stage stage, int hidden, int intermediate, long rows, int hit) {
        double matrix = (double) hidden * intermediate;
        double matrices;
        double rowElements;
        switch (stage) {
            case G1 -> {
                matrices = 2;
                rowElements = hidden + 2.0 * intermediate;
            }
            case G2 -> {
                matrices = 1;
                rowElements = hidden + intermediate;
            }
            case CHAIN -> {
                matrices = 3;
                rowElements = 2.0 * hidden;
            }
            default -> throw new IllegalArgumentException("no cost is defined for " + stage);
        }
        double weightBytes = 2 * hit * matrices * matrix;
        return new Cost(
                weightBytes + 2 * rows * rowElements, weightBytes, 2 * rows * matrices * matrix);
    }

    /**
     * {@return both together}
     *
     * @param other what to add
     */
    public Cost plus(Cost other) {
        return new Cost(bytes + other.bytes, weightBytes + other.weightBytes, flops + other.flops);
    }

    /**
     * {@return the time an H200 needs at least: max(bytes / 4.3 TB/s, flops / 790 TFLOP/s), in µs}
     */
    public double floorUs() {
        return 1e6 * Math.max(bytes / FLOOR_BYTES_PER_S, flops / FLOOR_FLOPS_PER_S);
    }
}
