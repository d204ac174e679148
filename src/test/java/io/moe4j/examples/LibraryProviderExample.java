package io.moe4j.examples;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import java.util.List;
import java.util.function.Function;

/**
 * A layer behind the library interface of a runtime such as TornadoVM: the runtime owns context,
 * stream and arrays and calls in this order. See docs/engines.md.
 */
// docs: begin library-provider
public final class LibraryProviderExample {
    private final Function<MoeConfig, MoeLayer> open; // Moe::open
    private MoeLayer layer;
    private BoundStep step;
    private long stream;

    public LibraryProviderExample(Function<MoeConfig, MoeLayer> open) {
        this.open = open;
    }

    /** Once for each execution plan: the runtime's native context and stream. */
    public void createContext(MoeConfig.Builder config, long nativeContext, long nativeStream) {
        layer = open.apply(config.cudaContext(nativeContext).build());
        stream = nativeStream;
    }

    /** Before any capture; may be called again. Allocates everything and packs the weights. */
    public void prepare() {
        layer.prepare();
    }

    /** Eager or inside the runtime's capture, which is where it first tells the addresses. */
    public void dispatch(StepTensors arrays) {
        if (step == null) {
            step = layer.bind(List.of(arrays)); // legal in a capture, no part of the graph
        }
        step.requireUnmoved(List.of(arrays)); // a buffer that moved is an error, not a wrong result
        layer.enqueue(stream, step);
    }

    /** After the runtime has destroyed its graphs and before it destroys its context. */
    public void destroyContext() {
        layer.close();
    }

    // docs: end library-provider

    /** The layer, for tests. */
    public MoeLayer layer() {
        return layer;
    }

    /** The step, for tests. */
    public BoundStep step() {
        return step;
    }
}
