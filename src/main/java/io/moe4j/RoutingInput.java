package io.moe4j;

/** What a step gets from the caller to decide which experts a token visits. */
public enum RoutingInput {
    /** The caller gives expert ids (I32 [M, K]) and weights (F32 [M, K]). */
    TOPK,
    /** The caller gives router logits (F32 [M, E]); the layer applies its routing rule. */
    LOGITS,
    /** The layer multiplies the hidden states with its own router matrix, then applies its rule. */
    HIDDEN
}
