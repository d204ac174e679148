package io.moe4j.ep;

/**
 * What one rank received from another, and how long it waited for it. Of the last step that was
 * valid, unless stated; two fields read together may be of different steps.
 *
 * @param handle the layer's handle
 * @param rank the rank that received
 * @param peer the rank that sent
 * @param rowsReceived rows of hidden states
 * @param waitedNanos for those rows
 * @param waitedCombineNanos for its results
 * @param waitedTotalNanos for both, in all steps
 */
public record PeerStatistics(
        int handle,
        int rank,
        int peer,
        long rowsReceived,
        long waitedNanos,
        long waitedCombineNanos,
        long waitedTotalNanos) {}
