package io.moe4j;

/**
 * Debug: what the stages of a step wrote on one rank, copied to the host range by range. Obtained
 * by {@link MoeLayer#inspect} and valid until the next phase of the handle is enqueued. Every
 * method waits for the device; only what a phase wrote that has already run has a meaning.
 *
 * <p>A <i>slot</i> is source · M + token. Tokens of a range beyond the source's number of tokens
 * hold leftovers of earlier steps. The expert numbers of headers are local: 0 to {@code
 * config().expertsOn(rank) − 1}, −1 for an entry that belongs to another rank or to none.
 */
public interface StepInspection {
    /** {@return T of this rank, clamped to 0..M} Filled by phase ROUTE. */
    int tokens();

    /**
     * {@return the expert ids of own tokens, [count, K]; −1 for an id that was dropped} Filled by
     * phase ROUTE.
     *
     * @param firstToken first token
     * @param count how many
     */
    int[] routedIds(int firstToken, int count);

    /**
     * {@return the weights of own tokens, [count, K]} Filled by phase ROUTE.
     *
     * @param firstToken first token
     * @param count how many
     */
    float[] routedWeights(int firstToken, int count);

    /**
     * {@return T of a source rank as it was received} Filled by phase DISPATCH_SEND.
     *
     * @param source source rank
     */
    int receivedTokens(int source);

    /**
     * {@return the local expert ids of a source's tokens, [count, K]} Filled by phase
     * DISPATCH_SEND.
     *
     * @param source source rank
     * @param firstToken first token
     * @param count how many
     */
    int[] receivedIds(int source, int firstToken, int count);

    /**
     * {@return the weights of a source's tokens, [count, K]} Filled by phase DISPATCH_SEND.
     *
     * @param source source rank
     * @param firstToken first token
     * @param count how many
     */
    float[] receivedWeights(int source, int firstToken, int count);

    /**
     * {@return the rows of a source's tokens, [count, H]; only those with an expert here} Filled by
     * phase DISPATCH_SEND.
     *
     * @param source source rank
     * @param firstToken first token
     * @param count how many
     */
    float[] receivedRows(int source, int firstToken, int count);

    /** {@return the rows of each local expert} Filled by phase DISPATCH_RECV. */
    int[] expertCounts();

    /**
     * {@return the first packed row of each local expert, then the number of all rows} Filled by
     * phase DISPATCH_RECV.
     */
    int[] expertOffsets();

    /**
     * {@return the slot of each packed row, [count]} Filled by phase DISPATCH_RECV.
     *
     * @param firstRow first packed row
     * @param count how many
     */
    int[] rowSlots(int firstRow, int count);

    /**
     * {@return the packed row of each header entry of a source's tokens, [count, K]; −1 where the
     * entry's id is −1} Filled by phase DISPATCH_RECV.
     *
     * @param source source rank
     * @param firstToken first token
     * @param count how many
     */
    int[] packedRows(int source, int firstToken, int count);

    /**
     * {@return the output of the activation, [count, I], by packed row} Filled by phase EXPERTS.
     *
     * @param firstRow first packed row
     * @param count how many
     */
    float[] activatedRows(int firstRow, int count);

    /**
     * {@return the output of the down projection, [count, H], by packed row} Filled by phase
     * EXPERTS.
     *
     * @param firstRow first packed row
     * @param count how many
     */
    float[] expertOutputs(int firstRow, int count);

    /**
     * {@return the rows that came home from an expert rank for own tokens, [count, H]; only those
     * of tokens with an expert there} Filled by phase COMBINE_SEND.
     *
     * @param expertRank the rank that holds the experts
     * @param firstToken first token
     * @param count how many
     */
    float[] combinedRows(int expertRank, int firstToken, int count);

    /**
     * {@return the output of the shared expert for own tokens before its gate, [count, H]} Filled
     * by phase COMBINE_RECV.
     *
     * @param firstToken first token
     * @param count how many
     * @throws IllegalStateException if the layer computes no shared expert
     */
    float[] sharedOutputs(int firstToken, int count);
}
