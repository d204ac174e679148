package io.moe4j;

import java.util.List;
import java.util.Set;

/**
 * What the ranks of a layer agreed on when they recovered.
 *
 * @param generation counts recoveries; all ranks are in the same one
 * @param members the ranks that take part from now on
 * @param epoch after which steps count: the first step of every handle is {@code epoch + 1}, for
 *     {@link MoeLayer#result}
 * @param validEpochs by handle: the last step whose output was valid on all members
 */
public record Recovery(int generation, Set<Integer> members, long epoch, List<Long> validEpochs) {
    /** Where the generation lies in an epoch. */
    private static final int GENERATION_SHIFT = 48;

    /**
     * Copies the collections.
     *
     * @param generation {@link #generation()}
     * @param members {@link #members()}
     * @param epoch {@link #epoch()}
     * @param validEpochs {@link #validEpochs()}
     */
    public Recovery {
        members = Set.copyOf(members);
        validEpochs = List.copyOf(validEpochs);
    }

    /**
     * {@return the epoch before the first step of a generation}
     *
     * @param generation 0 when a layer opens
     */
    public static long epochOf(int generation) {
        return (long) generation << GENERATION_SHIFT;
    }

    /**
     * {@return an epoch for people: the step, and the generation before it unless that is 0}
     *
     * @param epoch generation · 2^48 + step
     */
    public static String describe(long epoch) {
        long step = epoch & ((1L << GENERATION_SHIFT) - 1);
        long generation = epoch >>> GENERATION_SHIFT;
        return generation == 0 ? Long.toString(step) : generation + ":" + step;
    }
}
