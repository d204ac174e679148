package io.moe4j.cuda;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.List;

/** The smallest whole use of a layer on the CPU backend, run in a child JVM. */
public final class OnCpu {
    private OnCpu() {}

    /** Opens a layer, runs one step of no tokens and closes it. */
    public static void main(String[] args) {
        MoeShape shape = MoeShape.of(64, 32, 4, 2);
        MoeConfig config =
                MoeConfig.builder()
                        .shape(shape)
                        .weights(RandomWeights.of(shape, 1))
                        .maxTokensPerRank(4)
                        .backend("cpu")
                        .build();
        try (MoeLayer layer = Moe.open(config)) {
            layer.prepare();
            var memory = layer.memory();
            Tensor out = memory.allocate(config.outDType(), 4, 64);
            Tensor hidden = memory.allocate(config.hiddenDType(), 4, 64);
            Tensor ids = memory.allocate(DType.I32, 4, 2);
            Tensor weights = memory.allocate(DType.F32, 4, 2);
            Tensor count = memory.allocate(DType.I32, 1);
            var step = layer.bind(List.of(StepTensors.topk(out, hidden, ids, weights, count)));
            layer.enqueue(0, step);
            layer.check();
            System.out.println("computed on " + layer.backend());
        }
    }
}
