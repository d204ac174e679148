package io.moe4j.overlap;

import io.moe4j.BoundStep;
import io.moe4j.HandlePool;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import java.util.List;

/**
 * Two micro-batches of one layer in one graph: while the experts of one run, the rows of the other
 * travel. Holds two handles of the layer's pool until it is closed; the layer needs {@code
 * handles(2)} or more. One thread at a time.
 *
 * <p>Worth it where both micro-batches together leave the experts busy for longer than a dispatch
 * takes; with few tokens one step is faster, because every step reads the weights of its experts.
 */
public final class TwoBatchOverlap implements AutoCloseable {
    private final MoeLayer layer;
    private final HandlePool.Handle firstHandle;
    private final HandlePool.Handle secondHandle;
    private final BoundStep first;
    private final BoundStep second;

    /**
     * Claims two handles and binds a micro-batch to each.
     *
     * @param layer prepared; the caller closes it after this
     * @param first tensors of the local ranks for the first micro-batch
     * @param second the same for the second, in other memory
     * @throws IllegalStateException if fewer than two handles are free
     * @throws IllegalArgumentException if tensors do not fit
     */
    public TwoBatchOverlap(MoeLayer layer, List<StepTensors> first, List<StepTensors> second) {
        this.layer = layer;
        this.firstHandle = layer.handles().claim();
        HandlePool.Handle other = null;
        try {
            other = layer.handles().claim();
            this.first = layer.bind(first, firstHandle.index());
            this.second = layer.bind(second, other.index());
            this.secondHandle = other;
        } catch (RuntimeException | Error e) {
            firstHandle.close();
            if (other != null) {
                other.close();
            }
            throw e;
        }
    }

    /**
     * Captures both; see {@link MoeLayer#captureOverlapped}.
     *
     * @param stream a CUstream handle that is not capturing; 0 on the CPU backend
     * @return the graph, which the caller closes before this
     */
    public MoeGraph capture(long stream) {
        return layer.captureOverlapped(stream, first, second);
    }

    /** {@return the number of the first micro-batch's handle, for {@link MoeLayer#result}} */
    public int firstHandle() {
        return firstHandle.index();
    }

    /** {@return the number of the second micro-batch's handle} */
    public int secondHandle() {
        return secondHandle.index();
    }

    /** Gives the handles back. */
    @Override
    public void close() {
        firstHandle.close();
        secondHandle.close();
    }
}
