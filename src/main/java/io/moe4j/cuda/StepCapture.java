package io.moe4j.cuda;

import io.moe4j.GraphPart;
import io.moe4j.LanePart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.GraphExec;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.observe.LayerTrace;
import java.util.Collection;
import java.util.Collections;
import java.util.IdentityHashMap;
import java.util.List;
import java.util.Set;

/**
 * Makes graphs and schedules of the steps of one or several layers, and pins each of those layers,
 * so that its memory stays while there is one. The graph or schedule takes over the pins. Also
 * tells what a stream or a capture was refused for. Owns nothing.
 */
final class StepCapture {
    private final Context context;
    private final LayerTrace trace;

    StepCapture(Context context, LayerTrace trace) {
        this.context = context;
        this.trace = trace;
    }

    /** A graph of these parts, in their order. */
    MoeGraph graph(long stream, List<GraphPart> parts) {
        if (parts.isEmpty()) {
            throw new IllegalArgumentException("nothing to capture: give at least one part");
        }
        return graph(
                stream,
                layersOf(parts),
                parts.size(),
                () -> {
                    for (GraphPart part : parts) {
                        part.step().layer().enqueue(stream, part.step(), part.first(), part.last());
                    }
                });
    }

    /** Captures what {@code enqueue} enqueues on the stream and on others that join it again. */
    MoeGraph graph(long stream, Collection<CudaLayer> layers, int parts, Runnable enqueue) {
        Set<CudaLayer> pinned = pin(layers);
        try {
            try (Scope scope = context.enter()) {
                if (stream != 0 && context.driver().streamIsCapturing(stream)) {
                    throw new IllegalStateException(
                            "the stream is capturing already: call enqueue to add a step to your"
                                    + " own capture");
                }
            }
            return trace.capture(
                    pinned.size(),
                    parts,
                    watch ->
                            new CudaGraph(
                                    GraphExec.capture(context, stream, enqueue), pinned, watch),
                    CudaGraph::nodeCount);
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw refusedStream(stream, e);
        }
    }

    /** A schedule of these parts on lanes. */
    MoeLanes lanes(List<LanePart> parts) {
        Set<CudaLayer> pinned =
                pin(layersOf(LanePart.requireOrder(parts).stream().map(LanePart::part).toList()));
        try {
            return new CudaLanes(this, context, parts, pinned);
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw e;
        }
    }

    private static Set<CudaLayer> layersOf(List<GraphPart> parts) {
        Set<CudaLayer> layers = Collections.newSetFromMap(new IdentityHashMap<>());
        for (GraphPart part : parts) {
            if (!(part.step() instanceof CudaStep step)) {
                throw new IllegalArgumentException(
                        "a step of another backend cannot be captured here: bind it with a CUDA"
                                + " layer");
            }
            layers.add(step.cudaLayer());
        }
        return layers;
    }

    /** Pins each layer once; none of them if one is not prepared. */
    static Set<CudaLayer> pin(Collection<CudaLayer> layers) {
        Set<CudaLayer> pinned = Collections.newSetFromMap(new IdentityHashMap<>());
        try {
            for (CudaLayer layer : layers) {
                if (!pinned.contains(layer)) {
                    layer.pin();
                    pinned.add(layer);
                }
            }
            return pinned;
        } catch (RuntimeException | Error e) {
            pinned.forEach(CudaLayer::unpin);
            throw e;
        }
    }

    /** Names the stream if it is what the driver did not take; else rethrows. */
    RuntimeException refusedStream(long stream, Throwable e) {
        if (e instanceof CudaException refused && refused.invalidHandle()) {
            return new IllegalArgumentException(
                    String.format(
                            "stream=0x%x is no stream of the layer's context 0x%x%s: it was"
                                    + " destroyed, or made in another context; open the layer with"
                                    + " cudaContext(...) of the stream's",
                            stream,
                            context.handle(),
                            context.isPrimary() ? ", the device's primary context" : ""),
                    e);
        }
        if (e instanceof Error error) {
            throw error;
        }
        return (RuntimeException) e;
    }

    /** Says that a method cannot be called in a capture, which it has broken. */
    static RuntimeException refusedInCapture(String method, CudaException e) {
        return new IllegalStateException(
                method
                        + " was called while this thread captures a stream: "
                        + method
                        + " before the capture begins; this one is broken, end it and start anew",
                e);
    }
}
