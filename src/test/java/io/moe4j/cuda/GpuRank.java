package io.moe4j.cuda;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.KernelCatalog;
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

    private GpuRank(MoeConfig config, Driver driver) {
        int device = config.device() < 0 ? config.firstLocalRank() : config.device();
        context = new Context(driver, device);
        stream = new Stream(context);
        harness =
                new Harness(
                        CudaBackendProvider.open(
                                driver, KernelCatalog.choose(driver, device), config, "test"),
                        false,
                        stream.handle());
    }

    static MoeConfig config() {
        return config(2);
    }

    static MoeConfig config(int ranks) {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 9))
                .backend("cuda")
                .hiddenDType(DType.BF16)
                .maxTokensPerRank(M)
                .ranks(ranks)
                .threads(2)
                .stepTimeout(BUDGET)
                .firstStepTimeout(BUDGET.multipliedBy(4))
                .build();
    }

    /** Collective: prepares the layer with the other ranks. */
    static GpuRank open(MoeConfig config, Group group) {
        return open(config, group, Drivers.open());
    }

    /** As {@link #open(MoeConfig, Group)}, with a driver of the test's own. */
    static GpuRank open(MoeConfig config, Group group, Driver driver) {
        return new GpuRank(config.toBuilder().group(group).build(), driver);
    }

    /** All ranks of a new group in this process, on a GPU each. */
    static GpuRank[] openAll(MoeConfig config) {
        return openAll(config, config.ranks());
    }

    /** All ranks of a new group in this process, on so many GPUs. */
    static GpuRank[] openAll(MoeConfig config, int gpus) {
        GpuRank[] ranks = new GpuRank[config.ranks()];
        Group.together(
                Group.inProcess(config.ranks()),
                group ->
                        ranks[group.rank()] =
                                open(
                                        config.toBuilder().device(group.rank() % gpus).build(),
                                        group));
        return ranks;
    }

    static Batch batch(int rank, int tokens, long seed) {
        return Harness.random(SHAPE, tokens, seed * 64 + rank);
    }

    /** What virtual ranks on one GPU give; [rank][M][H]. */
    static float[][][] expected(Batch... batches) {
        try (GpuFixture gpu = new GpuFixture();
                Harness virtual = new Harness(config(batches.length), false, gpu.stream())) {
            return virtual.run(List.of(batches));
        }
    }

    /** The same batch without the experts of some ranks. */
    static Batch without(Set<Integer> lost, Batch batch) {
        return without(lost, batch, 2);
    }

    /** The same batch without the experts of some of so many ranks. */
    static Batch without(Set<Integer> lost, Batch batch, int ranks) {
        int local = config(ranks).expertsPerRank();
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
