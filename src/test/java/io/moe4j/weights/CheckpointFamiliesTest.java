package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.weights.TinyCheckpoints.Options;
import io.moe4j.weights.TinyCheckpoints.Weights;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.function.Consumer;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

class CheckpointFamiliesTest {
    private static final long SEED = 42;

    @TempDir Path dir;

    static Stream<Arguments> everyFamilyAndType() {
        return TinyCheckpoints.FAMILIES.stream()
                .flatMap(
                        family ->
                                Stream.of(Weights.values())
                                        .filter(
                                                w ->
                                                        family.equals("gpt_oss")
                                                                ? w != Weights.FP8
                                                                : w != Weights.MXFP4)
                                        .map(w -> Arguments.of(family, w)));
    }

    @ParameterizedTest
    @MethodSource("everyFamilyAndType")
    void shouldReadEveryFamilyInEveryWeightType(String family, Weights weights) {
        Options options =
                Options.defaults().withLayers(1, 2).withWeights(weights).withScaleBlock(48);
        TinyCheckpoints.write(dir, family, options, SEED);
        RawTensors raw = RawTensors.read(dir);
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.family()).isEqualTo(family);
            assertThat(checkpoint.moeLayers()).containsExactly(1, 2);
            CheckpointLayer layer = checkpoint.layer(2);
            int shared = TinyCheckpoints.sharedWidth(family, options);
            assertThat(layer.shape()).isEqualTo(new MoeShape(64, 32, 8, 2, shared));
            layer.config().build();
            for (int e = 0; e < 8; e++) {
                requireExpert(raw, family, options, "model.layers.2.", e, layer.expert(e));
            }
            assertThat(layer.sharedExpert() != null).isEqualTo(shared > 0);
            assertThat(layer.sharedExpertGate() != null).isEqualTo(family.equals("qwen2_moe"));
            assertThat(layer.correctionBias() != null)
                    .isEqualTo(layer.rule().scoring() == RoutingRule.Scoring.SIGMOID);
        }
    }

    @ParameterizedTest
    @CsvSource({"BF16", "F16", "F32", "FP8"})
    void shouldReadFusedGateAndUpOfAllExperts(Weights weights) {
        for (String family : TinyCheckpoints.FAMILIES) {
            if (!family.equals("gpt_oss")) {
                Path folder = dir.resolve(family);
                Options options =
                        Options.defaults().withFused().withWeights(weights).withScaleBlock(24);
                TinyCheckpoints.write(folder, family, options, SEED);
                RawTensors raw = RawTensors.read(folder);
                try (Checkpoint checkpoint = Checkpoint.open(folder)) {
                    ExpertWeights expert = checkpoint.layer(0).expert(5);
                    requireExpert(raw, family, options, "model.layers.0.", 5, expert);
                }
            }
        }
    }

    @Test
    void shouldScaleFp8BlocksWithRaggedEdges() {
        Options options = Options.defaults().withSizes(136, 200, 3, 2).withWeights(Weights.FP8);
        TinyCheckpoints.write(dir, "qwen3_moe", options, SEED);
        RawTensors raw = RawTensors.read(dir);
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            for (int e = 0; e < 3; e++) {
                ExpertWeights expert = checkpoint.layer(0).expert(e);
                requireExpert(raw, "qwen3_moe", options, "model.layers.0.", e, expert);
            }
        }
    }

    @ParameterizedTest
    @ValueSource(
            strings = {"model.", "model.language_model.", "language_model.model.", "", "a.b.c.d."})
    void shouldDiscoverThePrefixOfTheLayers(String prefix) {
        TinyCheckpoints.write(dir, "olmoe", Options.defaults().withPrefix(prefix), SEED);
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.moeLayers()).containsExactly(0);
            assertThat(checkpoint.layer(0).shape()).isEqualTo(MoeShape.of(64, 32, 8, 2));
        }
    }

    @Test
    void shouldReadFieldsNestedInTextConfig() throws IOException {
        TinyCheckpoints.write(dir, "kimi_k2", Options.defaults(), SEED);
        ObjectNode outer = new ObjectMapper().createObjectNode().put("model_type", "kimi_k25");
        outer.set("text_config", TinyCheckpoints.config("kimi_k2", Options.defaults()));
        Files.writeString(dir.resolve("config.json"), outer.toString());
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.family()).isEqualTo("kimi_k2");
            assertThat(checkpoint.layer(0).rule())
                    .isEqualTo(RoutingRule.sigmoidGrouped(1, 1, true, 2.827f));
        }
    }

    @ParameterizedTest
    @CsvSource({
        "mixtral, mixtral",
        "qwen2_moe, qwen2_moe",
        "qwen3_moe, qwen3_moe",
        "olmoe, olmoe",
        "deepseek_v2, deepseek_v2",
        "deepseek_v3, deepseek_v3",
        "kimi_k2, deepseek_v3",
        "glm4_moe, deepseek_v3",
        "gpt_oss, gpt_oss"
    })
    void shouldRecogniseAnUnknownModelTypeByNamesAndFields(String like, String expected) {
        TinyCheckpoints.write(dir, like, Options.defaults().withModelType("brand_new"), SEED);
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.family()).isEqualTo(expected);
            assertThat(checkpoint.modelType()).isEqualTo("brand_new");
            checkpoint.layer(0);
        }
    }

    @Test
    void shouldNotGuessTheRoutingOfAnUnknownModelType() {
        Options options = Options.defaults().withModelType("brand_new");
        TinyCheckpoints.write(dir, "qwen3_moe", options, SEED);
        edit("qwen3_moe", options, config -> config.remove("norm_topk_prob"));
        assertThatThrownBy(() -> Checkpoint.open(dir))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("model_type=brand_new is not known")
                .hasMessageContaining("norm_topk_prob")
                .hasMessageContaining("mixtral")
                .hasMessageContaining("gpt_oss");
    }

    @Test
    void shouldApplyTheDefaultsOfTheModelsOwnClass() {
        Options options = Options.defaults().withSizes(64, 32, 16, 2);
        requireRule("qwen3_moe", options, RoutingRule.softmaxTopK(false), "norm_topk_prob");
        requireRule("olmoe", options, RoutingRule.softmaxTopK(false), "norm_topk_prob");
        requireRule(
                "deepseek_v3",
                options,
                RoutingRule.sigmoidGrouped(8, 4, true, 2.5f),
                "norm_topk_prob",
                "routed_scaling_factor",
                "n_group",
                "topk_group",
                "scoring_func");
        requireRule(
                "glm4_moe",
                options,
                RoutingRule.sigmoidGrouped(1, 1, true, 1f),
                "norm_topk_prob",
                "routed_scaling_factor",
                "n_group",
                "topk_group");
        requireRule(
                "deepseek_v2",
                options,
                new RoutingRule(RoutingRule.Scoring.SOFTMAX, false, 1, 1, 1f),
                "norm_topk_prob",
                "routed_scaling_factor",
                "scoring_func",
                "topk_method");
    }

    @ParameterizedTest
    @CsvSource({
        "deepseek_v2, topk_method, group_limited_greedy",
        "deepseek_v3, scoring_func, softmax",
        "deepseek_v2, scoring_func, sigmoid",
        "mixtral, hidden_act, gelu",
        "qwen3_moe, hidden_act, relu2"
    })
    void shouldRefuseWhatItWouldComputeWrongly(String family, String field, String value) {
        TinyCheckpoints.write(dir, family, Options.defaults(), SEED);
        edit(family, Options.defaults(), config -> config.put(field, value));
        assertThatThrownBy(() -> Checkpoint.open(dir))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining(field + "=" + value + " is not supported");
    }

    @Test
    void shouldRefuseDeepSeekV2WithRenormalisation() {
        TinyCheckpoints.write(dir, "deepseek_v2", Options.defaults(), SEED);
        edit("deepseek_v2", Options.defaults(), config -> config.put("norm_topk_prob", true));
        assertThatThrownBy(() -> Checkpoint.open(dir))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("norm_topk_prob=true is not supported");
    }

    @ParameterizedTest
    @ValueSource(strings = {"phimoe", "qwen3_vl_moe", "llama4"})
    void shouldRefuseModelsThatOnlyLookAlike(String modelType) {
        Options options = Options.defaults().withModelType(modelType);
        TinyCheckpoints.write(dir, "mixtral", options, SEED);
        assertThatThrownBy(() -> Checkpoint.open(dir))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("model_type=" + modelType + " is not supported");
    }

    @Test
    void shouldListMultiTokenPredictionLayersAsSuch() {
        Options options = Options.defaults().withLayers(1, 2);
        TinyCheckpoints.write(dir, "deepseek_v3", options, SEED);
        edit("deepseek_v3", options, config -> config.put("num_hidden_layers", 2));
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.layers().get(1).description())
                    .isEqualTo("layer 1: MoE (mlp), 8 experts, top-2");
            assertThat(checkpoint.layers().get(2).description())
                    .contains("beyond num_hidden_layers=2");
        }
    }

    @Test
    void shouldReadAnAbsentCorrectionBiasAsNone() {
        SafetensorsWriter writer = new SafetensorsWriter();
        String block = "layers.0.mlp.";
        writer.addFloats(block + "gate.weight", new float[8], 2, 4);
        for (int e = 0; e < 2; e++) {
            String expert = block + "experts." + e + ".";
            writer.addFloats(expert + "gate_proj.weight", new float[12], 3, 4);
            writer.addFloats(expert + "up_proj.weight", new float[12], 3, 4);
            writer.addFloats(expert + "down_proj.weight", new float[12], 4, 3);
        }
        writer.write(dir.resolve("model.safetensors"));
        Options options = Options.defaults().withSizes(4, 3, 2, 1);
        edit("glm4_moe", options, config -> config.put("n_shared_experts", 0));
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            assertThat(checkpoint.layer(0).correctionBias()).isNull();
            assertThat(checkpoint.layer(0).sharedExpert()).isNull();
        }
    }

    @Test
    void shouldReadConcurrently() {
        TinyCheckpoints.write(dir, "deepseek_v3", Options.defaults().withShards(3), SEED);
        RawTensors raw = RawTensors.read(dir);
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            CheckpointLayer layer = checkpoint.layer(0);
            Stream.iterate(0, e -> e < 64, e -> e + 1)
                    .parallel()
                    .forEach(
                            e ->
                                    requireExpert(
                                            raw,
                                            "deepseek_v3",
                                            Options.defaults(),
                                            "model.layers.0.",
                                            e % 8,
                                            layer.expert(e % 8)));
        }
    }

    private void requireRule(
            String family, Options options, RoutingRule expected, String... removed) {
        Path folder = dir.resolve(family);
        TinyCheckpoints.write(folder, family, options, SEED);
        ObjectNode config = TinyCheckpoints.config(family, options);
        config.remove(List.of(removed));
        try {
            Files.writeString(folder.resolve("config.json"), config.toString());
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        try (Checkpoint checkpoint = Checkpoint.open(folder)) {
            assertThat(checkpoint.layer(0).rule()).isEqualTo(expected);
        }
    }

    private void edit(String family, Options options, Consumer<ObjectNode> change) {
        ObjectNode config = TinyCheckpoints.config(family, options);
        change.accept(config);
        try {
            Files.writeString(dir.resolve("config.json"), config.toString());
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private interface Element {
        double at(int row, int col);
    }

    private static void requireExpert(
            RawTensors raw, String family, Options o, String layer, int e, ExpertWeights weights) {
        boolean mixtral = family.equals("mixtral");
        String experts = layer + (mixtral ? "block_sparse_moe" : "mlp") + ".experts.";
        String both = experts + "gate_up_proj";
        String down = experts + "down_proj";
        int s = o.scaleBlock();
        int n = o.intermediate();
        if (o.weights() == Weights.MXFP4) {
            requireSame(weights.gate(), (i, j) -> raw.mxfp4(both, e, 2 * i, j));
            requireSame(weights.up(), (i, j) -> raw.mxfp4(both, e, 2 * i + 1, j));
            requireSame(weights.down(), (i, j) -> raw.mxfp4(down, e, i, j));
        } else if (family.equals("gpt_oss")) {
            requireSame(weights.gate(), (i, j) -> raw.at(both, s, e, j, 2 * i));
            requireSame(weights.up(), (i, j) -> raw.at(both, s, e, j, 2 * i + 1));
            requireSame(weights.down(), (i, j) -> raw.at(down, s, e, j, i));
        } else if (o.fused()) {
            requireSame(weights.gate(), (i, j) -> raw.at(both, s, e, i, j));
            requireSame(weights.up(), (i, j) -> raw.at(both, s, e, n + i, j));
            requireSame(weights.down(), (i, j) -> raw.at(down, s, e, i, j));
        } else {
            String[] names =
                    mixtral
                            ? new String[] {"w1", "w3", "w2"}
                            : new String[] {"gate_proj", "up_proj", "down_proj"};
            String one = experts + e + ".";
            requireSame(weights.gate(), (i, j) -> raw.at(one + names[0] + ".weight", s, i, j));
            requireSame(weights.up(), (i, j) -> raw.at(one + names[1] + ".weight", s, i, j));
            requireSame(weights.down(), (i, j) -> raw.at(one + names[2] + ".weight", s, i, j));
        }
    }

    private static void requireSame(WeightMatrix matrix, Element expected) {
        float[] values = new float[matrix.rows() * matrix.cols() + 1];
        values[values.length - 1] = 123f;
        matrix.read(values);
        assertThat(values[values.length - 1]).as("element past the matrix").isEqualTo(123f);
        for (int i = 0; i < matrix.rows(); i++) {
            for (int j = 0; j < matrix.cols(); j++) {
                if (values[i * matrix.cols() + j] != (float) expected.at(i, j)) {
                    throw new AssertionError(
                            "["
                                    + i
                                    + ", "
                                    + j
                                    + "] of ["
                                    + matrix.rows()
                                    + ", "
                                    + matrix.cols()
                                    + "]: expected "
                                    + expected.at(i, j)
                                    + ", saw "
                                    + values[i * matrix.cols() + j]);
                }
            }
        }
    }
}
