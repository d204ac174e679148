package io.moe4j.checker;

/**
 * Input of one layer and what must come out of it.
 *
 * @param layer number of the layer in its checkpoint
 * @param source what the expectation comes from, for reports: {@code golden} or {@code oracle}
 * @param tokens T
 * @param hidden input, [T, H]
 * @param routing expected experts and weights
 * @param routed expected output of the routed experts alone, [T, H]
 * @param full expected output with the shared expert, [T, H]; equals {@code routed} without one
 */
public record ReferenceCase(
        int layer,
        String source,
        int tokens,
        float[] hidden,
        Routing routing,
        double[] routed,
        double[] full) {
    /**
     * Checks that all parts have the same number of tokens.
     *
     * @param layer {@link #layer()}
     * @param source {@link #source()}
     * @param tokens {@link #tokens()}
     * @param hidden {@link #hidden()}
     * @param routing {@link #routing()}
     * @param routed {@link #routed()}
     * @param full {@link #full()}
     * @throws IllegalArgumentException if a value is refused; the message names field and value
     */
    public ReferenceCase {
        if (tokens < 1
                || routing.tokens() != tokens
                || hidden.length % tokens != 0
                || routed.length != hidden.length
                || full.length != hidden.length) {
            throw new IllegalArgumentException(
                    "reference case of layer "
                            + layer
                            + " with "
                            + tokens
                            + " tokens has parts of other sizes: hidden "
                            + hidden.length
                            + ", routing for "
                            + routing.tokens()
                            + ", routed "
                            + routed.length
                            + ", full "
                            + full.length);
        }
    }

    /** {@return H} */
    public int width() {
        return hidden.length / tokens;
    }
}
