package io.moe4j;

/**
 * The phases of a step, in order. Each can be enqueued on its own (see {@link
 * MoeLayer#enqueue(long, BoundStep, Phase, Phase)}), so that an engine may run its own work between
 * them or capture them in separate graphs.
 */
public enum Phase {
    /** Router: logits to expert ids and weights; sanitises ids the caller gave. */
    ROUTE,
    /** Rows and headers into the receive buffers of every rank that owns a chosen expert. */
    DISPATCH_SEND,
    /** Waits for the rows of all ranks, then counts, offsets and row lists. */
    DISPATCH_RECV,
    /** Gate/up GEMM, activation and down GEMM over the rows received. */
    EXPERTS,
    /** Weighted sum per slot in k order, one row home per (slot, home rank). */
    COMBINE_SEND,
    /**
     * Waits for the rows of all ranks, sums them in rank order, adds shared expert and residual.
     */
    COMBINE_RECV
}
