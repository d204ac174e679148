package io.moe4j.examples;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.StepTensors;
import io.moe4j.overlap.TwoBatchOverlap;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.List;

/**
 * The graphs of docs/graphs.md, between the marks. They run on any backend: with {@code
 * backend("cpu")} and stream 0, or with {@code backend("cuda")} and a stream the caller owns.
 */
public final class GraphExample {
    private GraphExample() {}

    /**
     * One batch on the host, with room for the most tokens.
     *
     * @param tokens T of this batch
     * @param hidden [M, H] of the layer's hidden type
     * @param ids I32 [M, K]
     * @param weights F32 [M, K]
     */
    record Batch(int tokens, Tensor hidden, Tensor ids, Tensor weights) {}

    // docs: begin replay
    static List<float[]> replay(MoeConfig config, long stream, List<Batch> batches) {
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        List<float[]> outputs = new ArrayList<>();
        try (MoeLayer layer = Moe.open(config)) {
            layer.prepare(); // allocates: before any capture
            BackendMemory memory = layer.memory();
            Tensor x = memory.allocate(config.hiddenDType(), m, h);
            Tensor y = memory.allocate(config.outDType(), m, h);
            Tensor ids = memory.allocate(DType.I32, m, k);
            Tensor weights = memory.allocate(DType.F32, m, k);
            Tensor tokenCount = memory.allocate(DType.I32, 1);
            BoundStep step = layer.bind(List.of(StepTensors.topk(y, x, ids, weights, tokenCount)));

            try (MoeGraph graph = layer.capture(stream, step)) { // once
                for (Batch batch : batches) { // any T in 0..M, any routing
                    memory.write(x, batch.hidden());
                    memory.write(ids, batch.ids());
                    memory.write(weights, batch.weights());
                    memory.write(tokenCount, Tensor.ofInts(new int[] {batch.tokens()}, 1));
                    graph.launch(stream);
                    layer.synchronize(stream); // only because this program reads y on the host
                    layer.check();
                    Tensor host = Tensor.allocateHost(config.outDType(), m, h);
                    memory.read(host, y);
                    outputs.add(host.toFloats());
                }
            }
        }
        return outputs;
    }

    // docs: end replay

    // docs: begin pieces
    static void inTwoPieces(MoeLayer layer, BoundStep step, long stream, Runnable ownWork) {
        var sending = new GraphPart(step, Phase.ROUTE, Phase.DISPATCH_SEND);
        var rest = new GraphPart(step, Phase.DISPATCH_RECV, Phase.COMBINE_RECV);
        try (MoeGraph front = layer.capture(stream, List.of(sending));
                MoeGraph back = layer.capture(stream, List.of(rest))) {
            for (int i = 0; i < 3; i++) {
                front.launch(stream);
                ownWork.run(); // kernels on this stream, while rows travel
                back.launch(stream); // always both, always in this order
            }
        }
    }

    // docs: end pieces

    // docs: begin layers
    static MoeGraph twoLayers(BoundStep first, BoundStep second, long stream) {
        return first.layer()
                .capture(stream, List.of(GraphPart.whole(first), GraphPart.whole(second)));
    }

    // docs: end layers

    // docs: begin handles
    static MoeGraph twoMicroBatches(MoeLayer layer, BoundStep a, BoundStep b, long stream) {
        return layer.capture(
                stream,
                List.of( // a was bound with handle 0, b with handle 1
                        new GraphPart(a, Phase.ROUTE, Phase.DISPATCH_SEND),
                        new GraphPart(b, Phase.ROUTE, Phase.DISPATCH_SEND),
                        new GraphPart(a, Phase.DISPATCH_RECV, Phase.COMBINE_SEND),
                        new GraphPart(b, Phase.DISPATCH_RECV, Phase.COMBINE_SEND),
                        new GraphPart(a, Phase.COMBINE_RECV, Phase.COMBINE_RECV),
                        new GraphPart(b, Phase.COMBINE_RECV, Phase.COMBINE_RECV)));
    }

    // docs: end handles

    // docs: begin overlap
    static void overlapped(BoundStep a, BoundStep b, long stream) {
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(a, b); // or lists, layer by layer
                MoeGraph graph = overlap.capture(stream)) {
            graph.launch(stream); // both batches; any T and any routing at each launch
            graph.launch(stream);
        }
    }
    // docs: end overlap
}
