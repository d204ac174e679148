package io.moe4j;

import java.util.List;

/**
 * The tensors of all local ranks, checked and bound to a layer by {@link MoeLayer#bind}. Binding
 * does all validation and argument packing, so that {@link MoeLayer#enqueue} does none. A bound
 * step may be enqueued any number of times, by one thread at a time, until its layer closes.
 */
public interface BoundStep {
    /** {@return the layer this step belongs to} */
    MoeLayer layer();

    /** {@return the handle it was bound with: which buffers and epochs it uses} */
    int handleIndex();

    /** {@return what was bound, one element per local rank} */
    List<StepTensors> tensors();

    /**
     * For engines that are handed addresses anew at each call: compares them with those bound.
     * Compares numbers only, makes no driver call and allocates nothing where they are equal.
     *
     * @param now as given to bind
     * @throws IllegalStateException if one moved; names rank, tensor, both places and the cure
     * @throws IllegalArgumentException if the number of ranks differs
     */
    default void requireUnmoved(List<StepTensors> now) {
        List<StepTensors> bound = tensors();
        if (now.size() != bound.size()) {
            throw new IllegalArgumentException(
                    "got the tensors of " + now.size() + " ranks but bound were " + bound.size());
        }
        for (int rank = 0; rank < now.size(); rank++) {
            bound.get(rank).requireSame(rank, now.get(rank));
        }
    }

    /**
     * Debug: asks the driver whether the memory that was bound still exists, as bind did. On the
     * CPU backend there is nothing to ask. Not for use in a step.
     *
     * @throws IllegalStateException naming the tensor that was freed
     */
    void requireAlive();
}
