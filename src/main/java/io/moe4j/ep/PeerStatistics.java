package io.moe4j.ep;

import java.util.List;

/**
 * What one rank received from another, and how long it waited for it. Of the last step that the
 * rank began to combine, unless stated; two fields read together may be of different steps.
 *
 * @param handle the layer's handle
 * @param rank the rank that received
 * @param peer the rank that sent
 * @param rowsReceived rows of hidden states
 * @param waitedNanos for those rows
 * @param waitedCombineNanos for its results; where one kernel combines, in the step before
 * @param waitedTotalNanos for both, in all steps up to those
 * @param expertRowsTotal rows for each of the rank's experts, in ascending order, in all steps. A
 *     token that names an expert counts once for it. Two reads tell what came between
 */
public record PeerStatistics(
        int handle,
        int rank,
        int peer,
        long rowsReceived,
        long waitedNanos,
        long waitedCombineNanos,
        long waitedTotalNanos,
        List<Long> expertRowsTotal) {

    /**
     * Copies the list.
     *
     * @param handle {@link #handle()}
     * @param rank {@link #rank()}
     * @param peer {@link #peer()}
     * @param rowsReceived {@link #rowsReceived()}
     * @param waitedNanos {@link #waitedNanos()}
     * @param waitedCombineNanos {@link #waitedCombineNanos()}
     * @param waitedTotalNanos {@link #waitedTotalNanos()}
     * @param expertRowsTotal {@link #expertRowsTotal()}
     */
    public PeerStatistics {
        expertRowsTotal = List.copyOf(expertRowsTotal);
    }
}
