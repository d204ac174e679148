package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/** Two micro-batches of each rank in one graph on two GPUs, against one after the other. */
@EnabledIfCuda(devices = 2)
@Timeout(120)
class OverlapMultiGpuTest {
    private static final int TOKENS = 19;

    @Test
    void shouldGiveTheBitsOfTwoStepsOneAfterTheOther() {
        Batch[][] batches = new Batch[2][2];
        float[][][][] expected = new float[2][][][];
        for (int micro = 0; micro < 2; micro++) {
            for (int r = 0; r < 2; r++) {
                batches[micro][r] = GpuRank.batch(r, TOKENS - micro * 7 - r, 40 + micro);
            }
            expected[micro] = GpuRank.expected(batches[micro]);
        }
        MoeConfig config = GpuRank.config().toBuilder().handles(2).build();
        GpuRank[] ranks = GpuRank.openAll(config);
        Harness.Second[] seconds = new Harness.Second[2];
        MoeGraph[] graphs = new MoeGraph[2];
        for (int r = 0; r < 2; r++) {
            ranks[r].load(batches[0][r]);
            seconds[r] = ranks[r].harness.second(1);
            seconds[r].write(batches[1][r]);
            graphs[r] =
                    ranks[r].harness.layer.captureOverlapped(
                            ranks[r].stream().handle(), ranks[r].harness.step(), seconds[r].step());
        }
        for (int i = 0; i < 300; i++) {
            for (int r = 0; r < 2; r++) {
                ranks[r].launch(graphs[r]);
            }
        }
        for (int r = 0; r < 2; r++) {
            ranks[r].await();
            ranks[r].harness.layer.result(0, 300);
            ranks[r].harness.layer.result(1, 300);
            int first = batches[0][r].tokens();
            int second = batches[1][r].tokens();
            assertThat(ranks[r].output(first)).isDeepEqualTo(Arrays.copyOf(expected[0][r], first));
            assertThat(Arrays.copyOf(seconds[r].outputs(), second))
                    .isDeepEqualTo(Arrays.copyOf(expected[1][r], second));
            graphs[r].close();
        }
        for (GpuRank rank : ranks) {
            rank.close();
        }
    }

    /** Prints times; asserts that all steps were valid. */
    @Test
    void shouldRunLargerMicroBatchesOverlappedAndInOrder() {
        MoeShape shape = MoeShape.of(2048, 768, 32, 8);
        MoeConfig config =
                GpuRank.config().toBuilder()
                        .weights(RandomWeights.of(shape, 3))
                        .maxTokensPerRank(128)
                        .handles(2)
                        .build();
        GpuRank[] ranks = GpuRank.openAll(config);
        MoeGraph[][] graphs = new MoeGraph[2][2];
        for (int r = 0; r < 2; r++) {
            Harness.Second second = ranks[r].harness.second(1);
            ranks[r].load(Harness.random(shape, 128, 60 + r));
            second.write(Harness.random(shape, 128, 70 + r));
            long stream = ranks[r].stream().handle();
            CudaLayer layer = ranks[r].layer();
            graphs[0][r] =
                    layer.capture(
                            stream,
                            List.of(
                                    io.moe4j.GraphPart.whole(ranks[r].harness.step()),
                                    io.moe4j.GraphPart.whole(second.step())));
            graphs[1][r] = layer.captureOverlapped(stream, ranks[r].harness.step(), second.step());
        }
        double[] micros = new double[2];
        for (int repeat = 0; repeat < 3; repeat++) {
            for (int way = 0; way < 2; way++) {
                micros[way] = time(ranks, graphs[way]);
            }
        }
        System.out.println(
                String.format(
                        Locale.ROOT,
                        "OVERLAP H=2048 I=768 E=32 K=8 M=128 R=2: two steps in order %.1f us,"
                                + " overlapped %.1f us",
                        micros[0],
                        micros[1]));
        for (int r = 0; r < 2; r++) {
            ranks[r].harness.layer.result(0, 2 * 3 * 200);
            ranks[r].harness.layer.result(1, 2 * 3 * 200);
            graphs[0][r].close();
            graphs[1][r].close();
            ranks[r].close();
        }
    }

    private static double time(GpuRank[] ranks, MoeGraph[] graphs) {
        long start = System.nanoTime();
        Group.together(
                List.of(0, 1),
                r -> {
                    for (int i = 0; i < 200; i++) {
                        ranks[r].launch(graphs[r]);
                    }
                    ranks[r].await();
                });
        return (System.nanoTime() - start) / 200e3;
    }
}
