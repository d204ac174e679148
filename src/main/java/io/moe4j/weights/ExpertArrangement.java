package io.moe4j.weights;

import io.moe4j.model.ExpertWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;
import io.moe4j.weights.ModelFamily.ExpertNames;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Objects;

/** How the weights of the routed experts lie in a checkpoint's tensors. */
enum ExpertArrangement {
    /** Three matrices per expert. */
    SEPARATE {
        @Override
        boolean isIn(LayerTensors tensors, ExpertNames names) {
            return tensors.has(names.gate().replace("{e}", "0"));
        }

        @Override
        List<String> tensors(ExpertNames names) {
            return List.of(names.gate(), names.up(), names.down());
        }

        @Override
        ExpertSource open(LayerTensors tensors, ExpertNames names, MoeShape shape) {
            List<ExpertWeights> experts = new ArrayList<>();
            for (int e = 0; e < shape.experts(); e++) {
                String number = Integer.toString(e);
                int i = shape.intermediate();
                int h = shape.hidden();
                experts.add(
                        ExpertWeights.of(
                                tensors.matrix(names.gate().replace("{e}", number), i, h),
                                tensors.matrix(names.up().replace("{e}", number), i, h),
                                tensors.matrix(names.down().replace("{e}", number), h, i)));
            }
            return experts::get;
        }
    },

    /** Gate and up of all experts in {@code [E, 2I, H]}, gate first; down in {@code [E, H, I]}. */
    FUSED_HALVES {
        @Override
        boolean isIn(LayerTensors tensors, ExpertNames names) {
            return tensors.has(names.gate());
        }

        @Override
        List<String> tensors(ExpertNames names) {
            return List.of(names.gate(), names.down());
        }

        @Override
        ExpertSource open(LayerTensors tensors, ExpertNames names, MoeShape shape) {
            int i = shape.intermediate();
            int h = shape.hidden();
            MatrixStack gateUp = tensors.matrices(names.gate(), shape.experts(), 2L * i, h);
            MatrixStack down = tensors.matrices(names.down(), shape.experts(), h, i);
            return e ->
                    ExpertWeights.of(
                            gateUp.matrix(e, 0, i), gateUp.matrix(e, i, i), down.matrix(e, 0, h));
        }
    },

    /**
     * Stored {@code [in, out]}: gate and up of all experts in {@code [E, H, 2I]}, gate at even and
     * up at odd columns; down in {@code [E, I, H]}; with biases (gpt-oss in BF16).
     */
    TRANSPOSED_INTERLEAVED {
        @Override
        boolean isIn(LayerTensors tensors, ExpertNames names) {
            return tensors.has(names.gate());
        }

        @Override
        List<String> tensors(ExpertNames names) {
            return Arrays.asList(names.gate(), names.down(), names.gateBias(), names.downBias());
        }

        @Override
        ExpertSource open(LayerTensors tensors, ExpertNames names, MoeShape shape) {
            int i = shape.intermediate();
            int h = shape.hidden();
            StoredTensor gateUp = tensors.floats(names.gate(), shape.experts(), h, 2L * i);
            StoredTensor down = tensors.floats(names.down(), shape.experts(), i, h);
            Biases biases = Biases.open(tensors, names, shape);
            return e -> {
                long gateUpStart = 2L * e * h * i;
                return biases.expert(
                        e,
                        new TransposedMatrix(gateUp, gateUpStart, 2 * i, 0, 2, i, h),
                        new TransposedMatrix(gateUp, gateUpStart, 2 * i, 1, 2, i, h),
                        new TransposedMatrix(down, (long) e * h * i, h, 0, 1, h, i));
            };
        }
    },

    /**
     * MXFP4 blocks and scales, {@code [out, in]}: gate at even and up at odd rows; with biases
     * (gpt-oss as published).
     */
    MXFP4_INTERLEAVED {
        @Override
        boolean isIn(LayerTensors tensors, ExpertNames names) {
            return tensors.has(names.gate() + BLOCKS);
        }

        @Override
        List<String> tensors(ExpertNames names) {
            return Arrays.asList(
                    names.gate() + BLOCKS,
                    names.gate() + SCALES,
                    names.down() + BLOCKS,
                    names.down() + SCALES,
                    names.gateBias(),
                    names.downBias());
        }

        @Override
        ExpertSource open(LayerTensors tensors, ExpertNames names, MoeShape shape) {
            int i = shape.intermediate();
            int h = shape.hidden();
            if (h % Mxfp4Matrix.BLOCK != 0 || i % Mxfp4Matrix.BLOCK != 0) {
                throw new CheckpointException(
                        tensors.need(names.gate() + BLOCKS).label()
                                + ": MXFP4 needs sizes that are multiples of 32, got hidden_size="
                                + h
                                + " and intermediate size "
                                + i
                                + ": use the model's own config.json");
            }
            StoredTensor[] gateUp = mxfp4(tensors, names.gate(), shape.experts(), 2L * i, h);
            StoredTensor[] down = mxfp4(tensors, names.down(), shape.experts(), h, i);
            Biases biases = Biases.open(tensors, names, shape);
            return e ->
                    biases.expert(
                            e,
                            new Mxfp4Matrix(gateUp[0], gateUp[1], e, 2 * i, 0, 2, i, h),
                            new Mxfp4Matrix(gateUp[0], gateUp[1], e, 2 * i, 1, 2, i, h),
                            new Mxfp4Matrix(down[0], down[1], e, h, 0, 1, h, i));
        }
    };

    private static final String BLOCKS = "_blocks";
    private static final String SCALES = "_scales";

    /** Whether a block's tensors are arranged like this. */
    abstract boolean isIn(LayerTensors tensors, ExpertNames names);

    /** Names of the tensors this arrangement reads; null where a name is not given. */
    abstract List<String> tensors(ExpertNames names);

    /**
     * Finds and checks all expert tensors, reading none of them.
     *
     * @throws CheckpointException naming the first tensor that is missing or does not fit
     */
    abstract ExpertSource open(LayerTensors tensors, ExpertNames names, MoeShape shape);

    private static StoredTensor[] mxfp4(
            LayerTensors tensors, String name, int experts, long rows, int cols) {
        int blocks = cols / Mxfp4Matrix.BLOCK;
        return new StoredTensor[] {
            tensors.bytes(name + BLOCKS, experts, rows, blocks, Mxfp4Matrix.BLOCK / 2),
            tensors.bytes(name + SCALES, experts, rows, blocks)
        };
    }

    /**
     * Biases of all experts: gate and up interleaved in {@code [E, 2I]}, down in {@code [E, H]}.
     */
    private record Biases(StoredTensor gateUp, StoredTensor down, MoeShape shape) {
        static Biases open(LayerTensors tensors, ExpertNames names, MoeShape shape) {
            Objects.requireNonNull(names.gateBias(), "gateBias");
            return new Biases(
                    tensors.floats(names.gateBias(), shape.experts(), 2L * shape.intermediate()),
                    tensors.floats(names.downBias(), shape.experts(), shape.hidden()),
                    shape);
        }

        ExpertWeights expert(
                int e, WeightMatrix gateMatrix, WeightMatrix upMatrix, WeightMatrix downMatrix) {
            int i = shape.intermediate();
            float[] both = gateUp.floats(2L * e * i, 2 * i);
            float[] gate = new float[i];
            float[] up = new float[i];
            for (int j = 0; j < i; j++) {
                gate[j] = both[2 * j];
                up[j] = both[2 * j + 1];
            }
            float[] downBias = down.floats((long) e * shape.hidden(), shape.hidden());
            return new ExpertWeights(gateMatrix, upMatrix, downMatrix, gate, up, downBias);
        }
    }
}
