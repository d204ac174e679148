package io.moe4j.jlama;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.SplittableRandom;

/**
 * A small Mixtral model folder that Jlama loads: two layers of eight experts, two per token, random
 * weights from a fixed seed, one character per token. The weights are stored in F32 but exact in
 * bfloat16, so that every backend multiplies the same numbers.
 */
final class TinyMixtral {
    static final int HIDDEN = 128;
    static final int INTERMEDIATE = 96;
    static final int EXPERTS = 8;
    static final int TOP_K = 2;
    static final int LAYERS = 2;
    private static final int HEADS = 4;
    private static final int KV_HEADS = 2;
    private static final String CHARACTERS =
            "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,-'!?;:";
    static final int VOCABULARY = 3 + CHARACTERS.length();

    private TinyMixtral() {}

    /** Writes config.json, tokenizer.json and model.safetensors. */
    static Path write(Path folder, long seed) {
        try {
            Files.createDirectories(folder);
            writeConfig(folder);
            writeTokenizer(folder, VOCABULARY);
            writeWeights(folder.resolve("model.safetensors"), seed);
            return folder;
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** Makes a folder of transformers 5 one that Jlama 0.8.4 reads: rope_theta and a tokenizer. */
    static Path adapt(Path from, Path to) {
        try {
            Files.createDirectories(to);
            try (var files = Files.list(from)) {
                for (Path file : files.toList()) {
                    Files.copy(file, to.resolve(file.getFileName().toString()));
                }
            }
            ObjectMapper json = new ObjectMapper();
            ObjectNode config = (ObjectNode) json.readTree(to.resolve("config.json").toFile());
            config.put("rope_theta", config.at("/rope_parameters/rope_theta").doubleValue());
            json.writeValue(to.resolve("config.json").toFile(), config);
            writeTokenizer(to, config.get("vocab_size").intValue());
            return to;
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private static void writeConfig(Path folder) throws IOException {
        ObjectNode config = new ObjectMapper().createObjectNode();
        config.putArray("architectures").add("MixtralForCausalLM");
        config.put("model_type", "mixtral");
        config.put("hidden_act", "silu");
        config.put("hidden_size", HIDDEN);
        config.put("intermediate_size", INTERMEDIATE);
        config.put("num_local_experts", EXPERTS);
        config.put("num_experts_per_tok", TOP_K);
        config.put("num_hidden_layers", LAYERS);
        config.put("num_attention_heads", HEADS);
        config.put("num_key_value_heads", KV_HEADS);
        config.put("max_position_embeddings", 128);
        config.put("rms_norm_eps", 1e-5);
        config.put("rope_theta", 1e6);
        config.put("vocab_size", VOCABULARY);
        config.put("bos_token_id", 1);
        config.put("eos_token_id", 2);
        new ObjectMapper().writeValue(folder.resolve("config.json").toFile(), config);
    }

    private static void writeTokenizer(Path folder, int vocabulary) throws IOException {
        ObjectNode root = new ObjectMapper().createObjectNode();
        ObjectNode replace = root.putObject("normalizer").put("type", "Sequence");
        ArrayNode items = replace.putArray("normalizers");
        items.addObject()
                .put("type", "Replace")
                .put("content", "▁")
                .putObject("pattern")
                .put("String", " ");
        ObjectNode model = root.putObject("model");
        model.put("type", "BPE").put("unk_token", "<unk>").put("byte_fallback", false);
        ObjectNode vocab = model.putObject("vocab");
        vocab.put("<unk>", 0).put("<s>", 1).put("</s>", 2);
        for (int i = 3; i < vocabulary; i++) {
            vocab.put(String.valueOf(CHARACTERS.charAt(i - 3)), i);
        }
        model.putArray("merges");
        new ObjectMapper().writeValue(folder.resolve("tokenizer.json").toFile(), root);
    }

    private static void writeWeights(Path file, long seed) throws IOException {
        Map<String, int[]> tensors = new LinkedHashMap<>();
        tensors.put("model.embed_tokens.weight", new int[] {VOCABULARY, HIDDEN});
        int kv = HIDDEN / HEADS * KV_HEADS;
        for (int layer = 0; layer < LAYERS; layer++) {
            String base = "model.layers." + layer + ".";
            tensors.put(base + "input_layernorm.weight", new int[] {HIDDEN});
            tensors.put(base + "self_attn.q_proj.weight", new int[] {HIDDEN, HIDDEN});
            tensors.put(base + "self_attn.k_proj.weight", new int[] {kv, HIDDEN});
            tensors.put(base + "self_attn.v_proj.weight", new int[] {kv, HIDDEN});
            tensors.put(base + "self_attn.o_proj.weight", new int[] {HIDDEN, HIDDEN});
            tensors.put(base + "post_attention_layernorm.weight", new int[] {HIDDEN});
            String block = base + "block_sparse_moe.";
            tensors.put(block + "gate.weight", new int[] {EXPERTS, HIDDEN});
            for (int e = 0; e < EXPERTS; e++) {
                String expert = block + "experts." + e + ".";
                tensors.put(expert + "w1.weight", new int[] {INTERMEDIATE, HIDDEN});
                tensors.put(expert + "w2.weight", new int[] {HIDDEN, INTERMEDIATE});
                tensors.put(expert + "w3.weight", new int[] {INTERMEDIATE, HIDDEN});
            }
        }
        tensors.put("model.norm.weight", new int[] {HIDDEN});
        tensors.put("lm_head.weight", new int[] {VOCABULARY, HIDDEN});

        ObjectNode header = new ObjectMapper().createObjectNode();
        int at = 0;
        for (Map.Entry<String, int[]> tensor : tensors.entrySet()) {
            ObjectNode info = header.putObject(tensor.getKey()).put("dtype", "F32");
            ArrayNode shape = info.putArray("shape");
            int elements = 1;
            for (int extent : tensor.getValue()) {
                shape.add(extent);
                elements *= extent;
            }
            info.putArray("data_offsets").add(at).add(at + 4 * elements);
            at += 4 * elements;
        }
        byte[] json = header.toString().getBytes(StandardCharsets.UTF_8);
        int padded = (json.length + 7) / 8 * 8;
        ByteBuffer bytes = ByteBuffer.allocate(8 + padded + at).order(ByteOrder.LITTLE_ENDIAN);
        bytes.putLong(padded).put(json);
        while (bytes.position() < 8 + padded) {
            bytes.put((byte) ' ');
        }
        SplittableRandom random = new SplittableRandom(seed);
        tensors.values().forEach(shape -> fill(bytes, shape, random.split()));
        try (FileChannel channel =
                FileChannel.open(file, StandardOpenOption.CREATE, StandardOpenOption.WRITE)) {
            channel.write(bytes.flip());
        }
    }

    /** Norms near 1, matrices uniform with unit gain; all exact in bfloat16. */
    private static void fill(ByteBuffer to, int[] shape, SplittableRandom random) {
        int elements = shape.length == 1 ? shape[0] : shape[0] * shape[1];
        double bound = shape.length == 1 ? 0.25 : Math.sqrt(3.0 / shape[1]);
        for (int i = 0; i < elements; i++) {
            double value = random.nextDouble(-bound, bound) + (shape.length == 1 ? 1 : 0);
            to.putFloat(Float.intBitsToFloat(Float.floatToRawIntBits((float) value) & 0xffff0000));
        }
    }
}
