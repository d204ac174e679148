package io.moe4j;

/**
 * The tensors of all local ranks, checked and bound to a layer by {@link MoeLayer#bind}. Binding
 * does all validation and argument packing, so that {@link MoeLayer#enqueue} does none. A bound
 * step may be enqueued any number of times, by one thread at a time, until its layer closes.
 */
public interface BoundStep {
    /** The layer this step belongs to. */
    MoeLayer layer();
}
