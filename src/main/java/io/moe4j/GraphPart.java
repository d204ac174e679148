package io.moe4j;

/**
 * Consecutive phases of a bound step, as part of a {@link MoeGraph}.
 *
 * @param step a bound step; steps of different layers of one backend may share a graph
 * @param first first phase
 * @param last last phase, included
 */
public record GraphPart(BoundStep step, Phase first, Phase last) {
    /**
     * Checks the order of the phases.
     *
     * @param step what it belongs to
     * @param first first phase
     * @param last last phase, not before the first
     * @throws IllegalArgumentException if {@code last} comes before {@code first}
     */
    public GraphPart {
        if (first.compareTo(last) > 0) {
            throw new IllegalArgumentException("phase " + first + " comes after " + last);
        }
    }

    /**
     * {@return all phases of a step}
     *
     * @param step bound by a layer
     */
    public static GraphPart whole(BoundStep step) {
        return new GraphPart(step, Phase.ROUTE, Phase.COMBINE_RECV);
    }
}
