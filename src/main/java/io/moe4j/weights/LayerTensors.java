package io.moe4j.weights;

import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;
import java.util.HashSet;
import java.util.Set;

/**
 * The tensors of one Mixture-of-Experts block while a layer opens: finds them by their names inside
 * the block, checks shape and type, and notices any that the family does not explain. Used by one
 * thread.
 */
final class LayerTensors {
    private static final String SCALE = "_scale_inv";
    private static final String SUPPORTED =
            "supported weights are BF16, F16, F32, F8_E4M3 with " + SCALE + " and gpt-oss MXFP4";

    private final ModelFolder folder;
    private final String block;
    private final Set<String> names;
    private final Set<String> used = new HashSet<>();
    private final int[] scaleBlock;

    /**
     * The tensors of a block.
     *
     * @param block full name of the block with a dot at its end
     * @param names the block's tensors, without {@code block}
     */
    LayerTensors(ModelFolder folder, String block, Set<String> names) {
        this.folder = folder;
        this.block = block;
        this.names = names;
        this.scaleBlock = folder.config().scaleBlock();
    }

    /** Whether the block has a tensor of this name. */
    boolean has(String name) {
        return names.contains(name);
    }

    /** A tensor that must be there. */
    StoredTensor need(String name) {
        if (!has(name)) {
            String method = folder.config().quantMethod();
            throw new CheckpointException(
                    folder.path()
                            + ": tensor "
                            + block
                            + name
                            + " is missing"
                            + (method == null
                                    ? ""
                                    : " (quant_method=" + CheckpointException.quote(method) + ")")
                            + ": check that all shards are complete; "
                            + SUPPORTED);
        }
        used.add(name);
        return folder.tensor(block + name);
    }

    /** A tensor of unquantised floats, or null if the name is null. */
    StoredTensor floats(String name, long... shape) {
        if (name == null) {
            return null;
        }
        return need(name)
                .requireShape(shape)
                .requireType(SUPPORTED, StoredType.BF16, StoredType.F16, StoredType.F32);
    }

    /** A tensor of unsigned bytes. */
    StoredTensor bytes(String name, long... shape) {
        return need(name).requireShape(shape).requireType(SUPPORTED, StoredType.U8);
    }

    /** One matrix {@code [rows, cols]}. */
    WeightMatrix matrix(String name, int rows, int cols) {
        return stack(name, 1, rows, cols, rows, cols).matrix(0, 0, rows);
    }

    /** {@code experts} matrices {@code [rows, cols]} in one tensor. */
    MatrixStack matrices(String name, int experts, long rows, int cols) {
        return stack(name, experts, rows, cols, experts, rows, cols);
    }

    /** Fails if the block has a tensor that nobody asked for. */
    void requireAllUsed(String family, MoeShape shape) {
        for (String name : names) {
            if (!used.contains(name)) {
                throw new CheckpointException(
                        folder.tensor(block + name).label()
                                + " has no place in a layer of family "
                                + family
                                + " with "
                                + shape
                                + ": weights and config.json do not belong together, or the model"
                                + " needs something this version does not know");
            }
        }
    }

    private MatrixStack stack(String name, int count, long rows, int cols, long... shape) {
        StoredTensor tensor =
                need(name)
                        .requireShape(shape)
                        .requireType(
                                SUPPORTED,
                                StoredType.BF16,
                                StoredType.F16,
                                StoredType.F32,
                                StoredType.F8_E4M3);
        if (tensor.info().type() != StoredType.F8_E4M3) {
            return new MatrixStack(tensor, rows, cols, null, null);
        }
        if (!has(name + SCALE)) {
            throw new CheckpointException(
                    tensor.label()
                            + " is F8_E4M3 but "
                            + block
                            + name
                            + SCALE
                            + " is missing: block-scaled FP8 needs its scales, download them");
        }
        long[] scaleShape = shape.clone();
        scaleShape[shape.length - 2] = ceilDiv(rows, scaleBlock[0]);
        scaleShape[shape.length - 1] = ceilDiv(cols, scaleBlock[1]);
        StoredTensor scales =
                need(name + SCALE)
                        .requireShape(scaleShape)
                        .requireType(
                                "scales are stored as F32 or BF16",
                                StoredType.F32,
                                StoredType.BF16);
        return new MatrixStack(tensor, rows, cols, scales, scaleBlock);
    }

    private static long ceilDiv(long size, int block) {
        return (size + block - 1) / block;
    }
}
