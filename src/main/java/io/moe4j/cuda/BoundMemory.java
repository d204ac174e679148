package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Driver.PointerInfo;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.tensor.Tensor;
import java.util.List;

/**
 * The memory that a caller binds: whether it fits the layer, and, by what the driver knows of it,
 * whether the layer's kernels reach it.
 */
final class BoundMemory {
    private BoundMemory() {}

    /**
     * Checks the tensors that a caller binds, of all local ranks.
     *
     * @throws IllegalArgumentException naming the rank, the tensor and the cure
     */
    static void validate(List<StepTensors> ranks, MoeConfig config, Context context) {
        if (ranks.size() != config.localRanks()) {
            throw new IllegalArgumentException(
                    "got the tensors of "
                            + ranks.size()
                            + " ranks but the layer has "
                            + (config.group() == null
                                    ? "ranks=" + config.ranks() + ": give one StepTensors per rank"
                                    : "rank "
                                            + config.group().rank()
                                            + " of the group alone: give its StepTensors"));
        }
        for (int rank = 0; rank < ranks.size(); rank++) {
            try {
                validate(ranks.get(rank), config, context);
            } catch (IllegalArgumentException e) {
                throw new IllegalArgumentException("rank " + rank + ": " + e.getMessage(), e);
            }
        }
    }

    /**
     * Asks the driver again about what was bound.
     *
     * @throws IllegalStateException naming the rank and the tensor whose memory is gone
     */
    static void requireAlive(List<StepTensors> ranks, Context context) {
        for (int rank = 0; rank < ranks.size(); rank++) {
            try {
                requireReachable(ranks.get(rank), context);
            } catch (IllegalArgumentException e) {
                throw new IllegalStateException(
                        "bound memory is gone, rank " + rank + ": " + e.getMessage(), e);
            }
        }
    }

    private static void validate(StepTensors tensors, MoeConfig config, Context context) {
        tensors.validate(config);
        requireDevice("hidden", tensors.hidden());
        requireDevice("tokenCount", tensors.tokenCount());
        requireDevice("topkIds", tensors.topkIds());
        requireDevice("topkWeights", tensors.topkWeights());
        requireDevice("routerLogits", tensors.routerLogits());
        requireDevice("out", tensors.out());
        requireReachable(tensors, context);
    }

    private static void requireDevice(String name, Tensor tensor) {
        if (tensor != null && tensor.isHost()) {
            throw new IllegalArgumentException(
                    name
                            + " is host memory but the CUDA backend reads device memory: use"
                            + " Tensor.device or layer.memory().allocate");
        }
    }

    /**
     * Asks the driver about every address; throws naming the tensor, where it lies and the cure.
     */
    private static void requireReachable(StepTensors tensors, Context context) {
        try (Scope scope = context.enter()) {
            requireReachable("hidden", tensors.hidden(), context);
            requireReachable("tokenCount", tensors.tokenCount(), context);
            requireReachable("topkIds", tensors.topkIds(), context);
            requireReachable("topkWeights", tensors.topkWeights(), context);
            requireReachable("routerLogits", tensors.routerLogits(), context);
            requireReachable("out", tensors.out(), context);
        }
    }

    private static void requireReachable(String name, Tensor tensor, Context context) {
        if (tensor == null) {
            return;
        }
        // why both ends: an engine's allocation may consist of several mappings
        requireReachable(name, tensor, tensor.address(), context);
        requireReachable(name, tensor, tensor.address() + tensor.bytes() - 1, context);
    }

    private static void requireReachable(
            String name, Tensor tensor, long address, Context context) {
        String what = String.format("%s=0x%x, %s,", name, tensor.address(), tensor);
        PointerInfo memory =
                context.driver()
                        .pointer(address)
                        .orElseThrow(
                                () ->
                                        new IllegalArgumentException(
                                                String.format(
                                                        "%s is not in device memory at 0x%x: it was"
                                                                + " freed, is host memory, or is smaller"
                                                                + " than the tensor",
                                                        what, address)));
        if (memory.anywhere()) {
            return;
        }
        if (memory.device() != context.device()) {
            throw new IllegalArgumentException(
                    what
                            + " is memory of device "
                            + memory.device()
                            + " but the layer runs on device "
                            + context.device()
                            + ": allocate it there, or set moe4j.cuda.device");
        }
        if (memory.context() != 0 && memory.context() != context.handle()) {
            throw new IllegalArgumentException(
                    String.format(
                            "%s is memory of context 0x%x but the layer works in 0x%x%s: open it with"
                                    + " cudaContext(0x%x)",
                            what,
                            memory.context(),
                            context.handle(),
                            context.isPrimary() ? ", the device's primary context" : "",
                            memory.context()));
        }
    }
}
