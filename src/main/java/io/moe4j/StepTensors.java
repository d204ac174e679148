package io.moe4j;

import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;

/**
 * The memory one rank brings to a step. The caller owns it all and keeps it alive and in place for
 * as long as steps (or graphs captured from them) may run. All tensors live in the backend's
 * memory: host memory for the CPU backend, device memory for CUDA.
 *
 * @param hidden input, [M, H] of the layer's hidden type; rows from T on are never read
 * @param tokenCount I32 [1]: T, read when the step runs; a value above M is clamped and counted,
 *     below 0 it means 0
 * @param topkIds I32 [M, K] expert ids, −1 for "none"; with TOPK input only, else null
 * @param topkWeights F32 [M, K] weights of those ids; with TOPK input only, else null
 * @param routerLogits F32 [M, E]; with LOGITS input only, else null
 * @param out output, [M, H] of the layer's output type; rows from T on are never written
 * @param accumulate true: {@code out += layer(hidden)}, the residual; false: {@code out =}
 */
public record StepTensors(
        Tensor hidden,
        Tensor tokenCount,
        Tensor topkIds,
        Tensor topkWeights,
        Tensor routerLogits,
        Tensor out,
        boolean accumulate) {
    /**
     * Ids and weights by the caller.
     *
     * @param out [M, H] of the layer's output type
     * @param hidden [M, H] of the layer's hidden type
     * @param topkIds I32 [M, K], −1 for "none"
     * @param topkWeights F32 [M, K]
     * @param tokenCount I32 [1], read when the step runs
     * @return the tensors; nothing is checked or copied
     */
    public static StepTensors topk(
            Tensor out, Tensor hidden, Tensor topkIds, Tensor topkWeights, Tensor tokenCount) {
        return new StepTensors(hidden, tokenCount, topkIds, topkWeights, null, out, false);
    }

    /**
     * Router logits by the caller.
     *
     * @param out [M, H] of the layer's output type
     * @param hidden [M, H] of the layer's hidden type
     * @param routerLogits F32 [M, E]
     * @param tokenCount I32 [1], read when the step runs
     * @return the tensors; nothing is checked or copied
     */
    public static StepTensors logits(
            Tensor out, Tensor hidden, Tensor routerLogits, Tensor tokenCount) {
        return new StepTensors(hidden, tokenCount, null, null, routerLogits, out, false);
    }

    /**
     * Hidden states only: the layer routes by its own router.
     *
     * @param out [M, H] of the layer's output type
     * @param hidden [M, H] of the layer's hidden type
     * @param tokenCount I32 [1], read when the step runs
     * @return the tensors; nothing is checked or copied
     */
    public static StepTensors hidden(Tensor out, Tensor hidden, Tensor tokenCount) {
        return new StepTensors(hidden, tokenCount, null, null, null, out, false);
    }

    /** {@return the same tensors with the result added to {@code out}} */
    public StepTensors accumulating() {
        return new StepTensors(hidden, tokenCount, topkIds, topkWeights, routerLogits, out, true);
    }

    /**
     * Checks dtypes and shapes against a layer's configuration.
     *
     * @param config the layer's
     * @throws IllegalArgumentException naming the tensor, what it is and what is needed
     */
    public void validate(MoeConfig config) {
        long m = config.maxTokensPerRank();
        long h = config.shape().hidden();
        long k = config.shape().topK();
        require("hidden", hidden, config.hiddenDType(), m, h);
        require("out", out, config.outDType(), m, h);
        require("tokenCount", tokenCount, DType.I32, 1);
        boolean topk = config.routingInput() == RoutingInput.TOPK;
        boolean logits = config.routingInput() == RoutingInput.LOGITS;
        requirePresence("topkIds", topkIds, topk, config.routingInput());
        requirePresence("topkWeights", topkWeights, topk, config.routingInput());
        requirePresence("routerLogits", routerLogits, logits, config.routingInput());
        if (topk) {
            require("topkIds", topkIds, DType.I32, m, k);
            require("topkWeights", topkWeights, DType.F32, m, k);
        }
        if (logits) {
            require("routerLogits", routerLogits, DType.F32, m, config.shape().experts());
        }
    }

    /** Fails if a tensor is not the one of {@code now}. */
    void requireSame(int rank, StepTensors now) {
        requireSame(rank, "hidden", hidden, now.hidden);
        requireSame(rank, "tokenCount", tokenCount, now.tokenCount);
        requireSame(rank, "topkIds", topkIds, now.topkIds);
        requireSame(rank, "topkWeights", topkWeights, now.topkWeights);
        requireSame(rank, "routerLogits", routerLogits, now.routerLogits);
        requireSame(rank, "out", out, now.out);
        if (accumulate != now.accumulate) {
            throw new IllegalStateException(
                    "rank "
                            + rank
                            + ": accumulate was "
                            + accumulate
                            + " when bound and is "
                            + now.accumulate
                            + ": bind again and capture again");
        }
    }

    private static void requireSame(int rank, String name, Tensor bound, Tensor now) {
        if (bound == now || (bound != null && bound.isSameAs(now))) {
            return;
        }
        throw new IllegalStateException(
                "rank "
                        + rank
                        + ": "
                        + name
                        + " was "
                        + place(bound)
                        + " when bound and is "
                        + place(now)
                        + " now: bind again and capture again, or keep one buffer");
    }

    private static String place(Tensor tensor) {
        return tensor == null || tensor.isHost()
                ? String.valueOf(tensor)
                : String.format("%s at 0x%x", tensor, tensor.address());
    }

    private static void requirePresence(
            String name, Tensor tensor, boolean wanted, RoutingInput input) {
        if ((tensor != null) != wanted) {
            throw new IllegalArgumentException(
                    name
                            + (wanted ? " is missing but" : " was given but")
                            + " routingInput="
                            + input
                            + (wanted ? " needs it" : " does not use it")
                            + ": use the matching StepTensors factory");
        }
    }

    private static void require(String name, Tensor tensor, DType dtype, long... shape) {
        if (tensor == null) {
            throw new IllegalArgumentException(name + " is missing");
        }
        if (tensor.dtype() != dtype || !tensor.hasShape(shape)) {
            throw new IllegalArgumentException(
                    name
                            + " is "
                            + tensor
                            + " but the layer needs "
                            + dtype
                            + java.util.Arrays.toString(shape)
                            + ": size it by maxTokensPerRank, not by the batch");
        }
    }
}
