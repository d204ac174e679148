package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import java.nio.file.Path;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class CheckpointGoldenTest {
    private static final Path GOLDEN = Path.of("src", "test", "resources", "golden");

    @ParameterizedTest
    @CsvSource(
            delimiter = '|',
            value = {
                "mixtral         | mixtral     | 0,1 | 128 |  96 |  8 | 2 |   0",
                "qwen2_moe       | qwen2_moe   | 0   | 192 |  96 |  8 | 4 | 160",
                "qwen3_moe       | qwen3_moe   | 1   | 256 | 128 | 16 | 8 |   0",
                "qwen3_moe_fp8   | qwen3_moe   | 1   | 256 | 128 | 16 | 8 |   0",
                "deepseek_v3     | deepseek_v3 | 1   | 256 | 128 | 16 | 4 | 128",
                "deepseek_v3_fp8 | deepseek_v3 | 1   | 256 | 128 | 16 | 4 | 128",
                "gpt_oss         | gpt_oss     | 0   | 192 |  96 |  8 | 4 |   0"
            })
    void shouldOpenEveryGoldenFolderWithItsShape(
            String folder, String family, String layers, int h, int i, int e, int k, int shared) {
        try (Checkpoint checkpoint = Checkpoint.open(GOLDEN.resolve(folder))) {
            assertThat(checkpoint.family()).isEqualTo(family);
            assertThat(checkpoint.modelType()).isEqualTo(family);
            assertThat(checkpoint.moeLayers())
                    .isEqualTo(List.of(layers.split(",")).stream().map(Integer::valueOf).toList());
            for (int layer : checkpoint.moeLayers()) {
                CheckpointLayer opened = checkpoint.layer(layer);
                assertThat(opened.shape()).isEqualTo(new MoeShape(h, i, e, k, shared));
                MoeConfig config = opened.config().build();
                assertThat(config.weights()).isSameAs(opened);
                assertThat(config.routingInput()).isEqualTo(RoutingInput.HIDDEN);
                assertThat(config.outDType()).isEqualTo(DType.F32);
                assertThat(config.rule()).isEqualTo(opened.rule());
            }
        }
    }

    @Test
    void shouldTakeTheRoutingRuleFromTheConfiguration() {
        assertThat(rule("mixtral", 0)).isEqualTo(RoutingRule.softmaxTopK(true));
        assertThat(rule("qwen2_moe", 0)).isEqualTo(RoutingRule.softmaxTopK(false));
        assertThat(rule("qwen3_moe", 1)).isEqualTo(RoutingRule.softmaxTopK(true));
        assertThat(rule("deepseek_v3", 1)).isEqualTo(RoutingRule.sigmoidGrouped(4, 2, true, 2.5f));
        assertThat(rule("gpt_oss", 0)).isEqualTo(RoutingRule.topKSoftmax());
    }

    @Test
    void shouldTakeTheClampedActivationForGptOssOnly() {
        try (Checkpoint gptOss = Checkpoint.open(GOLDEN.resolve("gpt_oss"));
                Checkpoint mixtral = Checkpoint.open(GOLDEN.resolve("mixtral"))) {
            assertThat(gptOss.layer(0).activation())
                    .isEqualTo(Activation.clampedSwiGlu(1.702f, 7f));
            assertThat(gptOss.layer(0).hasBias()).isTrue();
            assertThat(mixtral.layer(0).activation()).isEqualTo(Activation.swiGlu());
            assertThat(mixtral.layer(0).hasBias()).isFalse();
        }
    }

    @Test
    void shouldNameADenseLayerAndTheMoeLayersThereAre() {
        try (Checkpoint checkpoint = Checkpoint.open(GOLDEN.resolve("qwen3_moe"))) {
            assertThat(checkpoint.layers())
                    .extracting(LayerInfo::kind)
                    .containsExactly(LayerInfo.Kind.DENSE, LayerInfo.Kind.MOE);
            assertThat(checkpoint.layers().get(0).description())
                    .isEqualTo("layer 0: dense (mlp.gate_proj), not a MoE layer");
            assertThatThrownBy(() -> checkpoint.layer(0))
                    .isInstanceOf(CheckpointException.class)
                    .hasMessageContaining("layer 0: dense (mlp.gate_proj), not a MoE layer")
                    .hasMessageContaining("its MoE layers are 1");
            assertThatThrownBy(() -> checkpoint.layer(7))
                    .isInstanceOf(CheckpointException.class)
                    .hasMessageContaining("layer 7 is absent")
                    .hasMessageContaining("its MoE layers are 1");
        }
    }

    @ParameterizedTest
    @CsvSource({
        "mixtral, 1, block_sparse_moe, w1, w3, w2",
        "qwen2_moe, 0, mlp, gate_proj, up_proj, down_proj",
        "qwen3_moe, 1, mlp, gate_proj, up_proj, down_proj",
        "qwen3_moe_fp8, 1, mlp, gate_proj, up_proj, down_proj",
        "deepseek_v3, 1, mlp, gate_proj, up_proj, down_proj",
        "deepseek_v3_fp8, 1, mlp, gate_proj, up_proj, down_proj"
    })
    void shouldDecodeEveryElementOfSeparateExperts(
            String folder, int layer, String block, String gate, String up, String down) {
        Path path = GOLDEN.resolve(folder);
        RawTensors raw = RawTensors.read(path);
        String prefix = "model.layers." + layer + "." + block + ".";
        try (Checkpoint checkpoint = Checkpoint.open(path)) {
            CheckpointLayer opened = checkpoint.layer(layer);
            for (int e : new int[] {0, 1, opened.shape().experts() - 1}) {
                String expert = prefix + "experts." + e + ".";
                ExpertWeights weights = opened.expert(e);
                requireSame(raw, expert + gate + ".weight", weights.gate());
                requireSame(raw, expert + up + ".weight", weights.up());
                requireSame(raw, expert + down + ".weight", weights.down());
            }
            requireSame(raw, prefix + "gate.weight", opened.router());
        }
    }

    @Test
    void shouldDecodeTheSharedExpertAndItsGate() {
        Path path = GOLDEN.resolve("qwen2_moe");
        RawTensors raw = RawTensors.read(path);
        try (Checkpoint checkpoint = Checkpoint.open(path)) {
            CheckpointLayer layer = checkpoint.layer(0);
            String shared = "model.layers.0.mlp.shared_expert.";
            requireSame(raw, shared + "gate_proj.weight", layer.sharedExpert().gate());
            requireSame(raw, shared + "up_proj.weight", layer.sharedExpert().up());
            requireSame(raw, shared + "down_proj.weight", layer.sharedExpert().down());
            float[] gate = layer.sharedExpertGate();
            for (int i = 0; i < gate.length; i++) {
                assertThat(gate[i])
                        .isEqualTo(
                                raw.at("model.layers.0.mlp.shared_expert_gate.weight", 128, 0, i));
            }
        }
    }

    @Test
    void shouldDecodeTheCorrectionBiasAndTheFp8SharedExpert() {
        Path path = GOLDEN.resolve("deepseek_v3_fp8");
        RawTensors raw = RawTensors.read(path);
        try (Checkpoint checkpoint = Checkpoint.open(path)) {
            CheckpointLayer layer = checkpoint.layer(1);
            float[] bias = layer.correctionBias();
            assertThat(bias).hasSize(16);
            for (int i = 0; i < bias.length; i++) {
                assertThat(bias[i])
                        .isEqualTo(
                                raw.at("model.layers.1.mlp.gate.e_score_correction_bias", 128, i));
            }
            requireSame(
                    raw,
                    "model.layers.1.mlp.shared_experts.down_proj.weight",
                    layer.sharedExpert().down());
            assertThat(layer.sharedExpertGate()).isNull();
        }
    }

    @Test
    void shouldTransposeAndSplitTheInterleavedTensorsOfGptOss() {
        Path path = GOLDEN.resolve("gpt_oss");
        RawTensors raw = RawTensors.read(path);
        String prefix = "model.layers.0.mlp.experts.";
        try (Checkpoint checkpoint = Checkpoint.open(path)) {
            CheckpointLayer layer = checkpoint.layer(0);
            int h = layer.shape().hidden();
            int n = layer.shape().intermediate();
            for (int e : new int[] {0, 3, 7}) {
                ExpertWeights weights = layer.expert(e);
                float[] gate = values(weights.gate());
                float[] up = values(weights.up());
                float[] down = values(weights.down());
                for (int i = 0; i < n; i++) {
                    for (int j = 0; j < h; j++) {
                        assertThat(gate[i * h + j])
                                .isEqualTo(raw.at(prefix + "gate_up_proj", 0, e, j, 2 * i));
                        assertThat(up[i * h + j])
                                .isEqualTo(raw.at(prefix + "gate_up_proj", 0, e, j, 2 * i + 1));
                        assertThat(down[j * n + i])
                                .isEqualTo(raw.at(prefix + "down_proj", 0, e, i, j));
                    }
                    assertThat(weights.gateBias()[i])
                            .isEqualTo(raw.at(prefix + "gate_up_proj_bias", 0, e, 2 * i));
                    assertThat(weights.upBias()[i])
                            .isEqualTo(raw.at(prefix + "gate_up_proj_bias", 0, e, 2 * i + 1));
                }
                for (int j = 0; j < h; j++) {
                    assertThat(weights.downBias()[j])
                            .isEqualTo(raw.at(prefix + "down_proj_bias", 0, e, j));
                }
            }
            for (int e = 0; e < layer.shape().experts(); e++) {
                assertThat(layer.routerBias()[e])
                        .isEqualTo(raw.at("model.layers.0.mlp.router.bias", 0, e));
            }
            requireSame(raw, "model.layers.0.mlp.router.weight", layer.router());
        }
    }

    private static RoutingRule rule(String folder, int layer) {
        try (Checkpoint checkpoint = Checkpoint.open(GOLDEN.resolve(folder))) {
            return checkpoint.layer(layer).rule();
        }
    }

    private static float[] values(WeightMatrix matrix) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values);
        return values;
    }

    private static void requireSame(RawTensors raw, String name, WeightMatrix matrix) {
        float[] values = values(matrix);
        for (int row = 0; row < matrix.rows(); row++) {
            for (int col = 0; col < matrix.cols(); col++) {
                float expected = raw.at(name, 128, row, col);
                float seen = values[row * matrix.cols() + col];
                if (seen != expected) {
                    throw new AssertionError(
                            name
                                    + "["
                                    + row
                                    + ", "
                                    + col
                                    + "]: expected "
                                    + expected
                                    + ", saw "
                                    + seen);
                }
            }
        }
    }
}
