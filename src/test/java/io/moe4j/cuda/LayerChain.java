package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.ep.Group;
import io.moe4j.model.Activation;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.SplittableRandom;

/**
 * Layers of some ranks one after the other, on one GPU: all ranks, virtual, or one of a group. A
 * batch has a handle of its own in every layer; what a rank reads in it lies in one block of
 * integers, so that one copy brings another T, other rows and another routing of every layer.
 */
final class LayerChain implements AutoCloseable {
    static final MoeShape SHAPE = MoeShape.of(256, 128, 16, 4);
    static final int RANKS = 2;
    static final int M = 24;
    static final int OUT_BYTES = M * SHAPE.hidden() * 2;

    private static final int HIDDEN_AT = 64;
    private static final int IDS_AT = HIDDEN_AT + M * SHAPE.hidden() / 2;
    private static final int LAYER_INTS = 2 * 128; // ids and weights, aligned

    private final Deque<AutoCloseable> owned = new ArrayDeque<>();
    final Context context;
    final Stream stream;
    final List<MoeLayer> layers = new ArrayList<>();

    /** By batch, then layer. */
    final List<List<BoundStep>> steps = new ArrayList<>();

    /** By batch, then local rank. */
    final List<List<Tensor>> blocks = new ArrayList<>();

    final List<List<Tensor>> outs = new ArrayList<>();

    LayerChain(Group group, int layerCount, int batches) {
        this(group, RANKS, layerCount, batches);
    }

    /** Of so many ranks, all of them virtual or one of a group on two GPUs. */
    LayerChain(Group group, int ranks, int layerCount, int batches) {
        int device = group == null ? 0 : group.rank() % 2;
        MoeConfig.Builder builder =
                MoeConfig.builder()
                        .backend("cuda")
                        // why clamped: a plain SwiGLU squares what it is given, ten times over
                        .activation(Activation.clampedSwiGlu(1.702f, 7f))
                        .hiddenDType(DType.BF16)
                        .outDType(DType.BF16)
                        .maxTokensPerRank(M)
                        .ranks(ranks)
                        .device(device)
                        .handles(batches)
                        .threads(2);
        if (group != null) {
            builder.group(group);
        }
        context = own(new Context(Drivers.open(), device));
        stream = own(new Stream(context));
        for (int l = 0; l < layerCount; l++) {
            builder.weights(RandomWeights.of(SHAPE, 100 + l));
            layers.add(own(Moe.open(builder.build())));
            layers.get(l).prepare();
        }
        for (int batch = 0; batch < batches; batch++) {
            bind(batch, group == null ? ranks : 1);
        }
    }

    private void bind(int batch, int localRanks) {
        List<List<StepTensors>> tensors = new ArrayList<>();
        layers.forEach(layer -> tensors.add(new ArrayList<>()));
        blocks.add(new ArrayList<>());
        outs.add(new ArrayList<>());
        steps.add(new ArrayList<>());
        for (int r = 0; r < localRanks; r++) {
            Tensor block = layers.get(0).memory().allocate(DType.I32, blockInts(layers.size()));
            blocks.get(batch).add(block);
            Tensor in = view(block, HIDDEN_AT, DType.BF16, M, SHAPE.hidden());
            Tensor count = view(block, 0, DType.I32, 1);
            for (int l = 0; l < layers.size(); l++) {
                int at = IDS_AT + l * LAYER_INTS;
                Tensor out = layers.get(l).memory().allocate(DType.BF16, M, SHAPE.hidden());
                Tensor ids = view(block, at, DType.I32, M, SHAPE.topK());
                Tensor weights = view(block, at + LAYER_INTS / 2, DType.F32, M, SHAPE.topK());
                tensors.get(l).add(StepTensors.topk(out, in, ids, weights, count));
                in = out;
            }
            outs.get(batch).add(in);
        }
        for (int l = 0; l < layers.size(); l++) {
            steps.get(batch).add(layers.get(l).bind(tensors.get(l), batch));
        }
    }

    private static Tensor view(Tensor block, int at, DType dtype, long... shape) {
        return Tensor.device(block.address() + 4L * at, dtype, shape);
    }

    static int blockInts(int layerCount) {
        return IDS_AT + layerCount * LAYER_INTS;
    }

    /** T from {0, 1, 3, M} or random, by number. */
    static int tokens(int number, SplittableRandom random) {
        return new int[] {0, 1, 3, M, random.nextInt(M + 1)}[Math.floorMod(number, 5)];
    }

    /**
     * What a rank reads: T, rows, and ids and weights of every layer, which are distinct, one-hot,
     * partly −1, out of range or duplicate.
     */
    static int[] block(int tokens, int layerCount, SplittableRandom random) {
        int[] block = new int[blockInts(layerCount)];
        block[0] = tokens;
        int h = SHAPE.hidden();
        int k = SHAPE.topK();
        for (int l = 0; l < layerCount; l++) {
            Batch batch = Harness.random(SHAPE, tokens, random.nextLong());
            int kind = random.nextInt(6);
            for (int t = 0; t < tokens; t++) {
                for (int j = 0; l == 0 && j < h; j += 2) {
                    int low = Float.floatToRawIntBits(batch.hidden()[t][j]) >>> 16;
                    int high = Float.floatToRawIntBits(batch.hidden()[t][j + 1]) & 0xffff0000;
                    block[HIDDEN_AT + (t * h + j) / 2] = high | low; // exact in bfloat16
                }
                for (int i = 0; i < k; i++) {
                    int id =
                            switch (kind) {
                                case 1 -> i == 0 ? 5 : -1;
                                case 2 -> t % 8 == 3 ? -1 : batch.ids()[t][i];
                                case 3 -> i == 0 ? batch.ids()[t][i] : random.nextInt();
                                case 4 -> random.nextInt(3);
                                default -> batch.ids()[t][i];
                            };
                    int at = IDS_AT + l * LAYER_INTS + t * k + i;
                    block[at] = id;
                    block[at + LAYER_INTS / 2] = Float.floatToRawIntBits(batch.weights()[t][i]);
                }
            }
        }
        return block;
    }

    void load(int batch, int localRank, int[] block) {
        layers.get(0)
                .memory()
                .write(blocks.get(batch).get(localRank), Tensor.ofInts(block, block.length));
    }

    /** All layers of a batch, whole steps one after the other. */
    void enqueueInTurn(int batch) {
        for (int l = 0; l < layers.size(); l++) {
            layers.get(l).enqueue(stream.handle(), steps.get(batch).get(l));
        }
    }

    /** Waits, checks, and copies the last layer's output of a rank. */
    byte[] output(int batch, int localRank) {
        stream.synchronize();
        check();
        Tensor host = Tensor.allocateHost(DType.BF16, M, SHAPE.hidden());
        layers.get(0).memory().read(host, outs.get(batch).get(localRank));
        byte[] bytes = new byte[OUT_BYTES];
        host.buffer().get(0, bytes);
        return bytes;
    }

    /** Fills all outputs, so that what a step leaves out shows. */
    void forget() {
        try (Scope scope = context.enter()) {
            for (List<BoundStep> batch : steps) {
                for (BoundStep step : batch) {
                    for (StepTensors tensors : step.tensors()) {
                        context.driver()
                                .memsetD8Async(
                                        tensors.out().address(),
                                        (byte) 0x5a,
                                        OUT_BYTES,
                                        stream.handle());
                    }
                }
            }
        }
    }

    void check() {
        layers.forEach(MoeLayer::check);
    }

    <T extends AutoCloseable> T own(T resource) {
        owned.push(resource);
        return resource;
    }

    @Override
    public void close() {
        RuntimeException failure = new RuntimeException("closing a chain of layers");
        while (!owned.isEmpty()) {
            try {
                owned.pop().close();
            } catch (Exception e) {
                failure.addSuppressed(e);
            }
        }
        if (failure.getSuppressed().length > 0) {
            throw failure;
        }
    }
}
