package io.moe4j.observe;

/**
 * Why a step has no valid output.
 *
 * @param operation the wait that failed: {@code dispatch_recv}, {@code combine_recv}, or {@code
 *     experts}, which waits for products of its own
 * @param rank the rank that waited
 * @param peer the rank it waited for; its own for experts
 * @param cause what happened, as in "timed out"
 * @param waitedNs how long it waited
 * @param epochExpected the epoch it waited for; for experts the half tiles of an expert
 * @param epochSeen the epoch it saw; for experts the half tiles that were finished
 * @param validEpoch the last epoch of the handle with a valid output
 */
public record LayerFault(
        String operation,
        int rank,
        int peer,
        String cause,
        long waitedNs,
        long epochExpected,
        long epochSeen,
        long validEpoch) {}
