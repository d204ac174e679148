package io.moe4j;

/**
 * Counts of input a step tolerated, summed over the local ranks since the layer was prepared. None
 * of them makes an output invalid: what happens is defined for each.
 *
 * @param steps steps with a valid output; while one runs it may be among them, and go if it fails
 * @param droppedIds expert ids outside −1..E−1; each was skipped
 * @param duplicateIds repeats of an expert within a token; each contributed again
 * @param overCapacityTokens tokens above M in a step's token count; they were not processed
 * @param lostRows rows that were not sent because their rank was left out by {@link
 *     MoeLayer#recover}; its experts contributed nothing
 */
public record SoftCounters(
        long steps, long droppedIds, long duplicateIds, long overCapacityTokens, long lostRows) {}
