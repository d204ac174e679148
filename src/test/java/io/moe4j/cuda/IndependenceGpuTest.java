package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.StepTensors;
import io.moe4j.checker.Checker;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.SplittableRandom;
import java.util.TreeSet;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;

/**
 * A token's output has the same bits among any mates, in any slot, and by whichever matrix kernels
 * the layer chose. Tokens come from a pool; each was run alone by the portable kernels, and every
 * row of every batch is compared with that. One rank of qwen3-30b-a3b over eight.
 */
@EnabledIfCuda
class IndependenceGpuTest {
    private static final int BATCHES = Integer.getInteger("moe4j.batches", 10_000);
    private static final long SEED = Long.getLong("moe4j.seed", 20_261);
    private static final int POOL = 512;
    private static final int EXPERTS = 16;
    private static final int H = 2048;
    private static final int I = 768;
    private static final int K = 4;
    private static final int IN = 2 * H;
    private static final int OUT = 4 * H;

    private static GpuFixture gpu;
    private static Pool pool;
    private static List<Runner> runners;

    /** Tokens with their routing, and the output of each alone. */
    private static final class Pool {
        final ByteBuffer hidden = direct(POOL * IN);
        final ByteBuffer ids = direct(POOL * 4 * K);
        final ByteBuffer weights = direct(POOL * 4 * K);
        final ByteBuffer alone = direct(POOL * OUT);
        final int[] all = IntStream.range(0, POOL).toArray();
        final int[] visitorsOfExpert0;

        Pool() {
            float[] values = Checker.randomHidden(SEED, 0, POOL, H);
            Tensor rows = Tensor.allocateHost(DType.BF16, POOL, H);
            rows.writeFloats(values, 0, 0, POOL * H);
            hidden.put(0, rows.buffer(), 0, POOL * IN);
            SplittableRandom random = new SplittableRandom(SEED);
            for (int token = 0; token < POOL; token++) {
                int[] chosen = chooseExperts(random);
                for (int k = 0; k < K; k++) {
                    ids.putInt(4 * (token * K + k), chosen[k]);
                    weights.putFloat(4 * (token * K + k), (float) random.nextDouble(0.05, 1));
                }
            }
            visitorsOfExpert0 = Arrays.stream(all).filter(t -> visits(t, 0)).toArray();
        }

        /** K different ones; low numbers more often, so that experts differ in rows. */
        private static int[] chooseExperts(SplittableRandom random) {
            int[] chosen = new int[K];
            int found = 0;
            while (found < K) {
                int expert = (int) (EXPERTS * Math.pow(random.nextDouble(), 1.6));
                if (Arrays.stream(chosen, 0, found).noneMatch(e -> e == expert)) {
                    chosen[found++] = expert;
                }
            }
            return chosen;
        }

        boolean visits(int token, int expert) {
            return IntStream.range(0, K).anyMatch(k -> ids.getInt(4 * (token * K + k)) == expert);
        }
    }

    /** A layer with its bound tensors; a batch goes in and out through page-locked memory. */
    private static final class Runner implements AutoCloseable {
        final String label;
        final int m;
        final CudaLayer layer;
        private final StepTensors tensors;
        private final BoundStep step;
        private final MoeGraph graph;
        private final PinnedBuffer in;
        private final PinnedBuffer out;
        private final int idsAt;
        private final int weightsAt;
        private final int countAt;

        Runner(String gemm, int m, int expectedRows) {
            this.m = m;
            MoeShape shape = MoeShape.of(H, I, EXPERTS, K);
            MoeConfig config =
                    MoeConfig.builder()
                            .weights(
                                    new DeviceRandomWeights(
                                            shape, RandomWeights.of(shape, SEED), SEED))
                            .maxTokensPerRank(m)
                            .expectedRowsPerExpert(expectedRows)
                            .backend("cuda")
                            .build();
            System.setProperty("moe4j.cuda.gemm", gemm);
            try {
                layer = (CudaLayer) io.moe4j.Moe.open(config);
                layer.prepare();
            } finally {
                System.clearProperty("moe4j.cuda.gemm");
            }
            label = layer.expertSymbols() + ", M=" + m;
            BackendMemory memory = layer.memory();
            tensors =
                    StepTensors.topk(
                            memory.allocate(DType.F32, m, H),
                            memory.allocate(DType.BF16, m, H),
                            memory.allocate(DType.I32, m, K),
                            memory.allocate(DType.F32, m, K),
                            memory.allocate(DType.I32, 1));
            step = layer.bind(List.of(tensors));
            graph = layer.capture(gpu.stream(), step);
            idsAt = m * IN;
            weightsAt = idsAt + m * 4 * K;
            countAt = weightsAt + m * 4 * K;
            in = new PinnedBuffer(gpu.context, countAt + 4);
            out = new PinnedBuffer(gpu.context, (long) m * OUT);
        }

        /** Puts pool tokens into the slots. */
        void fill(int[] tokens) {
            ByteBuffer to = in.bytes();
            for (int slot = 0; slot < tokens.length; slot++) {
                to.put(slot * IN, pool.hidden, tokens[slot] * IN, IN);
                route(slot, tokens[slot]);
            }
            to.putInt(countAt, tokens.length);
        }

        void route(int slot, int token) {
            in.bytes().put(idsAt + slot * 4 * K, pool.ids, token * 4 * K, 4 * K);
            in.bytes().put(weightsAt + slot * 4 * K, pool.weights, token * 4 * K, 4 * K);
        }

        /** Runs what was filled in; the rows are then in {@link #row}. */
        void run(boolean replay) {
            int tokens = in.bytes().getInt(countAt);
            copyIn(tensors.hidden(), 0, tokens * IN);
            copyIn(tensors.topkIds(), idsAt, tokens * 4 * K);
            copyIn(tensors.topkWeights(), weightsAt, tokens * 4 * K);
            copyIn(tensors.tokenCount(), countAt, 4);
            if (replay) {
                graph.launch(gpu.stream());
            } else {
                layer.enqueue(gpu.stream(), step);
            }
            try (Scope scope = gpu.context.enter()) {
                gpu.driver.memcpyDtoHAsync(
                        out.memory(),
                        0,
                        tensors.out().address(),
                        (long) tokens * OUT,
                        gpu.stream());
            }
            gpu.stream.synchronize();
        }

        private void copyIn(Tensor to, int from, int bytes) {
            try (Scope scope = gpu.context.enter()) {
                gpu.driver.memcpyHtoDAsync(to.address(), in.memory(), from, bytes, gpu.stream());
            }
        }

        ByteBuffer row(int slot) {
            return out.bytes().slice(slot * OUT, OUT).order(ByteOrder.LITTLE_ENDIAN);
        }

        /** Slots whose row is not that of the token alone. */
        List<Integer> differing(int[] tokens) {
            List<Integer> slots = new ArrayList<>();
            for (int slot = 0; slot < tokens.length; slot++) {
                if (row(slot).mismatch(pool.alone.slice(tokens[slot] * OUT, OUT)) >= 0) {
                    slots.add(slot);
                }
            }
            return slots;
        }

        List<Integer> differingAfter(int[] tokens) {
            fill(tokens);
            run(true);
            return differing(tokens);
        }

        @Override
        public void close() {
            graph.close();
            layer.close();
            in.close();
            out.close();
        }
    }

    private static ByteBuffer direct(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
    }

    @BeforeAll
    static void runEveryTokenAlone() {
        gpu = new GpuFixture();
        pool = new Pool();
        runners = new ArrayList<>();
        runners.add(new Runner("mma", 64, 0));
        for (int token = 0; token < POOL; token++) {
            runners.get(0).fill(new int[] {token});
            runners.get(0).run(false);
            pool.alone.put(token * OUT, runners.get(0).row(0), 0, OUT);
        }
        // M and expected rows of an expert: decode, prefill, and each with the kernels of the other
        runners.add(new Runner("mma", 1024, 0));
        int[][] sizes = {{8, 0}, {64, 8}, {512, 1}, {256, 96}, {64, 96}, {512, 256}, {4096, 0}};
        for (int[] size : sizes) {
            runners.add(new Runner("", size[0], size[1]));
        }
        if (runners.stream().anyMatch(r -> r.label.contains("wgmma"))) {
            runners.add(new Runner("split", 64, 0));
            runners.add(new Runner("split", 1024, 0));
            runners.add(new Runner("split", 512, 256));
        }
    }

    @AfterAll
    static void close() {
        if (runners != null) {
            runners.forEach(Runner::close);
        }
        gpu.close();
    }

    @Test
    void shouldGiveATokenTheSameBitsAmongAnyMatesByAnyKernels() throws IOException {
        assertThat(kernelsThatRan()).as("kernels of the experts").isEqualTo(kernelsOfTheImage());
        SplittableRandom random = new SplittableRandom(SEED + 1);
        long rows = 0;
        for (int batch = 0; batch < BATCHES; batch++) {
            Runner runner = runners.get(random.nextInt(runners.size()));
            int[] tokens = draw(random, runner.m);
            runner.fill(tokens);
            runner.run(random.nextInt(4) > 0);
            rows += tokens.length;
            List<Integer> wrong = runner.differing(tokens);
            if (!wrong.isEmpty()) {
                throw new AssertionError(describe(batch, runner, tokens, wrong));
            }
        }
        runners.forEach(runner -> runner.layer.check());
        System.out.println(
                "BITWISE batches="
                        + BATCHES
                        + " rows="
                        + rows
                        + " layers="
                        + runners.size()
                        + " kernels="
                        + kernelsThatRan().size()
                        + " mismatches=0");
    }

    /**
     * One to M tokens, small batches as often as large ones: any, a few often, or all to one
     * expert.
     */
    private static int[] draw(SplittableRandom random, int m) {
        int count = (int) Math.min(m, Math.floor(Math.exp(random.nextDouble() * Math.log(m + 1))));
        int[] from =
                switch (random.nextInt(6)) {
                    case 0 -> new int[] {random.nextInt(POOL), random.nextInt(POOL)};
                    case 1 -> pool.visitorsOfExpert0;
                    default -> pool.all;
                };
        return IntStream.range(0, count).map(i -> from[random.nextInt(from.length)]).toArray();
    }

    private static String describe(int batch, Runner runner, int[] tokens, List<Integer> wrong) {
        int slot = wrong.get(0);
        ByteBuffer want = pool.alone.slice(tokens[slot] * OUT, OUT).order(ByteOrder.LITTLE_ENDIAN);
        int at = runner.row(slot).mismatch(want) / 4 * 4;
        return "batch "
                + batch
                + " of "
                + tokens.length
                + " tokens, seed "
                + SEED
                + ", "
                + runner.label
                + ": "
                + wrong.size()
                + " rows differ, first slot "
                + slot
                + " (token "
                + tokens[slot]
                + ") column "
                + at / 4
                + ": "
                + runner.row(slot).getFloat(at)
                + ", alone "
                + want.getFloat(at);
    }

    private static TreeSet<String> kernelsThatRan() {
        TreeSet<String> ran = new TreeSet<>();
        runners.forEach(runner -> ran.addAll(runner.layer.expertSymbols()));
        return ran;
    }

    /** Every kernel of kernels.def that an experts phase can have here: none may stay untried. */
    private static TreeSet<String> kernelsOfTheImage() throws IOException {
        boolean hopper = kernelsThatRan().stream().anyMatch(name -> name.contains("wgmma"));
        TreeSet<String> names = new TreeSet<>();
        try (InputStream in =
                IndependenceGpuTest.class.getResourceAsStream("/io/moe4j/kernels/kernels.def")) {
            new String(in.readAllBytes(), StandardCharsets.UTF_8)
                    .lines()
                    .map(line -> line.trim().split("\\s+"))
                    .filter(c -> c[0].startsWith("moe_"))
                    .filter(c -> List.of("gate_up", "down", "experts").contains(c[5]))
                    .filter(c -> hopper || c[6].equals("all"))
                    .forEach(c -> names.add(c[0]));
        }
        return names;
    }

    // ------------------------------------------------ what the comparison has to notice

    @Test
    void shouldNoticeOneBitOfOneToken() {
        int[] tokens = IntStream.range(100, 108).toArray();
        for (Runner runner : runners) {
            runner.fill(tokens);
            ByteBuffer in = runner.in.bytes();
            int at = 5 * IN + 2 * 77;
            in.putShort(at, (short) (in.getShort(at) ^ 1));
            runner.run(true);
            assertThat(runner.differing(tokens)).as(runner.label).containsExactly(5);
            assertThat(runner.differingAfter(tokens)).as(runner.label).isEmpty();
        }
    }

    @Test
    void shouldNoticeSwappedRoutings() {
        int[] tokens = IntStream.range(200, 208).toArray();
        for (Runner runner : runners) {
            runner.fill(tokens);
            runner.route(2, tokens[6]);
            runner.route(6, tokens[2]);
            runner.run(true);
            assertThat(runner.differing(tokens)).as(runner.label).containsExactly(2, 6);
        }
    }

    @Test
    void shouldNoticeOneWeightInTheTokensThatVisitItsExpertOnly() {
        int expert = 3;
        int[] tokens = // in turn one that visits it and one that does not
                IntStream.range(0, 64)
                        .map(
                                i ->
                                        IntStream.range(0, POOL)
                                                .filter(t -> pool.visits(t, expert) == (i % 2 == 0))
                                                .skip(i / 2)
                                                .findFirst()
                                                .orElseThrow())
                        .toArray();
        for (Runner runner : runners) {
            int[] batch = Arrays.copyOf(tokens, Math.min(runner.m, tokens.length));
            long address = runner.layer.weights("w_down") + 2L * expert * H * I;
            flipSign(address);
            List<Integer> wrong = runner.differingAfter(batch);
            flipSign(address);
            assertThat(wrong)
                    .as(runner.label)
                    .isNotEmpty()
                    .allMatch(slot -> pool.visits(batch[slot], expert));
            assertThat(runner.differingAfter(batch)).as(runner.label).isEmpty();
        }
    }

    private static void flipSign(long address) {
        ByteBuffer weight = direct(2);
        try (Scope scope = gpu.context.enter()) {
            gpu.driver.memcpyDtoH(weight, address);
            weight.putShort(0, (short) (weight.getShort(0) ^ 0x8000));
            gpu.driver.memcpyHtoD(address, weight.rewind());
            gpu.driver.contextSynchronize();
        }
    }
}
