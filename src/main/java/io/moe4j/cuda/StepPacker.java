package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.CStruct;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;

/**
 * Writes down what the kernels of a step get to know: one StepParams for all of them, and a
 * LocalRank for each local rank in a device array. Made once a layer; allocates a step's array,
 * which the step owns, and takes its parameter from the layer's arena.
 */
final class StepPacker {
    private final CudaLayer layer;
    private final MoeConfig config;
    private final Context context;
    private final DeviceLayout layout;
    private final LoadedKernels kernels;
    private final ParamArena arena;

    StepPacker(
            CudaLayer layer,
            Context context,
            DeviceLayout layout,
            LoadedKernels kernels,
            ParamArena arena) {
        this.layer = layer;
        this.config = layer.config();
        this.context = context;
        this.layout = layout;
        this.kernels = kernels;
        this.arena = arena;
    }

    /**
     * Packs a step of this layer.
     *
     * @param weightsBase where the weights are, this layer's or another's of its configuration
     */
    CudaStep pack(List<StepTensors> ranks, CudaHandle handle, long weightsBase) {
        return pack(ranks, handle, weightsBase, false);
    }

    /** Packs a step over this rank only, as rank 0 of 1. */
    CudaStep packAlone(StepTensors tensors, CudaHandle handle, long weightsBase) {
        return pack(List.of(tensors), handle, weightsBase, true);
    }

    private CudaStep pack(
            List<StepTensors> ranks, CudaHandle handle, long weightsBase, boolean alone) {
        int size = DeviceStructs.LOCAL_RANK.size();
        ByteBuffer locals =
                ByteBuffer.allocateDirect(ranks.size() * size).order(ByteOrder.LITTLE_ENDIAN);
        for (int rank = 0; rank < ranks.size(); rank++) {
            locals.position(rank * size);
            CStruct.Writer to = DeviceStructs.LOCAL_RANK.writer(locals);
            packRank(to, config.firstLocalRank() + rank, ranks.get(rank), handle);
            packWeights(to, rank, weightsBase);
            if (alone) {
                to.put("rank", 0);
            }
        }
        DeviceBuffer buffer = new DeviceBuffer(context, locals.capacity());
        try (Scope scope = context.enter()) {
            buffer.upload(locals.rewind());
            KernelParams params = arena.params(DeviceStructs.STEP_PARAMS.size());
            CStruct.Writer to = DeviceStructs.STEP_PARAMS.writer(params.bytes(0));
            packParams(to, buffer.address(), handle, weightsBase);
            if (alone) {
                to.put("num_ranks", 1);
                to.put("experts", config.expertsPerRank());
            }
            return new CudaStep(layer, List.copyOf(ranks), handle, params, buffer);
        } catch (RuntimeException | Error e) {
            buffer.close();
            throw e;
        }
    }

    private void packRank(CStruct.Writer to, int rank, StepTensors tensors, CudaHandle handle) {
        to.put("hidden", address(tensors.hidden()));
        to.put("token_count", address(tensors.tokenCount()));
        to.put("topk_ids", address(tensors.topkIds()));
        to.put("topk_weights", address(tensors.topkWeights()));
        to.put("router_logits", address(tensors.routerLogits()));
        to.put("out", address(tensors.out()));
        to.put("accumulate", tensors.accumulate() ? 1 : 0);
        to.put("rank", rank);
        to.put("local_experts", config.expertsOn(rank));
        for (String buffer :
                List.of(
                        "home_tokens",
                        "home_ids",
                        "home_weights",
                        "home_mask",
                        "logits",
                        "home_rows",
                        "expert_counts",
                        "expert_offsets",
                        "expert_rows",
                        "packed_row_of",
                        "activated",
                        "expert_out",
                        "shared_activated",
                        "shared_out",
                        "epoch",
                        "arrivals",
                        "totals",
                        "work",
                        "expert_done",
                        "members",
                        "peer_totals",
                        "received_totals")) {
            to.put(buffer, handle.workspace(rank, buffer));
        }
        to.put("error", handle.errorAddress(rank));
        to.put("counters", handle.countersAddress(rank));
        to.put("stats", handle.statsAddress(rank));
        to.put("received_rows", handle.receivedAddress(rank));
    }

    /** A rank's experts are consecutive in the layer's buffers, which hold the local ranks'. */
    private void packWeights(CStruct.Writer to, int localRank, long weightsBase) {
        int experts = config.localExperts();
        long first = (long) localRank * config.expertsPerRank();
        for (String buffer : List.of("w_gate_up", "w_down", "bias_gate_up", "bias_down")) {
            long base = layout.weights().address(weightsBase, buffer);
            if (base != 0 && first < experts) {
                base += layout.weights().field(buffer).bytes() / experts * first;
            }
            to.put(buffer, base);
        }
    }

    private void packParams(CStruct.Writer to, long locals, CudaHandle handle, long weightsBase) {
        to.put("num_ranks", config.ranks());
        to.put("num_local_ranks", config.localRanks());
        to.put("max_tokens", config.maxTokensPerRank());
        to.put("top_k", config.shape().topK());
        to.put("experts", config.shape().experts());
        to.put("experts_per_rank", config.expertsPerRank());
        to.put("hidden", config.shape().hidden());
        to.put("hidden_pad", DeviceLayout.pad(config.shape().hidden()));
        to.put("intermediate", config.shape().intermediate());
        to.put("intermediate_pad", DeviceLayout.pad(config.shape().intermediate()));
        int shared = config.usesSharedExpert() ? config.shape().sharedIntermediate() : 0;
        to.put("shared", shared);
        to.put("shared_pad", DeviceLayout.pad(shared));
        to.put("hidden_dtype", dtype(config.hiddenDType()));
        to.put("out_dtype", dtype(config.outDType()));
        to.put("routing_input", config.routingInput().ordinal());
        boolean routes = config.routingInput() != RoutingInput.TOPK;
        to.put("scoring", routes ? config.rule().scoring().ordinal() : 0);
        to.put("renormalise", routes && config.rule().renormalise() ? 1 : 0);
        to.put("groups", routes ? config.rule().groups() : 1);
        to.put("topk_groups", routes ? config.rule().topkGroups() : 1);
        to.put("scale", routes ? config.rule().scale() : 1f);
        to.put("activation", config.activation().kind().ordinal());
        to.put("alpha", config.activation().alpha());
        to.put("limit", config.activation().limit());
        to.put("timeout_ns", config.stepTimeout().toNanos());
        to.put("first_timeout_ns", config.firstStepTimeout().toNanos());
        for (String buffer :
                List.of(
                        "dispatch_flags",
                        "combine_flags",
                        "abort_words",
                        "recv_tokens",
                        "recv_ids",
                        "recv_weights",
                        "recv_rows",
                        "combine_rows")) {
            to.put("off_" + buffer, layout.symmetric().offset(buffer));
        }
        boolean lines = layout.symmetric().has("dispatch_lines");
        to.put("wire", kernels.lines() ? 1 : 0);
        to.put("early_next", kernels.waitsAlone() ? 1 : 0);
        for (String buffer : List.of("dispatch_lines", "combine_lines")) {
            to.put("off_" + buffer, lines ? layout.symmetric().offset(buffer) : 0L);
        }
        to.put("ranks", handle.rankViews());
        to.put("locals", locals);
        boolean ownRouter = config.routingInput() == RoutingInput.HIDDEN;
        to.put("router", layout.weights().address(weightsBase, "router"));
        to.put(
                "router_bias",
                ownRouter && config.weights().routerBias() != null
                        ? layout.weights().address(weightsBase, "router_bias")
                        : 0L);
        to.put(
                "correction_bias",
                routes && config.weights().correctionBias() != null
                        ? layout.weights().address(weightsBase, "correction_bias")
                        : 0L);
        to.put("w_shared_gate_up", layout.weights().address(weightsBase, "w_shared_gate_up"));
        to.put("w_shared_down", layout.weights().address(weightsBase, "w_shared_down"));
        to.put(
                "shared_gate",
                shared > 0 && config.weights().sharedExpertGate() != null
                        ? layout.weights().address(weightsBase, "shared_gate")
                        : 0L);
    }

    private static long address(Tensor tensor) {
        return tensor == null ? 0L : tensor.address();
    }

    private static int dtype(DType dtype) {
        return switch (dtype) {
            case F32 -> 0;
            case F16 -> 1;
            case BF16 -> 2;
            default -> throw new IllegalArgumentException("hidden states of type " + dtype);
        };
    }
}
