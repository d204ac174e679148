package io.moe4j.cpu;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.BoundStep;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeLayerContract;
import io.moe4j.Phase;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import java.util.List;
import java.util.function.Consumer;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The laws on the CPU backend, and what only its own buffers can show. */
class CpuLayerTest extends MoeLayerContract {
    @Override
    protected String backend() {
        return "cpu";
    }

    @ParameterizedTest
    @ValueSource(ints = {1, 2, 4, 8})
    void shouldReadNothingThatTheStepDidNotWrite(int ranks) {
        Batch small = Harness.random(SHAPE, 5, 201);
        try (Harness layer = new Harness(config(SHAPE, 201).ranks(ranks).build())) {
            List<Batch> batches = spread(small, ranks);
            float[][][] clean = layer.run(batches);
            ((CpuLayer) layer.layer).poison(Float.NaN, 0x7ffffff0);
            float[][][] poisoned = layer.run(batches);
            assertThat(poisoned).isDeepEqualTo(clean);
        }
    }

    @Test
    void shouldCompareTensorsWithThoseBound() {
        try (Harness layer = new Harness(config(SHAPE, 205).build())) {
            StepTensors bound = layer.tensors().get(0);
            BoundStep step = layer.step();
            step.requireUnmoved(layer.tensors());
            step.requireAlive();
            assertThat(step.tensors()).isEqualTo(layer.tensors());
            StepTensors moved =
                    StepTensors.topk(
                            layer.layer.memory().allocate(DType.F32, bound.out().shape()),
                            bound.hidden(),
                            bound.topkIds(),
                            bound.topkWeights(),
                            bound.tokenCount());
            assertThatThrownBy(() -> step.requireUnmoved(List.of(moved)))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("rank 0: out was F32")
                    .hasMessageContaining("bind again and capture again, or keep one buffer");
            assertThatThrownBy(() -> step.requireUnmoved(List.of(bound, bound)))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessage("got the tensors of 2 ranks but bound were 1");
            layer.layer.close();
            assertThatThrownBy(step::requireAlive).hasMessageContaining("closed");
        }
    }

    @Test
    void shouldFailWhenTheProtocolIsBroken() {
        // mutants: each breaks one thing between two phases, and each must change the result
        List<Consumer<CpuRank>> mutants =
                List.of(
                        rank -> rank.expertRows[0] = (rank.expertRows[0] + 1) % 5, // wrong slot
                        rank -> { // off by one in the offsets
                            for (int e = 1; e < rank.expertOffsets.length - 1; e++) {
                                rank.expertOffsets[e]--;
                            }
                        },
                        rank -> rank.packedRowOf[0] = -1, // a contribution lost
                        rank -> rank.recvTokens[0]--, // the last token lost
                        rank -> rank.recvWeights[0][0] *= 2, // another token's weight
                        rank -> { // two rows swapped
                            float[] rows = rank.recvRows[0];
                            for (int j = 0; j < SHAPE.hidden(); j++) {
                                float x = rows[j];
                                rows[j] = rows[SHAPE.hidden() + j];
                                rows[SHAPE.hidden() + j] = x;
                            }
                        });
        Batch batch = Harness.random(SHAPE, 5, 211);
        for (int i = 0; i < mutants.size(); i++) {
            try (Harness layer = new Harness(config(SHAPE, 211).build())) {
                float[][][] right = layer.run(List.of(batch));
                layer.run(List.of(Harness.random(SHAPE, 24, 212))); // no stale row may help
                layer.write(List.of(batch));
                layer.layer.enqueue(0L, layer.step(), Phase.ROUTE, Phase.DISPATCH_RECV);
                mutants.get(i).accept(((CpuLayer) layer.layer).rank(0));
                layer.layer.enqueue(0L, layer.step(), Phase.EXPERTS, Phase.COMBINE_RECV);
                boolean survived = true;
                for (int t = 0; t < 5; t++) {
                    survived &= java.util.Arrays.equals(layer.outputs()[0][t], right[0][t]);
                }
                assertThat(survived).as("mutant %d survived", i).isFalse();
            }
        }
    }

    @Test
    void shouldReportAFlagThatLagsBehindTheEpoch() {
        Batch batch = Harness.random(SHAPE, 5, 221);
        try (Harness layer = new Harness(config(SHAPE, 221).ranks(2).build())) {
            layer.run(List.of(batch, Batch.empty()));
            layer.layer.enqueue(0L, layer.step(), Phase.ROUTE, Phase.DISPATCH_SEND);
            ((CpuLayer) layer.layer).rank(1).dispatchFlags[0]--;
            assertThat(
                            org.assertj.core.api.Assertions.catchThrowable(
                                    () ->
                                            layer.layer.enqueue(
                                                    0L,
                                                    layer.step(),
                                                    Phase.DISPATCH_RECV,
                                                    Phase.COMBINE_RECV)))
                    .hasMessageContaining(
                            "dispatch_recv on rank 1: peer 0 is at epoch 1, expected 2");
            layer.run(List.of(batch, Batch.empty())); // the next step is not held up
        }
    }

    @Test
    void shouldAllocateWhatThePlanSays() {
        var config = config(SHAPE, 231).ranks(4).build();
        var plan = CpuMemoryPlan.of(config);
        long rows = 4L * 24 * 3; // L = 3 < K = 4
        assertThat(plan.bytes("receive buffer")).isEqualTo(4L * 4 * 24 * 64 * 4);
        assertThat(plan.bytes("expert outputs")).isEqualTo(4 * rows * 64 * 4);
        assertThat(plan.totalBytes())
                .isEqualTo(plan.entries().stream().mapToLong(e -> e.bytes()).sum());
        assertThat(plan.toString()).contains("receive buffer").contains("R*[R][M][H]*4");
    }

    @Test
    void shouldCloseSafelyWhileAnotherThreadSteps() throws Exception {
        for (int round = 0; round < 20; round++) {
            Harness layer = new Harness(config(SHAPE, 241).build());
            layer.write(List.of(Harness.random(SHAPE, 24, 241)));
            Throwable[] seen = new Throwable[1];
            Thread stepper =
                    new Thread(
                            () -> {
                                try {
                                    while (true) {
                                        layer.layer.enqueue(0L, layer.step());
                                    }
                                } catch (Throwable e) {
                                    seen[0] = e;
                                }
                            });
            stepper.start();
            Thread.sleep(2);
            layer.close();
            stepper.join(10_000);
            assertThat(seen[0]).isInstanceOf(IllegalStateException.class);
        }
    }

    private static List<Batch> spread(Batch all, int ranks) {
        int[][] where = Harness.spread(all.tokens(), ranks, 7);
        return java.util.Arrays.stream(where).map(all::permuted).toList();
    }
}
