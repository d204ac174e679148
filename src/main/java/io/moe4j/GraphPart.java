package io.moe4j;

/**
 * Consecutive phases of a bound step, as part of a {@link MoeGraph}.
 *
 * @param step a bound step; steps of different layers of one backend may share a graph
 * @param first first phase
 * @param last last phase, included
 */
public record GraphPart(BoundStep step, Phase first, Phase last) {
    /** Checks the order of the phases. */
    public GraphPart {
        if (first.compareTo(last) > 0) {
            throw new IllegalArgumentException("phase " + first + " comes after " + last);
        }
    }

    /** All phases of a step. */
    public static GraphPart whole(BoundStep step) {
        return new GraphPart(step, Phase.ROUTE, Phase.COMBINE_RECV);
    }
}
