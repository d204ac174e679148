package io.moe4j.model;

/**
 * Where the weights of one Mixture-of-Experts layer come from. A backend reads each expert once, in
 * {@code prepare}, and keeps its own packed copy; it may read several experts from several threads.
 * The source must stay open until then.
 */
public interface LayerWeights {
    /** The layer's sizes. */
    MoeShape shape();

    /** Routed expert {@code expert}, 0 ≤ expert &lt; E. */
    ExpertWeights expert(int expert);

    /** Whether the routed experts have biases. */
    boolean hasBias();

    /** Router matrix {@code [E, H]}, or null if the caller always routes itself. */
    WeightMatrix router();

    /** Router bias {@code [E]} added to the logits, or null. */
    float[] routerBias();

    /** Correction bias {@code [E]} added to sigmoid scores for selection only, or null. */
    float[] correctionBias();

    /** The shared expert (several are stored as one wide one), or null. */
    ExpertWeights sharedExpert();

    /**
     * Gate vector {@code [H]} of the shared expert, or null: the shared expert's output is
     * multiplied by {@code sigmoid(gate · x)}.
     */
    float[] sharedExpertGate();

    /** One line that says where the weights come from, for plans and reports. */
    String description();
}
