package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cuda.driver.GraphExec;
import io.moe4j.cuda.driver.KernelModule;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.SplittableRandom;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.locks.LockSupport;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/**
 * Ten layers in one graph a rank, ranks on two GPUs, no host work between layers. Before each
 * replay one copy on the stream gives a rank another T, other rows and another routing for every
 * layer, whatever the other ranks get; ranks are held up at random between layers and before
 * launches. Every output of every replay is compared with virtual ranks on one GPU, bit for bit.
 */
@EnabledIfCuda(devices = 2)
@Timeout(300)
class TenLayerMultiGpuTest {
    private static final MoeShape SHAPE = LayerChain.SHAPE;
    private static final int M = LayerChain.M;
    private static final int LAYERS = 10;
    private static final int VARIANTS = 64;
    private static final int REPLAYS = Integer.getInteger("moe4j.replays10", 10_000);
    private static final int PER_BATCH = 250;

    /** Layers before which a rank may be held up, and for how long at most. */
    private static final List<Integer> GATES = List.of(3, 7);

    private static final long GATE_NS = 40_000;

    private static final int BLOCK_INTS = LayerChain.blockInts(LAYERS);
    private static final long OUT_BYTES = LayerChain.OUT_BYTES;

    /** One rank of the group, with its pool of inputs and its graph. */
    private static final class Replayer implements AutoCloseable {
        final int rank;
        final LayerChain chain;
        final int[] tokens;
        final byte[][] expected;
        final Tensor pool;
        final Tensor ring;
        final int replays;
        final PinnedBuffer words;
        final GraphExec graph;

        Replayer(Group group, int replays, int[] tokens, int[][] blocks, byte[][] expected) {
            this.rank = group.rank();
            this.replays = replays;
            this.tokens = tokens;
            this.expected = expected;
            chain = new LayerChain(group, group.ranks(), LAYERS, 1);
            int[] all =
                    IntStream.range(0, VARIANTS).flatMap(v -> IntStream.of(blocks[v])).toArray();
            pool = chain.layers.get(0).memory().allocate(DType.I32, all.length);
            chain.layers.get(0).memory().write(pool, Tensor.ofInts(all, all.length));
            ring = chain.layers.get(0).memory().allocate(DType.BF16, PER_BATCH, M, SHAPE.hidden());
            words = chain.own(new PinnedBuffer(chain.context, 64));
            KernelModule module =
                    chain.own(
                            new KernelModule(
                                    chain.context,
                                    "gate",
                                    KernelCatalog.choose(
                                                    chain.context.driver(), chain.context.device())
                                            .imageBytes()));
            long gate = module.function("moe_gate");
            List<KernelParams> gates = new ArrayList<>();
            ParamArena arena = chain.own(new ParamArena(chain.context));
            for (int g = 0; g < GATES.size(); g++) {
                KernelParams params = arena.params(DeviceStructs.GATE_PARAMS.size());
                DeviceStructs.GATE_PARAMS
                        .writer(params.bytes(0))
                        .put("word", words.deviceAddress() + 4L * g)
                        .put("timeout_ns", GATE_NS);
                gates.add(params);
                launch(gate, params); // why: it is loaded now, not while a peer waits
            }
            chain.stream.synchronize();
            graph = chain.own(GraphExec.capture(chain.context, stream(), () -> step(gate, gates)));
        }

        private long stream() {
            return chain.stream.handle();
        }

        private void launch(long gate, KernelParams params) {
            try (Scope scope = chain.context.enter()) {
                chain.context.driver().launchKernel(gate, 1, 1, 1, 32, 1, 1, 0, stream(), params);
            }
        }

        private void step(long gate, List<KernelParams> gates) {
            for (int l = 0; l < LAYERS; l++) {
                if (GATES.contains(l)) {
                    launch(gate, gates.get(GATES.indexOf(l)));
                }
                chain.layers.get(l).enqueue(stream(), chain.steps.get(0).get(l));
            }
        }

        /** Mismatches among all replays. */
        int replay(long seed) {
            SplittableRandom random = new SplittableRandom(seed + rank);
            Tensor host = Tensor.allocateHost(DType.BF16, PER_BATCH, M, SHAPE.hidden());
            int[] used = new int[PER_BATCH];
            int mismatches = 0;
            for (int done = 0; done < replays; done += PER_BATCH) {
                int batch = Math.min(PER_BATCH, replays - done);
                try (Scope scope = chain.context.enter()) {
                    for (int i = 0; i < batch; i++) {
                        used[i] = random.nextInt(VARIANTS);
                        launchOnce(random, used[i], i);
                    }
                }
                chain.stream.synchronize();
                chain.check();
                chain.layers.get(0).memory().read(host, ring);
                for (int i = 0; i < batch; i++) {
                    mismatches += compare(host.buffer(), i, used[i], done + i);
                }
            }
            return mismatches;
        }

        private void launchOnce(SplittableRandom random, int variant, int slot) {
            for (int g = 0; g < GATES.size(); g++) {
                words.bytes().putInt(4 * g, random.nextInt(4) == 0 ? 0 : 1);
            }
            if (random.nextInt(100) == 0) {
                LockSupport.parkNanos(random.nextInt(500_000)); // a host that comes late
            }
            chain.context
                    .driver()
                    .memcpyDtoDAsync(
                            chain.blocks.get(0).get(0).address(),
                            pool.address() + 4L * BLOCK_INTS * variant,
                            4L * BLOCK_INTS,
                            stream());
            graph.launch(stream());
            chain.context
                    .driver()
                    .memcpyDtoDAsync(
                            ring.address() + OUT_BYTES * slot,
                            chain.outs.get(0).get(0).address(),
                            OUT_BYTES,
                            stream());
        }

        private int compare(ByteBuffer got, int slot, int variant, int replay) {
            int bytes = tokens[variant] * SHAPE.hidden() * 2;
            int at =
                    got.slice((int) (OUT_BYTES * slot), bytes)
                            .mismatch(ByteBuffer.wrap(expected[variant], 0, bytes));
            if (at < 0) {
                return 0;
            }
            System.out.printf(
                    "replay %d of rank %d, variant %d with %d tokens: token %d differs%n",
                    replay, rank, variant, tokens[variant], at / (SHAPE.hidden() * 2));
            return 1;
        }

        @Override
        public void close() {
            chain.close();
        }
    }

    @Test
    void shouldReplayTenLayersWithAnyTokensAndRoutingOnEveryRank() {
        replay(2, REPLAYS);
    }

    @Test
    void shouldReplayTenLayersWhereTwoRanksShareEachGpu() {
        replay(4, REPLAYS / 10);
    }

    private static void replay(int count, int replays) {
        int[][] tokens = new int[count][VARIANTS];
        int[][][] blocks = new int[count][VARIANTS][];
        for (int r = 0; r < count; r++) {
            for (int v = 0; v < VARIANTS; v++) {
                SplittableRandom random = new SplittableRandom(7000L + 100 * r + v);
                tokens[r][v] = LayerChain.tokens(v + r, random);
                blocks[r][v] = LayerChain.block(tokens[r][v], LAYERS, random);
            }
        }
        byte[][][] expected = onOneGpu(blocks);

        Replayer[] ranks = new Replayer[count];
        AtomicInteger mismatches = new AtomicInteger();
        try {
            Group.together(
                    Group.inProcess(count),
                    group -> {
                        int r = group.rank();
                        ranks[r] = new Replayer(group, replays, tokens[r], blocks[r], expected[r]);
                    });
            Group.together(List.of(ranks), rank -> mismatches.addAndGet(rank.replay(4242)));
        } finally {
            for (Replayer rank : ranks) {
                if (rank != null) {
                    rank.close();
                }
            }
        }
        System.out.println(
                "REPLAY10 gpus=2 ranks="
                        + count
                        + " replays="
                        + replays
                        + " mismatches="
                        + mismatches);
        assertThat(mismatches.get()).isZero();
    }

    /** The last layer's output by virtual ranks, [rank][variant]. */
    private static byte[][][] onOneGpu(int[][][] blocks) {
        int ranks = blocks.length;
        byte[][][] outputs = new byte[ranks][VARIANTS][];
        long different = 0;
        try (LayerChain virtual = new LayerChain(null, ranks, LAYERS, 1)) {
            for (int v = 0; v < VARIANTS; v++) {
                for (int r = 0; r < ranks; r++) {
                    virtual.load(0, r, blocks[r][v]);
                }
                virtual.enqueueInTurn(0);
                for (int r = 0; r < ranks; r++) {
                    outputs[r][v] = virtual.output(0, r);
                    different += notZero(outputs[r][v], blocks[r][v][0]);
                }
            }
        }
        assertThat(different).as("outputs that are not zero").isGreaterThan(VARIANTS * M * 64L);
        assertThat(Arrays.stream(outputs[0]).map(ByteBuffer::wrap).distinct().count())
                .as("outputs that differ")
                .isGreaterThan(VARIANTS / 2);
        return outputs;
    }

    private static long notZero(byte[] out, int tokens) {
        ByteBuffer bits = ByteBuffer.wrap(out).order(ByteOrder.LITTLE_ENDIAN);
        long different = 0;
        for (int i = 0; i < tokens * SHAPE.hidden(); i++) {
            float x = Float.intBitsToFloat(bits.getShort(2 * i) << 16);
            assertThat(Float.isFinite(x)).isTrue();
            different += x != 0 ? 1 : 0;
        }
        return different;
    }
}
