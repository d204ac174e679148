package io.moe4j.examples;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.tensor.DType;
import io.moe4j.weights.EngineTensor;
import io.moe4j.weights.EngineWeights;
import io.moe4j.weights.GgufType;
import java.nio.ByteBuffer;

/** Weights that an engine has mapped or loaded itself, as docs/engines.md shows them. */
public final class EngineWeightsExample {
    private EngineWeightsExample() {}

    // docs: begin gguf
    /** blk.N.ffn_*_exps of a GGUF file, as its reader maps them: [E, rows, cols], row-major. */
    public static LayerWeights gguf(
            MoeShape shape,
            GgufType type,
            ByteBuffer gateExps,
            ByteBuffer upExps,
            ByteBuffer downExps) {
        int e = shape.experts();
        int i = shape.intermediate();
        int h = shape.hidden();
        EngineTensor gate = EngineTensor.of(gateExps, type, e, i, h);
        EngineTensor up = EngineTensor.of(upExps, type, e, i, h);
        EngineTensor down = EngineTensor.of(downExps, type, e, h, i);
        return EngineWeights.of(
                        shape,
                        "model.gguf",
                        x -> ExpertWeights.of(gate.matrix(x), up.matrix(x), down.matrix(x)))
                .build();
    }

    // docs: end gguf

    // docs: begin onnx
    /** A com.microsoft.MoE node with swiglu_fusion=1: fc1 [E, 2I, H] gate and up by turns. */
    public static MoeConfig onnx(
            MoeShape shape, boolean normalize, ByteBuffer fc1, ByteBuffer fc2) {
        int e = shape.experts();
        int i = shape.intermediate();
        int h = shape.hidden();
        EngineTensor gateUp = EngineTensor.of(fc1, GgufType.F32, e, 2 * i, h);
        EngineTensor down = EngineTensor.of(fc2, GgufType.F32, e, h, i);
        LayerWeights weights =
                EngineWeights.of(
                                shape,
                                "ONNX node",
                                x ->
                                        ExpertWeights.of(
                                                gateUp.matrix(x, 0, 2, i),
                                                gateUp.matrix(x, 1, 2, i),
                                                down.matrix(x)))
                        .build();
        return MoeConfig.builder()
                .weights(weights)
                .rule(RoutingRule.softmaxTopK(normalize)) // normalize_routing_weights
                .activation(Activation.swiGlu()) // activation_alpha 1, activation_beta 0
                .routingInput(RoutingInput.LOGITS) // the node's second input
                .hiddenDType(DType.F32)
                .backend("cpu")
                .build();
    }
    // docs: end onnx
}
