package io.moe4j.cuda;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import java.time.Duration;
import java.util.Arrays;
import java.util.List;
import java.util.Set;
import java.util.stream.IntStream;

/** One rank of a group on its GPU with a stream of its own, for tests of several GPUs. */
final class GpuRank implements AutoCloseable {
    static final MoeShape SHAPE = MoeShape.of(512, 256, 16, 4);
    static final int M = 24;
    static final Duration BUDGET = Duration.ofMillis(500);

    final Harness harness;
    private final Context context;
    private final Stream stream;

    private GpuRank(MoeConfig config) {
        context = new Context(Drivers.open(), config.firstLocalRank());
        stream = new Stream(context);
        harness = new Harness(config, false, stream.handle());
    }

    static MoeConfig config() {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 9))
                .backend("cuda")
                .hiddenDType(DType.BF16)
                .maxTokensPerRank(M)
                .ranks(2)
                .threads(2)
                .stepTimeout(BUDGET)
                .firstStepTimeout(BUDGET.multipliedBy(4))
                .build();
    }

    /** Collective: prepares the layer with the other ranks. */
    static GpuRank open(MoeConfig config, Group group) {
        return new GpuRank(config.toBuilder().group(group).build());
    }

    /** All ranks of a new group in this process. */
    static GpuRank[] openAll(MoeConfig config) {
        GpuRank[] ranks = new GpuRank[config.ranks()];
        Group.together(
                Group.inProcess(config.ranks()),
                group -> ranks[group.rank()] = open(config, group));
        return ranks;
    }

    static Batch batch(int rank, int tokens, long seed) {
        return Harness.random(SHAPE, tokens, seed * 64 + rank);
    }

    /** What virtual ranks on one GPU give; [rank][M][H]. */
    static float[][][] expected(Batch... batches) {
        try (GpuFixture gpu = new GpuFixture();
                Harness virtual = new Harness(config(), false, gpu.stream())) {
            return virtual.run(List.of(batches));
        }
    }

    /** The same batch without the experts of some ranks. */
    static Batch without(Set<Integer> lost, Batch batch) {
        int local = config().expertsPerRank();
        int[][] ids =
                Arrays.stream(batch.ids())
                        .map(
                                row ->
                                        IntStream.of(row)
                                                .map(id -> lost.contains(id / local) ? -1 : id)
                                                .toArray())
                        .toArray(int[][]::new);
        return new Batch(batch.hidden(), ids, batch.weights());
    }

    void load(Batch batch) {
        harness.write(List.of(batch));
    }

    void enqueue() {
        harness.layer.enqueue(stream.handle(), harness.step());
    }

    MoeGraph capture() {
        return harness.layer.capture(stream.handle(), harness.step());
    }

    void launch(MoeGraph graph) {
        graph.launch(stream.handle());
    }

    void await() {
        harness.layer.synchronize(stream.handle());
    }

    CudaLayer layer() {
        return (CudaLayer) harness.layer;
    }

    Stream stream() {
        return stream;
    }

    Context context() {
        return context;
    }

    /** The rows of the tokens alone. */
    float[][] output(int tokens) {
        return Arrays.copyOf(harness.outputs()[0], tokens);
    }

    @Override
    public void close() {
        harness.close();
        stream.close();
        context.close();
    }
}
