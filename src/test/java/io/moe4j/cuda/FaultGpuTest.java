package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.within;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.Phase;
import io.moe4j.Recovery;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import java.util.List;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;

/** A wait that expires is reported, marks the output invalid, and leaves the context usable. */
@EnabledIfCuda
class FaultGpuTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    private static MoeConfig config() {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 5))
                .backend("cuda")
                .hiddenDType(DType.F32)
                .maxTokensPerRank(24)
                .ranks(2)
                .build();
    }

    @Test
    void shouldNameOperationRankPeerAndEpochsWhenAFlagNeverComes() {
        Batch batch = Harness.random(SHAPE, 5, 1);
        try (Harness harness = new Harness(config(), false, gpu.stream())) {
            harness.run(List.of(batch, batch));
            harness.layer.result(0, 1);
            harness.write(List.of(batch, batch));
            for (int r = 0; r < 2; r++) {
                float[] marker = new float[24 * 64];
                java.util.Arrays.fill(marker, 77f);
                harness.put(harness.tensors().get(r).out(), marker);
            }
            harness.layer.enqueue(gpu.stream(), harness.step(), Phase.ROUTE, Phase.DISPATCH_SEND);
            // the rows of rank 0 get lost on their way to rank 1: its flag stays at epoch 0
            CudaLayer layer = (CudaLayer) harness.layer;
            try (Scope scope = gpu.context.enter()) {
                gpu.driver.memsetD8Async(
                        layer.handle(0).symmetric(1, "dispatch_flags"), (byte) 0, 8, gpu.stream());
            }
            long start = System.nanoTime();
            harness.layer.enqueue(
                    gpu.stream(), harness.step(), Phase.DISPATCH_RECV, Phase.COMBINE_RECV);
            harness.layer.synchronize(gpu.stream());
            double seconds = (System.nanoTime() - start) / 1e9;
            assertThat(seconds).as("bounded by 2 s").isBetween(1.9, 3.5);
            assertThatThrownBy(harness.layer::check)
                    .isInstanceOf(MoeFaultException.class)
                    .hasMessageContaining("dispatch_recv on rank 1 timed out")
                    .hasMessageContaining("for rank 0")
                    .hasMessageContaining("epoch expected 2, seen 0")
                    .hasMessageContaining("last valid epoch is 1");
            assertThatThrownBy(() -> harness.layer.result(0, 2))
                    .isInstanceOf(MoeFaultException.class);
            assertThat(harness.layer.validEpoch(0)).isEqualTo(1);
            assertThat(harness.outputs()[1][0]).as("output of the failed rank").containsOnly(77f);

            // the same layer goes on in a new generation
            Recovery agreed = harness.layer.recover();
            assertThat(agreed.validEpochs()).containsExactly(1L);
            float[][] got = harness.run(List.of(batch, Batch.empty()))[0];
            harness.layer.result(0, agreed.epoch() + 1);
            try (Harness cpu = new Harness(config().toBuilder().backend("cpu").build())) {
                float[][] want = cpu.run(List.of(batch, Batch.empty()))[0];
                for (int t = 0; t < 5; t++) {
                    assertThat(got[t]).containsExactly(want[t], within(0.05f));
                }
            }
        }
        // the context computes on: a new layer gives the right result
        try (Harness again = new Harness(config(), false, gpu.stream());
                Harness cpu = new Harness(config().toBuilder().backend("cpu").build())) {
            float[][] got = again.run(List.of(batch, Batch.empty()))[0];
            float[][] want = cpu.run(List.of(batch, Batch.empty()))[0];
            for (int t = 0; t < 5; t++) {
                for (int j = 0; j < 64; j++) {
                    assertThat(got[t][j]).isCloseTo(want[t][j], within(0.05f));
                }
            }
        }
    }
}
