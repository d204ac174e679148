package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.weights.TinyCheckpoints.Options;
import io.moe4j.weights.TinyCheckpoints.Weights;
import java.io.IOException;
import java.io.RandomAccessFile;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import org.assertj.core.api.AbstractThrowableAssert;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class CheckpointHostileTest {
    private static final long SEED = 7;
    private static final String INDEX = "model.safetensors.index.json";
    private static final String BLOCK = "model.layers.0.mlp.";

    @TempDir Path temp;
    private Path dir;

    @BeforeEach
    void makeFolder() throws IOException {
        dir = Files.createDirectory(temp.resolve("model"));
    }

    @ParameterizedTest
    @CsvSource(
            delimiter = '|',
            value = {
                "hidden_size | NaN",
                "hidden_size | Infinity",
                "hidden_size | -Infinity",
                "hidden_size | -64",
                "hidden_size | 0",
                "hidden_size | 64.5",
                "hidden_size | 64.0",
                "hidden_size | 4294967296",
                "hidden_size | 1e400",
                "hidden_size | \"64\"",
                "hidden_size | [64]",
                "hidden_size | true",
                "moe_intermediate_size | -1",
                "num_experts | 99999999999999999999",
                "num_experts | 0",
                "num_experts_per_tok | 0",
                "num_experts_per_tok | 2.5",
                "num_hidden_layers | -1",
                "norm_topk_prob | 1",
                "hidden_act | 7"
            })
    void shouldNameTheFieldAndTheValueThatCannotBe(String field, String value) throws IOException {
        write("qwen3_moe", Options.defaults());
        ObjectNode config = TinyCheckpoints.config("qwen3_moe", Options.defaults());
        config.put(field, "@@");
        config("config.json", config.toString().replace("\"@@\"", value));
        refused().hasMessageContaining("config.json").hasMessageContaining(field + "=");
    }

    @ParameterizedTest
    @CsvSource({
        "deepseek_v3, routed_scaling_factor, NaN",
        "deepseek_v3, routed_scaling_factor, -1",
        "deepseek_v3, routed_scaling_factor, 1e39",
        "deepseek_v3, n_group, 0",
        "deepseek_v3, n_shared_experts, -1",
        "gpt_oss, swiglu_limit, Infinity",
        "gpt_oss, swiglu_alpha, 0"
    })
    void shouldNameRoutingFieldsThatCannotBe(String family, String field, String value)
            throws IOException {
        write(family, Options.defaults());
        ObjectNode config = TinyCheckpoints.config(family, Options.defaults());
        config.put(field, "@@");
        config("config.json", config.toString().replace("\"@@\"", value));
        refused().hasMessageContaining("config.json").hasMessageContaining(field + "=");
    }

    @ParameterizedTest
    @CsvSource({"n_group, 3, groups=3", "topk_group, 5, topkGroups=5", "num_experts_per_tok, 9, 9"})
    void shouldCheckRoutingFieldsAgainstEachOther(String field, int value, String named)
            throws IOException {
        write("deepseek_v3", Options.defaults());
        ObjectNode config = TinyCheckpoints.config("deepseek_v3", Options.defaults());
        config("config.json", config.put(field, value).toString());
        refused().hasMessageContaining("config.json").hasMessageContaining(named);
    }

    @Test
    void shouldNameAMissingField() throws IOException {
        write("qwen3_moe", Options.defaults());
        ObjectNode config = TinyCheckpoints.config("qwen3_moe", Options.defaults());
        config.remove("num_experts");
        config("config.json", config.toString());
        refused().hasMessageContaining("num_experts or num_local_experts is missing");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "",
                "[]",
                "null",
                "{",
                "{} x",
                "{\"a\":1,\"a\":2}",
                "{\"text_config\":3}",
                "\0{}"
            })
    void shouldRefuseAConfigurationThatIsNotStrictJson(String text) throws IOException {
        write("qwen3_moe", Options.defaults());
        config("config.json", text);
        refused().hasMessageContaining("config.json");
    }

    @Test
    void shouldRefuseDeepNestingAndHugeConfigurations() throws IOException {
        write("qwen3_moe", Options.defaults());
        config("config.json", "{\"a\":" + "[".repeat(100_000));
        refused().hasMessageContaining("config.json");
        try (RandomAccessFile file =
                new RandomAccessFile(dir.resolve("config.json").toFile(), "rw")) {
            file.setLength(17L << 20);
        }
        refused().hasMessageContaining("more than the 16777216");
    }

    @Test
    void shouldNameWhatIsMissingInAFolder() throws IOException {
        refused().hasMessageContaining("config.json").hasMessageContaining("no such file");
        config("config.json", "{}");
        refused().hasMessageContaining("model.safetensors").hasMessageContaining(INDEX);
        assertThatThrownBy(() -> Checkpoint.open(dir.resolve("none")))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("no such folder");
        assertThatThrownBy(() -> Checkpoint.open(dir.resolve("config.json")))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("is not a folder");
    }

    @Test
    void shouldNameAMissingShard() throws IOException {
        write("qwen3_moe", Options.defaults().withShards(3));
        Files.delete(dir.resolve("model-00002-of-00003.safetensors"));
        refused()
                .hasMessageContaining("model-00002-of-00003.safetensors")
                .hasMessageContaining("download the missing shard");
    }

    @Test
    void shouldNameATensorThatTheIndexPromisesInVain() throws IOException {
        write("qwen3_moe", Options.defaults().withShards(2));
        String index = Files.readString(dir.resolve(INDEX));
        String file = "model-00001-of-00002.safetensors";
        config(
                INDEX,
                index.replaceFirst(
                        "\\{\\s*\"model\\.embed", "{\"ghost\":\"" + file + "\",\"model.embed"));
        refused().hasMessageContaining(file).hasMessageContaining("has no tensor ghost");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "../secret.safetensors",
                "/etc/passwd",
                "sub/model.safetensors",
                "..",
                ".",
                "",
                "a\\\\b",
                "C:x",
                "a\\u0000b",
                "a\\ud800b"
            })
    void shouldRefuseShardNamesThatAreNotPlain(String name) throws IOException {
        write("qwen3_moe", Options.defaults());
        Files.move(dir.resolve("model.safetensors"), temp.resolve("secret.safetensors"));
        config(INDEX, "{\"weight_map\":{\"a\":\"" + name + "\"}}");
        refused().hasMessageContaining(INDEX).hasMessageContaining("not a plain file name");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "{}",
                "[]",
                "{\"weight_map\":3}",
                "{\"weight_map\":{\"a\":3}}",
                "{\"weight_map\":{},\"weight_map\":{}}",
                "{\"weight_map\":{\"a\":\"x\",\"a\":\"x\"}}",
                "{\"weight_map\":{\"a\":\"x\"}} {}",
                "{\"weight_map\":{"
            })
    void shouldRefuseAnIndexThatBreaksARule(String index) throws IOException {
        config("config.json", "{}");
        config(INDEX, index);
        refused().hasMessageContaining(INDEX);
    }

    @Test
    void shouldRefuseALinkOutOfTheFolder() throws IOException {
        write("qwen3_moe", Options.defaults());
        Path outside = temp.resolve("outside.safetensors");
        Files.move(dir.resolve("model.safetensors"), outside);
        Files.createSymbolicLink(dir.resolve("model.safetensors"), outside);
        refused()
                .hasMessageContaining("model.safetensors: is a link to")
                .hasMessageContaining("outside the model folder");
    }

    @Test
    void shouldRefuseALinkedConfigurationOutOfTheFolderAndADanglingLink() throws IOException {
        write("qwen3_moe", Options.defaults());
        Files.move(dir.resolve("config.json"), temp.resolve("config.json"));
        Files.createSymbolicLink(dir.resolve("config.json"), Path.of("..", "config.json"));
        refused().hasMessageContaining("config.json: is a link to");
        Files.delete(temp.resolve("config.json"));
        refused().hasMessageContaining("cannot be reached");
    }

    @Test
    void shouldFollowALinkWithinTheFolder() throws IOException {
        write("qwen3_moe", Options.defaults());
        Files.move(dir.resolve("model.safetensors"), dir.resolve("weights.bin"));
        Files.createSymbolicLink(dir.resolve("model.safetensors"), Path.of("weights.bin"));
        Checkpoint.open(dir).close();
    }

    @Test
    void shouldFollowTheLinksOfTheHubCacheButOnlyToTheSameModel() throws IOException {
        Path hub = temp.resolve("hub");
        Path snapshot = hub.resolve("models--org--tiny/snapshots/0123abcd");
        Path blobs = hub.resolve("models--org--tiny/blobs");
        Path other = hub.resolve("models--org--other/blobs");
        for (Path folder : new Path[] {snapshot, blobs, other}) {
            Files.createDirectories(folder);
        }
        write("qwen3_moe", Options.defaults());
        Files.move(dir.resolve("config.json"), blobs.resolve("c0"));
        Files.move(dir.resolve("model.safetensors"), blobs.resolve("d1"));
        Files.createSymbolicLink(snapshot.resolve("config.json"), Path.of("../../blobs/c0"));
        Path weights = snapshot.resolve("model.safetensors");
        Files.createSymbolicLink(weights, Path.of("../../blobs/d1"));
        try (Checkpoint checkpoint = Checkpoint.open(snapshot)) {
            assertThat(checkpoint.layer(0).shape().experts()).isEqualTo(8);
        }
        Files.move(blobs.resolve("d1"), other.resolve("d1"));
        Files.delete(weights);
        Files.createSymbolicLink(weights, other.resolve("d1"));
        assertThatThrownBy(() -> Checkpoint.open(snapshot))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("outside the model folder");
    }

    @Test
    void shouldNameAMissingExpertTensor() {
        SafetensorsWriter writer = layer(2);
        writer.write(dir.resolve("model.safetensors"));
        olmoeConfig(3);
        layerRefused().hasMessageContaining(BLOCK + "gate.weight").hasMessageContaining("[3, 4]");
        writer = layer(3);
        writer.names().remove(BLOCK + "experts.1.up_proj.weight");
        writer.write(dir.resolve("model.safetensors"));
        layerRefused().hasMessageContaining(BLOCK + "experts.1.up_proj.weight is missing");
        writer = layer(3);
        writer.names().removeIf(name -> name.contains("experts.0."));
        writer.write(dir.resolve("model.safetensors"));
        layerRefused().hasMessageContaining(BLOCK + "experts.0.gate_proj.weight is missing");
    }

    @Test
    void shouldNameAnExpertTensorTooMany() {
        layer(2).addFloats(BLOCK + "experts.2.gate_proj.weight", new float[12], 3, 4)
                .write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        layerRefused()
                .hasMessageContaining(BLOCK + "experts.2.gate_proj.weight")
                .hasMessageContaining("has no place in a layer of family olmoe");
    }

    @Test
    void shouldNameATensorOfWrongShapeWithBothShapes() {
        layer(2).addFloats(BLOCK + "experts.1.down_proj.weight", new float[12], 3, 4)
                .write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        layerRefused()
                .hasMessageContaining("model.safetensors")
                .hasMessageContaining(BLOCK + "experts.1.down_proj.weight")
                .hasMessageContaining("has shape [3, 4], expected [4, 3]");
    }

    @ParameterizedTest
    @ValueSource(strings = {"I32", "U32"})
    void shouldNameAWeightOfATypeThatIsNotSupported(String dtype) {
        layer(2).add(BLOCK + "experts.1.up_proj.weight", dtype, new byte[48], 3, 4)
                .write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        layerRefused()
                .hasMessageContaining(BLOCK + "experts.1.up_proj.weight has dtype " + dtype)
                .hasMessageContaining("supported weights are");
    }

    @Test
    void shouldAskForTheScalesOfFp8Weights() {
        String name = BLOCK + "experts.1.up_proj.weight";
        layer(2).add(name, "F8_E4M3", new byte[12], 3, 4).write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        layerRefused().hasMessageContaining(name + "_scale_inv is missing");
        layer(2).add(name, "F8_E4M3", new byte[12], 3, 4)
                .addFloats(name + "_scale_inv", new float[2], 1, 2)
                .write(dir.resolve("model.safetensors"));
        layerRefused().hasMessageContaining(name + "_scale_inv has shape [1, 2], expected [1, 1]");
        layer(2).add(name, "F8_E4M3", new byte[] {0x38, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 3, 4)
                .add(name + "_scale_inv", "BF16", new byte[] {0x40, 0x40}, 1, 1)
                .write(dir.resolve("model.safetensors"));
        try (Checkpoint checkpoint = Checkpoint.open(dir)) {
            float[] values = new float[12];
            checkpoint.layer(0).expert(1).up().read(values);
            assertThat(values[0]).isEqualTo(3f);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"[128]", "[0,128]", "[128.5,128]", "128", "[\"a\",1]"})
    void shouldRefuseAScaleBlockThatCannotBe(String block) throws IOException {
        Options options = Options.defaults().withWeights(Weights.FP8);
        write("qwen3_moe", options);
        String text = TinyCheckpoints.config("qwen3_moe", options).toString();
        config("config.json", text.replace("[128,128]", block));
        layerRefused().hasMessageContaining("quantization_config.weight_block_size=");
    }

    @Test
    void shouldRefuseMxfp4SizesThatAreNotMultiplesOfTheBlock() throws IOException {
        Options options = Options.defaults().withWeights(Weights.MXFP4);
        write("gpt_oss", options);
        ObjectNode config = TinyCheckpoints.config("gpt_oss", options);
        config("config.json", config.put("intermediate_size", 48).toString());
        layerRefused().hasMessageContaining("multiples of 32");
    }

    @Test
    void shouldMentionTheQuantisationItCannotRead() throws IOException {
        layer(2).write(dir.resolve("model.safetensors"));
        SafetensorsWriter writer = layer(2);
        writer.names().removeIf(name -> name.contains("experts.0."));
        writer.add(BLOCK + "experts.0.gate_proj.qweight", "I32", new byte[4], 1);
        writer.write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        ObjectNode config =
                (ObjectNode) new ObjectMapper().readTree(dir.resolve("config.json").toFile());
        config.putObject("quantization_config").put("quant_method", "gptq");
        config("config.json", config.toString());
        layerRefused().hasMessageContaining("quant_method=gptq");
    }

    @Test
    void shouldNotAllocateForExpertsThatAreNotThere() throws IOException {
        write("qwen3_moe", Options.defaults());
        ObjectNode config = TinyCheckpoints.config("qwen3_moe", Options.defaults());
        config("config.json", config.put("num_experts", 30_000_000).toString());
        layerRefused().hasMessageContaining("gate.weight has shape [8, 64]");
        config("config.json", config.put("num_experts", Integer.MAX_VALUE).toString());
        refused().hasMessageContaining("more than 2^31 elements");
    }

    @Test
    void shouldRefuseTwoModelsInOneFolder() {
        SafetensorsWriter writer = layer(2);
        writer.addFloats("other.layers.0.mlp.gate.weight", new float[8], 2, 4)
                .write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        refused().hasMessageContaining("both").hasMessageContaining("other.layers.N");
    }

    @Test
    void shouldSayThatAModelHasNoMoeLayers() {
        new SafetensorsWriter()
                .addFloats("model.layers.0.mlp.gate_proj.weight", new float[4], 2, 2)
                .write(dir.resolve("model.safetensors"));
        olmoeConfig(2);
        refused().hasMessageContaining("has no MoE layers");
    }

    /** An OLMoE layer with H 4 and I 3. */
    private static SafetensorsWriter layer(int experts) {
        SafetensorsWriter writer = new SafetensorsWriter();
        writer.addFloats(BLOCK + "gate.weight", new float[4 * experts], experts, 4);
        for (int e = 0; e < experts; e++) {
            String expert = BLOCK + "experts." + e + ".";
            writer.addFloats(expert + "gate_proj.weight", new float[12], 3, 4);
            writer.addFloats(expert + "up_proj.weight", new float[12], 3, 4);
            writer.addFloats(expert + "down_proj.weight", new float[12], 4, 3);
        }
        return writer;
    }

    private void olmoeConfig(int experts) {
        Options options = Options.defaults().withSizes(4, 3, experts, 1);
        try {
            config("config.json", TinyCheckpoints.config("olmoe", options).toString());
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private void write(String family, Options options) {
        TinyCheckpoints.write(dir, family, options, SEED);
    }

    private void config(String name, String text) throws IOException {
        Files.writeString(dir.resolve(name), text);
    }

    private AbstractThrowableAssert<?, ? extends Throwable> refused() {
        return assertThatThrownBy(() -> Checkpoint.open(dir).close())
                .isInstanceOf(CheckpointException.class);
    }

    private AbstractThrowableAssert<?, ? extends Throwable> layerRefused() {
        return assertThatThrownBy(
                        () -> {
                            try (Checkpoint checkpoint = Checkpoint.open(dir)) {
                                checkpoint.layer(0);
                            }
                        })
                .isInstanceOf(CheckpointException.class);
    }
}
