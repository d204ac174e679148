package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;

/**
 * What prepare makes for a layer: kernels, weights on the device, handles, and in a group what its
 * ranks share. Guarded by the layer, which frees it, also when only a part of it was made.
 */
final class CudaResources {
    private static final System.Logger LOG = System.getLogger("io.moe4j");

    private final CudaLayer layer;
    private final MoeConfig config;
    private final Context context;
    private final KernelCatalog catalog;
    private final DeviceLayout layout;
    private final Owned owned = new Owned();
    private PeerMemory peers;
    private LoadedKernels kernels;
    private StepFlow flow;
    private StepPacker packer;
    private CudaHandle[] handles;
    private long weights;

    CudaResources(CudaLayer layer, Context context, KernelCatalog catalog, DeviceLayout layout) {
        this.layer = layer;
        this.config = layer.config();
        this.context = context;
        this.catalog = catalog;
        this.layout = layout;
    }

    /**
     * A layer of a group meets the others four times: what they have in common, where their memory
     * is, once all have written to it, and once all have seen what was written. Where rows are to
     * travel in lines, once more, to hear whether lines arrive whole.
     *
     * <p>why the lock: two layers that a rank prepares at once would mix up their meetings.
     */
    void open(ProgressListener progress) {
        if (config.group() == null) {
            allocate(progress);
            return;
        }
        synchronized (config.group()) {
            peers = owned.add(new PeerMemory(context, config, layout));
            peers.agree(catalog.description());
            peers.meet(
                    "addresses",
                    () -> {
                        allocate(progress);
                        warmUp();
                        return peers.export();
                    },
                    peers::addresses);
            peers.meet("the self-test's writes", () -> peers.connect(handles, kernels), all -> {});
            if (!kernels.lines()) {
                peers.meet("the self-test's result", () -> peers.verify(kernels), all -> {});
                return;
            }
            peers.meet("the self-test's result", () -> peers.verifyForLines(kernels), all -> {});
            peers.meet("the test of lines", () -> peers.tryLines(handles[0]), peers::judgeLines);
            if (!peers.brokenLines().isEmpty()) {
                kernels.useRows();
                LOG.log(
                        System.Logger.Level.WARNING,
                        "rank {0}: {1}; rows travel as rows with a flag behind them",
                        config.firstLocalRank(),
                        peers.brokenLines());
            }
        }
    }

    /** Of a rank of a group: how its rows travel, and with whom it shares its GPU; else empty. */
    String groupNote() {
        if (peers == null) {
            return "";
        }
        String text = ", rows travel " + (kernels.lines() ? "in lines" : "as rows");
        if (!peers.brokenLines().isEmpty()) {
            text += ": " + peers.brokenLines();
        }
        return peers.sharing() == 1
                ? text
                : text + ", " + peers.sharing() + " ranks of the group share the GPU";
    }

    private void allocate(ProgressListener progress) {
        kernels = owned.add(catalog.load(context, config, peers == null ? 1 : peers.sharing()));
        flow = new StepFlow(context, kernels, config.localRanks());
        weights = owned.add(new DeviceBuffer(context, layout.weights().size())).address();
        handles = new CudaHandle[config.handles()];
        for (int handle = 0; handle < handles.length; handle++) {
            handles[handle] =
                    owned.add(
                            new CudaHandle(
                                    context,
                                    layout,
                                    config,
                                    peers == null ? null : peers::allocate));
        }
        ParamArena arena = owned.add(new ParamArena(context));
        packer = new StepPacker(layer, context, layout, kernels, arena);
        try (CudaWeights upload = new CudaWeights(context, kernels, config, layout, weights)) {
            upload.run(progress);
        }
    }

    /**
     * Runs a step without tokens over this rank alone, on its own memory. why: a kernel that was
     * never launched may be loaded only then, or may want a larger stack, and both wait for a GPU
     * that waits for a peer.
     */
    private void warmUp() {
        // why so large: a kernel may read a few tokens before it knows that there are none
        long eager = 64L + 8L * Math.max(config.shape().hidden(), config.shape().topK()) * 4;
        try (DeviceBuffer nothing = new DeviceBuffer(context, eager);
                Stream stream = new Stream(context);
                Scope scope = context.enter()) {
            context.driver().memsetD8(nothing.address(), (byte) 0, nothing.size());
            context.driver().streamSynchronize(0L); // why: a fill is asynchronous
            for (CudaHandle handle : handles) {
                CudaStep step = packer.packAlone(noTokens(nothing), handle, weights);
                try {
                    flow.launchAll(stream.handle(), step);
                    stream.synchronize();
                } finally {
                    step.free();
                }
                if (handle.errorCode(config.firstLocalRank()) != 0) {
                    throw new IllegalStateException(
                            "a step without tokens failed when the layer opened: "
                                    + Faults.describe(
                                            Faults.read(
                                                    handle,
                                                    config.firstLocalRank(),
                                                    handle.errorCode(config.firstLocalRank()))));
                }
                handle.clear(-1L >>> (Long.SIZE - config.ranks()));
            }
        }
    }

    /** Nothing is used but the count, which is 0. */
    private StepTensors noTokens(DeviceBuffer nothing) {
        Tensor count = Tensor.device(nothing.address(), DType.I32, 1);
        boolean topk = config.routingInput() == RoutingInput.TOPK;
        boolean logits = config.routingInput() == RoutingInput.LOGITS;
        Tensor any = Tensor.device(nothing.address(), DType.F32, 1);
        return new StepTensors(
                any, count, topk ? any : null, topk ? any : null, logits ? any : null, any, false);
    }

    /** Frees what was made; failures are added to {@code cause}. */
    void free(Throwable cause) {
        owned.close(cause);
    }

    /** What the layer shares with the other ranks of its group; null without one. */
    PeerMemory peers() {
        return peers;
    }

    /** The kernels of a step. */
    StepFlow flow() {
        return flow;
    }

    /** Makes steps. */
    StepPacker packer() {
        return packer;
    }

    /** The steps that can be in flight. */
    CudaHandle[] handles() {
        return handles;
    }

    /** Device address of the weights. */
    long weights() {
        return weights;
    }
}
