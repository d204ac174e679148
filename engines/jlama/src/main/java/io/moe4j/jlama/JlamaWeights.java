package io.moe4j.jlama;

import com.github.tjake.jlama.model.mixtral.MixtralConfig;
import com.github.tjake.jlama.safetensors.WeightLoader;
import com.github.tjake.jlama.tensor.AbstractTensor;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;
import io.moe4j.weights.EngineTensor;
import io.moe4j.weights.EngineWeights;
import io.moe4j.weights.GgufType;
import java.lang.foreign.MemorySegment;

/** The experts of a Mixtral layer as Jlama has mapped them. Stateless. */
final class JlamaWeights {
    private JlamaWeights() {}

    // docs: begin jlama-weights
    /** Router and experts of one layer; nothing is read before the layer is prepared. */
    static LayerWeights of(WeightLoader weights, MixtralConfig config, int layer) {
        String block = "model.layers." + layer + ".block_sparse_moe.";
        MoeShape shape =
                MoeShape.of(
                        config.embeddingLength,
                        config.hiddenLength,
                        config.numberOfExperts,
                        config.numberOfExpertsPerToken);
        return EngineWeights.of(
                        shape,
                        "Jlama's tensors " + block + "*",
                        e ->
                                ExpertWeights.of(
                                        matrix(weights.load(block + "experts." + e + ".w1.weight")),
                                        matrix(weights.load(block + "experts." + e + ".w3.weight")),
                                        matrix(
                                                weights.load(
                                                        block + "experts." + e + ".w2.weight"))))
                .router(matrix(weights.load(block + "gate.weight")))
                .build();
    }

    /** A tensor of Jlama's: its own memory for plain types, element by element for others. */
    static WeightMatrix matrix(AbstractTensor tensor) {
        int rows = tensor.shape().first();
        int cols = tensor.shape().last();
        GgufType type =
                switch (tensor.dType()) {
                    case F32 -> GgufType.F32;
                    case F16 -> GgufType.F16;
                    case BF16 -> GgufType.BF16;
                    default -> null; // Q4 and I8 keep scales in a second tensor
                };
        if (type == null) {
            return decoded(tensor, rows, cols);
        }
        MemorySegment memory = tensor.getMemorySegment();
        return EngineTensor.of(
                        (offset, bytes) -> memory.asSlice(offset, bytes).asByteBuffer(),
                        memory.byteSize(),
                        type,
                        1,
                        rows,
                        cols)
                .matrix();
    }

    // docs: end jlama-weights

    private static WeightMatrix decoded(AbstractTensor tensor, int rows, int cols) {
        return new WeightMatrix() {
            @Override
            public int rows() {
                return rows;
            }

            @Override
            public int cols() {
                return cols;
            }

            @Override
            public void read(float[] to) {
                for (int row = 0; row < rows; row++) {
                    for (int col = 0; col < cols; col++) {
                        to[row * cols + col] = tensor.get(row, col);
                    }
                }
            }
        };
    }
}
