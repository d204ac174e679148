package io.moe4j.overlap;

import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.LanePart;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.Phase;
import java.util.ArrayList;
import java.util.List;

/**
 * Two micro-batches through one layer, or through layers one after the other, such that the experts
 * of one batch run while the rows of the other travel. Each batch has a step of every layer, on a
 * handle of its own; the results are those of the separate steps, bit for bit.
 *
 * <p>Two lanes: the caller's stream computes (DISPATCH_RECV, EXPERTS), a stream of its own sends
 * and collects (ROUTE, DISPATCH_SEND, COMBINE_SEND, COMBINE_RECV). A layer's input may be the
 * output of the layer before. Over several GPUs all ranks enqueue or replay it the same number of
 * times, with the same layers in the same order. What it gains and where it loses: docs/overlap.md.
 *
 * <p>Owns the second stream and events; keeps the layers' memory until it is closed. One thread
 * enqueues or captures at a time.
 */
public final class TwoBatchOverlap implements AutoCloseable {
    private static final int COMPUTE = 0;
    private static final int COMMUNICATION = 1;

    private final MoeLanes lanes;

    private TwoBatchOverlap(MoeLanes lanes) {
        this.lanes = lanes;
    }

    /**
     * Two micro-batches through one layer.
     *
     * @param first a step of the layer
     * @param second a step of the same layer on another handle
     * @return the schedule, which the caller closes
     * @throws IllegalArgumentException if the layers differ, or the handles do not
     * @throws IllegalStateException if the layer is closed
     */
    public static TwoBatchOverlap of(BoundStep first, BoundStep second) {
        return of(List.of(first), List.of(second));
    }

    /**
     * Two micro-batches through several layers of one backend, without other work between them.
     *
     * @param first the steps of the first batch, layer by layer
     * @param second the steps of the second batch through the same layers, on other handles
     * @return the schedule, which the caller closes
     * @throws IllegalArgumentException if the lists differ in length or layers, or handles do not
     *     differ
     * @throws IllegalStateException if a layer is closed
     */
    public static TwoBatchOverlap of(List<BoundStep> first, List<BoundStep> second) {
        List<LanePart> schedule = schedule(first, second);
        return new TwoBatchOverlap(first.get(0).layer().lanes(schedule));
    }

    /**
     * {@return the parts of the schedule in order, for programs that look at it or change it before
     * {@link io.moe4j.MoeLayer#lanes}}
     *
     * @param first the steps of the first batch, layer by layer
     * @param second the steps of the second batch through the same layers, on other handles
     * @throws IllegalArgumentException if the lists differ in length or layers, or handles do not
     *     differ
     */
    public static List<LanePart> schedule(List<BoundStep> first, List<BoundStep> second) {
        requirePairs(first, second);
        Plan plan = new Plan();
        int sentA = plan.add(first.get(0), Phase.ROUTE, Phase.DISPATCH_SEND, COMMUNICATION);
        int sentB = plan.add(second.get(0), Phase.ROUTE, Phase.DISPATCH_SEND, COMMUNICATION);
        for (int layer = 0; layer < first.size(); layer++) {
            boolean more = layer + 1 < first.size();
            BoundStep a = first.get(layer);
            BoundStep b = second.get(layer);
            plan.add(a, Phase.DISPATCH_RECV, Phase.DISPATCH_RECV, COMPUTE, sentA);
            int doneA = plan.add(a, Phase.EXPERTS, Phase.EXPERTS, COMPUTE);
            plan.add(b, Phase.DISPATCH_RECV, Phase.DISPATCH_RECV, COMPUTE, sentB);
            int doneB = plan.add(b, Phase.EXPERTS, Phase.EXPERTS, COMPUTE);
            plan.collect(a, doneA);
            if (more) {
                sentA = plan.send(first.get(layer + 1));
            }
            plan.collect(b, doneB);
            if (more) {
                sentB = plan.send(second.get(layer + 1));
            }
        }
        return plan.parts;
    }

    /** Parts so far. */
    private static final class Plan {
        final List<LanePart> parts = new ArrayList<>();

        int add(BoundStep step, Phase first, Phase last, int lane, Integer... after) {
            parts.add(new LanePart(new GraphPart(step, first, last), lane, List.of(after)));
            return parts.size() - 1;
        }

        int send(BoundStep step) {
            return add(step, Phase.ROUTE, Phase.DISPATCH_SEND, COMMUNICATION);
        }

        /**
         * why two parts: a kernel that sends and waits at once would need all its blocks at once
         */
        void collect(BoundStep step, int experts) {
            add(step, Phase.COMBINE_SEND, Phase.COMBINE_SEND, COMMUNICATION, experts);
            add(step, Phase.COMBINE_RECV, Phase.COMBINE_RECV, COMMUNICATION);
        }
    }

    private static void requirePairs(List<BoundStep> first, List<BoundStep> second) {
        if (first.isEmpty() || first.size() != second.size()) {
            throw new IllegalArgumentException(
                    "got "
                            + first.size()
                            + " steps of the first batch and "
                            + second.size()
                            + " of the second: give one of each for every layer");
        }
        for (int i = 0; i < first.size(); i++) {
            BoundStep a = first.get(i);
            BoundStep b = second.get(i);
            if (a.layer() != b.layer()) {
                throw new IllegalArgumentException(
                        "layer "
                                + i
                                + ": the steps belong to different layers: bind both with one"
                                + " layer");
            }
            if (a.handleIndex() == b.handleIndex()) {
                throw new IllegalArgumentException(
                        "layer "
                                + i
                                + ": both steps use handle "
                                + a.handleIndex()
                                + ": open the layer with handles(2) and bind the second with"
                                + " another");
            }
        }
    }

    /**
     * Enqueues both batches. They run after what is on {@code stream} now, and what is enqueued on
     * it later runs after both. Legal in a capture of the caller's own.
     *
     * @param stream a CUstream handle the caller owns; 0 on the CPU backend
     * @throws IllegalStateException after close of this or of a layer
     */
    public void enqueue(long stream) {
        lanes.enqueue(stream);
    }

    /**
     * Captures both batches as one graph, without running them.
     *
     * @param stream a CUstream handle that is not capturing; 0 on the CPU backend
     * @return the graph, which the caller closes; it outlives this
     * @throws IllegalStateException after close of this or of a layer, or in a capture
     */
    public MoeGraph capture(long stream) {
        return lanes.capture(stream);
    }

    /** Frees the stream and the events; what was enqueued still runs. Idempotent. */
    @Override
    public void close() {
        lanes.close();
    }
}
