package io.moe4j.checker;

import io.moe4j.Phase;

/** What {@link StageChecker} compares, in the order a step makes it. */
public enum Stage {
    /** T of each rank. */
    TOKENS(Phase.ROUTE, "token count"),
    /** Sanitised expert ids, in order. */
    EXPERT_IDS(Phase.ROUTE, "expert ids"),
    /** Weights of those ids. */
    ROUTING_WEIGHTS(Phase.ROUTE, "routing weights"),
    /** T of each source as a rank received it. */
    RECEIVED_TOKENS(Phase.DISPATCH_SEND, "received token counts"),
    /** Local expert ids in the headers. */
    RECEIVED_IDS(Phase.DISPATCH_SEND, "received expert ids"),
    /** Weights in the headers. */
    RECEIVED_WEIGHTS(Phase.DISPATCH_SEND, "received weights"),
    /** Rows of the tokens that have an expert on the rank. */
    RECEIVED_ROWS(Phase.DISPATCH_SEND, "received rows"),
    /** Rows of each expert. */
    EXPERT_COUNTS(Phase.DISPATCH_RECV, "expert counts"),
    /** First packed row of each expert. */
    EXPERT_OFFSETS(Phase.DISPATCH_RECV, "expert offsets"),
    /** The slot of each packed row. */
    ROW_LISTS(Phase.DISPATCH_RECV, "row lists"),
    /** The packed row of each header entry. */
    PACKED_ROWS(Phase.DISPATCH_RECV, "packed rows"),
    /** Output of gate/up and the activation. */
    ACTIVATED_ROWS(Phase.EXPERTS, "activated rows"),
    /** Output of the down projection. */
    EXPERT_OUTPUTS(Phase.EXPERTS, "expert outputs"),
    /** One weighted row per token and rank that has one of its experts. */
    COMBINED_ROWS(Phase.COMBINE_SEND, "combined rows"),
    /** Output of the shared expert before its gate; layers with one only. */
    SHARED_OUTPUT(Phase.COMBINE_RECV, "shared expert output"),
    /** The layer's output. */
    OUTPUT(Phase.COMBINE_RECV, "output"),
    /** Output rows past each rank's tokens, which a step must not write. */
    PADDING(Phase.COMBINE_RECV, "rows past the token count");

    private final Phase phase;
    private final String title;

    Stage(Phase phase, String title) {
        this.phase = phase;
        this.title = title;
    }

    /** {@return the phase after which the stage can be compared} */
    public Phase phase() {
        return phase;
    }

    /** {@return the name for people} */
    public String title() {
        return title;
    }
}
