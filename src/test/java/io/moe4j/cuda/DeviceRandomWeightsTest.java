package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.MoeConfig;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.Bf16;
import java.util.List;
import org.junit.jupiter.api.Test;

/** The host's side of weights that are filled on the device; BenchGpuTest compares the two. */
class DeviceRandomWeightsTest {
    private static final MoeShape SHAPE = new MoeShape(200, 72, 3, 2, 40);

    private static DeviceRandomWeights weights(long seed) {
        return new DeviceRandomWeights(SHAPE, RandomWeights.of(SHAPE, 1).withBias(), seed);
    }

    private static float[] read(WeightMatrix matrix) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values);
        return values;
    }

    @Test
    void shouldSpreadBfloat16ValuesEvenly() {
        float[] gate = read(weights(1).expert(0).gate());
        double bound = Math.sqrt(3.0 / SHAPE.hidden());
        double sum = 0;
        double squares = 0;
        for (float value : gate) {
            assertThat(Math.abs(value)).isLessThanOrEqualTo((float) bound * 1.01f);
            assertThat(Bf16.toFloat(Bf16.fromFloat(value))).isEqualTo(value);
            sum += value;
            squares += value * value;
        }
        assertThat(Math.abs(sum / gate.length)).isLessThan(bound / 50);
        assertThat(squares / gate.length * SHAPE.hidden()).isBetween(0.95, 1.05);
    }

    @Test
    void shouldDifferByMatrixExpertAndSeedAndRepeat() {
        DeviceRandomWeights weights = weights(1);
        List<float[]> all =
                List.of(
                        read(weights.expert(0).gate()),
                        read(weights.expert(0).up()),
                        read(weights.expert(1).gate()),
                        read(weights(2).expert(0).gate()),
                        read(weights.expert(0).down()));
        for (int i = 0; i < all.size(); i++) {
            for (int j = 0; j < i; j++) {
                assertThat(all.get(i)).isNotEqualTo(all.get(j));
            }
        }
        assertThat(read(weights(1).expert(0).gate())).isEqualTo(all.get(0));
    }

    @Test
    void shouldFillOnTheDeviceAndPackNothing() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
        RecordingDriver driver = new RecordingDriver();
        MoeConfig config =
                MoeConfig.builder().weights(weights(1)).maxTokensPerRank(4).threads(2).build();
        try (CudaLayer layer =
                CudaBackendProvider.open(driver, KernelCatalog.choose(driver, 0), config, "test")) {
            layer.prepare();
            assertThat(driver.launches())
                    .extracting(RecordingDriver.Launch::kernel)
                    .hasSize(4)
                    .containsOnly("moe_fill_random");
        }
        assertThat(driver.leaks()).isEmpty();
    }
}
