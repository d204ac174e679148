package io.moe4j.model;

/**
 * The sizes of one Mixture-of-Experts layer.
 *
 * @param hidden H, width of a token's hidden state
 * @param intermediate I, width between the gate/up and the down projection of one routed expert
 * @param experts E, number of routed experts over all ranks
 * @param topK K, experts per token
 * @param sharedIntermediate width of the shared expert, 0 if the layer has none (several shared
 *     experts are stored, and counted here, as one wide one)
 */
public record MoeShape(
        int hidden, int intermediate, int experts, int topK, int sharedIntermediate) {
    /** Largest topK: one warp's worth of experts per token. */
    public static final int MAX_TOP_K = 32;

    /**
     * Checks every field; messages name the field, the value and the cure.
     *
     * @param hidden H, positive
     * @param intermediate I, positive
     * @param experts E, positive
     * @param topK K, from 1 to E and at most {@link #MAX_TOP_K}
     * @param sharedIntermediate width of the shared expert; 0 for none
     * @throws IllegalArgumentException naming field, value and cure
     */
    public MoeShape {
        requirePositive("hidden", hidden);
        requirePositive("intermediate", intermediate);
        requirePositive("experts", experts);
        requirePositive("topK", topK);
        if (topK > experts) {
            throw new IllegalArgumentException(
                    "topK=" + topK + " exceeds experts=" + experts + ": choose topK <= experts");
        }
        if (topK > MAX_TOP_K) {
            throw new IllegalArgumentException(
                    "topK=" + topK + " exceeds the supported maximum " + MAX_TOP_K);
        }
        if (sharedIntermediate < 0) {
            throw new IllegalArgumentException(
                    "sharedIntermediate="
                            + sharedIntermediate
                            + " is negative: use 0 for a layer without shared experts");
        }
    }

    /**
     * {@return a layer without shared experts}
     *
     * @param hidden H
     * @param intermediate I
     * @param experts E
     * @param topK K
     * @throws IllegalArgumentException naming field, value and cure
     */
    public static MoeShape of(int hidden, int intermediate, int experts, int topK) {
        return new MoeShape(hidden, intermediate, experts, topK, 0);
    }

    /** {@return the weights of one routed expert: gate, up and down, 3·H·I elements} */
    public long expertElements() {
        return 3L * hidden * intermediate;
    }

    private static void requirePositive(String field, int value) {
        if (value <= 0) {
            throw new IllegalArgumentException(
                    field + "=" + value + " is not positive: give the layer's real size");
        }
    }
}
