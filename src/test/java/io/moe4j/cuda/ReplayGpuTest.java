package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.SplittableRandom;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

/** One captured graph serves every T and every routing, bit for bit like the eager run. */
@EnabledIfCuda
class ReplayGpuTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    private static final int M = 16;
    private static final int VARIANTS = 64;
    private static final int REPLAYS = Integer.getInteger("moe4j.replays", 100_000);
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    @ParameterizedTest
    @CsvSource({"1,1", "4,2"})
    void shouldReplayWithAnyTokensAndRoutingBitwiseLikeEager(int ranks, int handles) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 3))
                        .backend("cuda")
                        .hiddenDType(DType.F32)
                        .maxTokensPerRank(M)
                        .ranks(ranks)
                        .handles(handles)
                        .build();
        try (Harness harness = new Harness(config, false, gpu.stream())) {
            BackendMemory memory = harness.layer.memory();
            List<Tensor[]> variants = new ArrayList<>();
            float[][] expected = new float[VARIANTS][];
            for (int v = 0; v < VARIANTS; v++) {
                List<Batch> batches = variant(v, ranks);
                float[][][] out = harness.run(batches, 0f);
                expected[v] = out[0][0].clone();
                expected[v] = flatten(out);
                variants.add(snapshot(harness, memory, ranks));
            }
            List<BoundStep> steps = new ArrayList<>();
            List<MoeGraph> graphs = new ArrayList<>();
            for (int h = 0; h < handles; h++) {
                BoundStep step = harness.layer.bind(harness.tensors(), h);
                steps.add(step);
                graphs.add(harness.layer.capture(gpu.stream(), step));
            }
            int perBatch = 512;
            long rowBytes = (long) M * SHAPE.hidden() * 4;
            Tensor ring = memory.allocate(DType.F32, perBatch, ranks, (long) M * SHAPE.hidden());
            Tensor host =
                    Tensor.allocateHost(DType.F32, perBatch, ranks, (long) M * SHAPE.hidden());
            long zero = memory.allocate(DType.F32, M, SHAPE.hidden()).address();
            SplittableRandom random = new SplittableRandom(99);
            int[] used = new int[perBatch];
            long free = gpu.freeBytes();
            long done = 0;
            while (done < REPLAYS) {
                try (Scope scope = gpu.context.enter()) {
                    for (int i = 0; i < perBatch; i++) {
                        int v = random.nextInt(VARIANTS);
                        used[i] = v;
                        restore(harness, variants.get(v), ranks, zero, rowBytes);
                        int which = random.nextInt(handles);
                        if (random.nextInt(50) == 0) {
                            harness.layer.enqueue(gpu.stream(), steps.get(which)); // eager between
                        } else {
                            graphs.get(which).launch(gpu.stream());
                        }
                        for (int r = 0; r < ranks; r++) {
                            gpu.driver.memcpyDtoDAsync(
                                    ring.address() + (i * (long) ranks + r) * rowBytes,
                                    harness.tensors().get(r).out().address(),
                                    rowBytes,
                                    gpu.stream());
                        }
                    }
                }
                harness.layer.synchronize(gpu.stream());
                memory.read(host, ring);
                float[] all = host.toFloats();
                int width = ranks * M * SHAPE.hidden();
                for (int i = 0; i < perBatch; i++) {
                    for (int j = 0; j < width; j++) {
                        if (Float.floatToRawIntBits(all[i * width + j])
                                != Float.floatToRawIntBits(expected[used[i]][j])) {
                            throw new AssertionError(
                                    "replay "
                                            + (done + i)
                                            + " variant "
                                            + used[i]
                                            + " element "
                                            + j
                                            + ": "
                                            + all[i * width + j]
                                            + " instead of "
                                            + expected[used[i]][j]);
                        }
                    }
                }
                done += perBatch;
            }
            harness.layer.check();
            assertThat(gpu.freeBytes()).as("device memory is flat").isEqualTo(free);
            System.out.println(
                    "REPLAY ranks="
                            + ranks
                            + " handles="
                            + handles
                            + " replays="
                            + done
                            + " mismatches=0");
            graphs.forEach(MoeGraph::close);
        }
    }

    /** T from {0, 1, 3, M} or random; uniform, one-hot, all −1, out of range, duplicates. */
    private static List<Batch> variant(int v, int ranks) {
        SplittableRandom random = new SplittableRandom(1000 + v);
        List<Batch> batches = new ArrayList<>();
        for (int r = 0; r < ranks; r++) {
            int tokens = new int[] {0, 1, 3, M, random.nextInt(M + 1)}[(v + r) % 5];
            Batch batch = Harness.random(SHAPE, tokens, 5000L * v + r);
            for (int t = 0; t < tokens; t++) {
                for (int k = 0; k < SHAPE.topK(); k++) {
                    switch (v % 8) {
                        case 1 -> batch.ids()[t][k] = k == 0 ? 5 : -1;
                        case 2 -> batch.ids()[t][k] = -1;
                        case 3 -> batch.ids()[t][k] = random.nextInt();
                        case 4 -> batch.ids()[t][k] = random.nextInt(3);
                        default -> {}
                    }
                }
            }
            batches.add(batch);
        }
        return batches;
    }

    private static Tensor[] snapshot(Harness harness, BackendMemory memory, int ranks) {
        Tensor[] copies = new Tensor[4 * ranks];
        try (Scope scope = gpu.context.enter()) {
            for (int r = 0; r < ranks; r++) {
                StepTensors t = harness.tensors().get(r);
                Tensor[] sources = {t.hidden(), t.topkIds(), t.topkWeights(), t.tokenCount()};
                for (int i = 0; i < 4; i++) {
                    copies[4 * r + i] = memory.allocate(sources[i].dtype(), sources[i].shape());
                    gpu.driver.memcpyDtoD(
                            copies[4 * r + i].address(), sources[i].address(), sources[i].bytes());
                }
            }
            gpu.driver.contextSynchronize();
        }
        return copies;
    }

    private static void restore(
            Harness harness, Tensor[] copies, int ranks, long zero, long rowBytes) {
        for (int r = 0; r < ranks; r++) {
            StepTensors t = harness.tensors().get(r);
            Tensor[] targets = {t.hidden(), t.topkIds(), t.topkWeights(), t.tokenCount()};
            for (int i = 0; i < 4; i++) {
                gpu.driver.memcpyDtoDAsync(
                        targets[i].address(),
                        copies[4 * r + i].address(),
                        targets[i].bytes(),
                        gpu.stream());
            }
            gpu.driver.memcpyDtoDAsync(t.out().address(), zero, rowBytes, gpu.stream());
        }
    }

    private static float[] flatten(float[][][] out) {
        float[] flat = new float[out.length * M * SHAPE.hidden()];
        int at = 0;
        for (float[][] rank : out) {
            for (float[] row : rank) {
                System.arraycopy(row, 0, flat, at, row.length);
                at += row.length;
            }
        }
        return flat;
    }

    @ParameterizedTest
    @ValueSource(ints = {1, 2, 8})
    void shouldReadNothingPastACount(int ranks) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(
                                RandomWeights.of(new MoeShape(100, 72, 12, 4, 40), 4)
                                        .withSharedGate())
                        .backend("cuda")
                        .maxTokensPerRank(M)
                        .ranks(ranks)
                        .build();
        try (Harness harness = new Harness(config, false, gpu.stream())) {
            for (int tokens : new int[] {0, 1, 3, 7, M}) {
                Batch batch = Harness.random(config.shape(), tokens, tokens);
                List<Batch> batches = new ArrayList<>();
                for (int r = 0; r < ranks; r++) {
                    batches.add(r == ranks - 1 ? batch : Batch.empty());
                }
                float[][][] clean = harness.run(batches);
                for (byte poison : new byte[] {(byte) 0xff, 0x7f, 0x00, (byte) 0x80}) {
                    ((CudaLayer) harness.layer).poison(poison);
                    assertThat(harness.run(batches))
                            .as("poison %02x, %d tokens", poison, tokens)
                            .isDeepEqualTo(clean);
                }
            }
        }
    }

    @Test
    void shouldKeepMemoryUntilTheLastGraphIsClosed() {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 4))
                        .backend("cuda")
                        .hiddenDType(DType.F32)
                        .maxTokensPerRank(4096)
                        .build();
        try (Harness warmUp = new Harness(config, false, gpu.stream())) {
            warmUp.run(List.of(Harness.random(SHAPE, 2, 1)));
        }
        long before = gpu.freeBytes();
        Harness harness = new Harness(config, false, gpu.stream());
        MoeGraph graph = harness.layer.capture(gpu.stream(), harness.step());
        graph.launch(gpu.stream());
        harness.close();
        assertThat(gpu.freeBytes()).as("pinned by the graph").isLessThan(before);
        graph.close();
        assertThat(gpu.freeBytes()).as("freed with the graph").isEqualTo(before);
    }

    @Test
    void shouldOpenAndCloseAThousandTimesWithoutDrift() {
        int cycles = Integer.getInteger("moe4j.cycles", 1000);
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 4))
                        .backend("cuda")
                        .hiddenDType(DType.F32)
                        .maxTokensPerRank(M)
                        .ranks(2)
                        .build();
        Batch batch = Harness.random(SHAPE, 5, 5);
        long first = 0;
        for (int cycle = 0; cycle < cycles; cycle++) {
            try (Harness harness = new Harness(config, false, gpu.stream());
                    MoeGraph graph = harness.layer.capture(gpu.stream(), harness.step())) {
                harness.write(List.of(batch, Batch.empty()));
                graph.launch(gpu.stream());
                harness.layer.synchronize(gpu.stream());
            }
            if (cycle == 0) {
                first = gpu.freeBytes();
            }
        }
        assertThat(gpu.freeBytes()).isEqualTo(first);
        System.out.println("CYCLES " + cycles + " drift=0");
    }

    @Test
    void shouldRunRightPastTwoToThe31Elements() {
        // recv_rows: R*M*Hp = 1 * 1,100,000 * 2048 > 2^31 elements
        MoeShape shape = MoeShape.of(2048, 64, 4, 1);
        int m = 1_047_000;
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(shape, 6))
                        .backend("cuda")
                        .maxTokensPerRank(m)
                        .ranks(2)
                        .build();
        try (io.moe4j.MoeLayer layer = io.moe4j.Moe.open(config)) {
            layer.prepare();
            BackendMemory memory = layer.memory();
            List<StepTensors> tensors = new ArrayList<>();
            for (int r = 0; r < 2; r++) {
                tensors.add(
                        StepTensors.topk(
                                memory.allocate(DType.F32, m, 2048),
                                memory.allocate(DType.BF16, m, 2048),
                                memory.allocate(DType.I32, m, 1),
                                memory.allocate(DType.F32, m, 1),
                                memory.allocate(DType.I32, 1)));
            }
            BoundStep step = layer.bind(tensors);
            // all tokens of both ranks visit expert 3 (on rank 1) with weight 1
            try (Scope scope = gpu.context.enter()) {
                for (StepTensors t : tensors) {
                    gpu.driver.memsetD32(t.topkIds().address(), 3, m);
                    gpu.driver.memsetD32(t.topkWeights().address(), Float.floatToRawIntBits(1f), m);
                    gpu.driver.memsetD32(t.tokenCount().address(), m, 1);
                    gpu.driver.memsetD32(t.hidden().address(), 0, (long) m * 1024);
                }
            }
            Batch probe = Harness.random(shape, 1, 7);
            Tensor row = Tensor.allocateHost(DType.BF16, 2048);
            row.setFloats(probe.hidden()[0]);
            for (int r = 0; r < 2; r++) {
                for (long t : new long[] {0, m - 1}) {
                    write(tensors.get(r).hidden().address() + t * 4096, row);
                }
            }
            layer.enqueue(gpu.stream(), step);
            layer.synchronize(gpu.stream());
            layer.check();
            float[] first = read(tensors.get(0).out().address());
            assertThat(first).isNotEqualTo(new float[2048]);
            for (int r = 0; r < 2; r++) {
                float[] last = read(tensors.get(r).out().address() + (m - 1L) * 8192);
                assertThat(last).as("rank %d last token", r).isEqualTo(first);
                assertThat(read(tensors.get(r).out().address() + (m - 2L) * 8192))
                        .as("rank %d a zero token", r)
                        .isEqualTo(new float[2048]);
            }
        }
    }

    private static void write(long address, Tensor row) {
        try (Scope scope = gpu.context.enter()) {
            gpu.driver.memcpyHtoD(address, row.buffer());
        }
    }

    private static float[] read(long address) {
        ByteBuffer bytes = ByteBuffer.allocateDirect(8192).order(java.nio.ByteOrder.LITTLE_ENDIAN);
        try (Scope scope = gpu.context.enter()) {
            gpu.driver.memcpyDtoH(bytes, address);
        }
        float[] row = new float[2048];
        bytes.asFloatBuffer().get(row);
        return row;
    }
}
