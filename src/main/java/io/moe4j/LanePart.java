package io.moe4j;

import java.util.List;

/**
 * A part of a schedule on several streams, see {@link MoeLayer#lanes}. Parts of one lane run in the
 * order of the list; parts of different lanes may run at the same time, but for what {@code after}
 * says.
 *
 * @param part consecutive phases of a bound step
 * @param lane 0 is the caller's stream; each other number is a stream of its own
 * @param after positions in the schedule of earlier parts that have to end first; those of the same
 *     lane do so anyway
 */
public record LanePart(GraphPart part, int lane, List<Integer> after) {
    /** Lanes a schedule may have. */
    public static final int MOST_LANES = 8;

    /**
     * Checks and copies.
     *
     * @param part consecutive phases of a bound step
     * @param lane 0 to {@link #MOST_LANES} − 1
     * @param after positions of earlier parts
     * @throws IllegalArgumentException if there is no such lane
     */
    public LanePart {
        if (lane < 0 || lane >= MOST_LANES) {
            throw new IllegalArgumentException(
                    "lane=" + lane + " is outside 0.." + (MOST_LANES - 1));
        }
        after = List.copyOf(after);
    }

    /**
     * Checks a schedule, for backends.
     *
     * @param parts in the order they are to be enqueued
     * @return the same
     * @throws IllegalArgumentException if there is no part, or one waits for itself or a later one
     */
    public static List<LanePart> requireOrder(List<LanePart> parts) {
        if (parts.isEmpty()) {
            throw new IllegalArgumentException("nothing to run: give at least one part");
        }
        for (int i = 0; i < parts.size(); i++) {
            for (int before : parts.get(i).after) {
                if (before < 0 || before >= i) {
                    throw new IllegalArgumentException(
                            "part "
                                    + i
                                    + " waits for part "
                                    + before
                                    + ", which does not come before it");
                }
            }
        }
        return List.copyOf(parts);
    }
}
