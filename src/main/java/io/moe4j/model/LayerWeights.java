package io.moe4j.model;

/**
 * Where the weights of one Mixture-of-Experts layer come from. A backend reads each expert once, in
 * {@code prepare}, and keeps its own packed copy; it may read several experts from several threads.
 * The source must stay open until then.
 */
public interface LayerWeights {
    /** {@return the layer's sizes} */
    MoeShape shape();

    /**
     * Routed expert {@code expert}. May be called by several threads at a time.
     *
     * @param expert number over all ranks, 0 ≤ expert &lt; E
     * @return its matrices, which are read when they are asked for
     */
    ExpertWeights expert(int expert);

    /** {@return whether the routed experts have biases} */
    boolean hasBias();

    /** {@return the router matrix {@code [E, H]}, or null if the caller always routes itself} */
    WeightMatrix router();

    /** {@return the router bias {@code [E]} that is added to the logits, or null} */
    float[] routerBias();

    /**
     * {@return the correction bias {@code [E]} that is added to sigmoid scores for selection only,
     * or null}
     */
    float[] correctionBias();

    /** {@return the shared expert (several are stored as one wide one), or null} */
    ExpertWeights sharedExpert();

    /**
     * {@return the gate vector {@code [H]} of the shared expert, or null: the shared expert's
     * output is multiplied by {@code sigmoid(gate · x)}}
     */
    float[] sharedExpertGate();

    /** {@return one line that says where the weights come from, for plans and reports} */
    String description();
}
