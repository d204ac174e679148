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
    /** After ROUTE: T of this rank, clamped to 0..M. */
    int tokens();

    /** After ROUTE: expert ids of own tokens, [count, K]; −1 for an id that was dropped. */
    int[] routedIds(int firstToken, int count);

    /** After ROUTE: weights of own tokens, [count, K]. */
    float[] routedWeights(int firstToken, int count);

    /** After DISPATCH_SEND: T of a source rank as it was received. */
    int receivedTokens(int source);

    /** After DISPATCH_SEND: local expert ids of a source's tokens, [count, K]. */
    int[] receivedIds(int source, int firstToken, int count);

    /** After DISPATCH_SEND: weights of a source's tokens, [count, K]. */
    float[] receivedWeights(int source, int firstToken, int count);

    /**
     * After DISPATCH_SEND: rows of a source's tokens, [count, H]; only those with an expert here.
     */
    float[] receivedRows(int source, int firstToken, int count);

    /** After DISPATCH_RECV: rows of each local expert. */
    int[] expertCounts();

    /** After DISPATCH_RECV: first packed row of each local expert, then the number of all rows. */
    int[] expertOffsets();

    /** After DISPATCH_RECV: the slot of each packed row, [count]. */
    int[] rowSlots(int firstRow, int count);

    /**
     * After DISPATCH_RECV: the packed row of each header entry of a source's tokens, [count, K]; −1
     * where the entry's id is −1.
     */
    int[] packedRows(int source, int firstToken, int count);

    /** After EXPERTS: output of the activation, [count, I], by packed row. */
    float[] activatedRows(int firstRow, int count);

    /** After EXPERTS: output of the down projection, [count, H], by packed row. */
    float[] expertOutputs(int firstRow, int count);

    /**
     * After COMBINE_SEND: the rows that came home from an expert rank for own tokens, [count, H];
     * only those of tokens with an expert there.
     */
    float[] combinedRows(int expertRank, int firstToken, int count);

    /**
     * After COMBINE_RECV: output of the shared expert for own tokens before its gate, [count, H].
     *
     * @throws IllegalStateException if the layer computes no shared expert
     */
    float[] sharedOutputs(int firstToken, int count);
}
