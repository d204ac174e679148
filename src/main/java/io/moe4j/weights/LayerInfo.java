package io.moe4j.weights;

/**
 * One layer of a checkpoint, as its tensors show it.
 *
 * @param index the layer's number
 * @param kind what its feed-forward part is
 * @param description one line for users, such as {@code layer 0: dense (mlp.gate_proj), not a MoE
 *     layer}
 */
public record LayerInfo(int index, Kind kind, String description) {
    /** What a layer's feed-forward part is. */
    public enum Kind {
        /** Router and experts. */
        MOE,
        /** One feed-forward network for all tokens. */
        DENSE,
        /** None that is recognised. */
        OTHER
    }
}
