package io.moe4j.weights;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.tensor.Bf16;
import io.moe4j.tensor.Fp16;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.SplittableRandom;
import java.util.TreeMap;

/**
 * Generates small random model folders (config.json and weights) of every family and weight type
 * the library reads. Values are a pure function of (family, options, seed). Stateless.
 */
public final class TinyCheckpoints {
    /** The families {@link #write} knows. */
    public static final List<String> FAMILIES =
            List.of(
                    "mixtral",
                    "qwen2_moe",
                    "qwen3_moe",
                    "olmoe",
                    "deepseek_v2",
                    "deepseek_v3",
                    "kimi_k2",
                    "glm4_moe",
                    "gpt_oss");

    private TinyCheckpoints() {}

    /** How expert weights are stored. */
    public enum Weights {
        /** bfloat16. */
        BF16,
        /** IEEE half. */
        F16,
        /** IEEE single. */
        F32,
        /** FP8 with block scales; router and biases stay BF16. Not for gpt_oss. */
        FP8,
        /** MXFP4 blocks; only for gpt_oss. */
        MXFP4
    }

    /**
     * Sizes and form of a generated checkpoint; change what matters with the {@code with} methods.
     *
     * @param hidden H
     * @param intermediate I
     * @param experts E
     * @param topK K
     * @param denseLayers layers without experts in front
     * @param moeLayers layers with experts
     * @param weights type of the expert weights
     * @param fused gate and up of all experts in one tensor, where the family has both forms
     * @param prefix text in front of {@code layers.}
     * @param modelType model_type in config.json, null for the family's own
     * @param shards number of weight files; with 1 there is no index
     * @param scaleBlock rows and columns of an FP8 scale block
     */
    public record Options(
            int hidden,
            int intermediate,
            int experts,
            int topK,
            int denseLayers,
            int moeLayers,
            Weights weights,
            boolean fused,
            String prefix,
            String modelType,
            int shards,
            int scaleBlock) {
        /** H 64, I 32, 8 experts, top-2, one MoE layer, BF16, separate tensors, one file. */
        public static Options defaults() {
            return new Options(64, 32, 8, 2, 0, 1, Weights.BF16, false, "model.", null, 1, 128);
        }

        /** Other sizes. */
        public Options withSizes(int h, int i, int e, int k) {
            return new Options(
                    h,
                    i,
                    e,
                    k,
                    denseLayers,
                    moeLayers,
                    weights,
                    fused,
                    prefix,
                    modelType,
                    shards,
                    scaleBlock);
        }

        /** Other numbers of layers. */
        public Options withLayers(int dense, int moe) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    dense,
                    moe,
                    weights,
                    fused,
                    prefix,
                    modelType,
                    shards,
                    scaleBlock);
        }

        /** Another weight type. */
        public Options withWeights(Weights value) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    value,
                    fused,
                    prefix,
                    modelType,
                    shards,
                    scaleBlock);
        }

        /** The fused form. */
        public Options withFused() {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    weights,
                    true,
                    prefix,
                    modelType,
                    shards,
                    scaleBlock);
        }

        /** Another prefix in front of {@code layers.}. */
        public Options withPrefix(String value) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    weights,
                    fused,
                    value,
                    modelType,
                    shards,
                    scaleBlock);
        }

        /** Another model_type. */
        public Options withModelType(String value) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    weights,
                    fused,
                    prefix,
                    value,
                    shards,
                    scaleBlock);
        }

        /** Several weight files with an index. */
        public Options withShards(int value) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    weights,
                    fused,
                    prefix,
                    modelType,
                    value,
                    scaleBlock);
        }

        /** Another FP8 block size. */
        public Options withScaleBlock(int value) {
            return new Options(
                    hidden,
                    intermediate,
                    experts,
                    topK,
                    denseLayers,
                    moeLayers,
                    weights,
                    fused,
                    prefix,
                    modelType,
                    shards,
                    value);
        }
    }

    /**
     * Writes a model folder.
     *
     * @param dir created if need be
     * @param family one of {@link #FAMILIES}
     * @return {@code dir}
     */
    public static Path write(Path dir, String family, Options options, long seed) {
        if (!FAMILIES.contains(family)) {
            throw new IllegalArgumentException("family=" + family + ": use one of " + FAMILIES);
        }
        try {
            Files.createDirectories(dir);
            Files.writeString(dir.resolve("config.json"), config(family, options).toPrettyString());
            new Generator(family, options, seed).write(dir);
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        return dir;
    }

    /** The configuration {@link #write} stores, for tests that change it. */
    public static ObjectNode config(String family, Options o) {
        ObjectNode config = new ObjectMapper().createObjectNode();
        config.put("model_type", o.modelType() == null ? family : o.modelType());
        config.put("hidden_size", o.hidden());
        config.put("hidden_act", "silu");
        config.put("num_hidden_layers", o.denseLayers() + o.moeLayers());
        config.put("num_experts_per_tok", o.topK());
        switch (family) {
            case "mixtral", "gpt_oss" -> {
                config.put("intermediate_size", o.intermediate());
                config.put("num_local_experts", o.experts());
            }
            case "olmoe" -> {
                config.put("intermediate_size", o.intermediate());
                config.put("num_experts", o.experts());
                config.put("norm_topk_prob", false);
            }
            case "qwen2_moe", "qwen3_moe" -> {
                config.put("intermediate_size", 2 * o.intermediate());
                config.put("moe_intermediate_size", o.intermediate());
                config.put("num_experts", o.experts());
                config.put("norm_topk_prob", family.equals("qwen3_moe"));
                if (family.equals("qwen2_moe")) {
                    config.put("shared_expert_intermediate_size", sharedWidth(family, o));
                }
            }
            default -> {
                config.put("intermediate_size", 2 * o.intermediate());
                config.put("moe_intermediate_size", o.intermediate());
                config.put("n_routed_experts", o.experts());
                config.put("n_shared_experts", 2);
                config.put("first_k_dense_replace", o.denseLayers());
                config.put("norm_topk_prob", !family.equals("deepseek_v2"));
                config.put("routed_scaling_factor", family.equals("kimi_k2") ? 2.827 : 1.5);
                boolean grouped = family.equals("deepseek_v3");
                config.put("n_group", grouped ? 4 : 1);
                config.put("topk_group", grouped ? 2 : 1);
                if (!family.equals("glm4_moe")) {
                    boolean sigmoid = !family.equals("deepseek_v2");
                    config.put("scoring_func", sigmoid ? "sigmoid" : "softmax");
                    config.put("topk_method", sigmoid ? "noaux_tc" : "greedy");
                }
            }
        }
        if (o.weights() == Weights.FP8) {
            ObjectNode quantization = config.putObject("quantization_config");
            quantization.put("quant_method", "fp8");
            quantization.putArray("weight_block_size").add(o.scaleBlock()).add(o.scaleBlock());
        } else if (o.weights() == Weights.MXFP4) {
            config.putObject("quantization_config").put("quant_method", "mxfp4");
        }
        return config;
    }

    /** Width of the shared expert, 0 if the family has none. */
    public static int sharedWidth(String family, Options o) {
        return switch (family) {
            case "qwen2_moe" -> o.intermediate() + 16;
            case "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe" -> 2 * o.intermediate();
            default -> 0;
        };
    }

    /** One folder in the making. */
    private static final class Generator {
        private final String family;
        private final Options options;
        private final SplittableRandom random;
        private final SafetensorsWriter[] shards;
        private int next;

        Generator(String family, Options options, long seed) {
            this.family = family;
            this.options = options;
            this.random = new SplittableRandom(seed);
            this.shards = new SafetensorsWriter[options.shards()];
            for (int i = 0; i < shards.length; i++) {
                shards[i] = new SafetensorsWriter();
            }
        }

        void write(Path dir) throws IOException {
            floats(options.prefix() + "embed_tokens.weight", Weights.BF16, 8, options.hidden());
            for (int i = 0; i < options.denseLayers() + options.moeLayers(); i++) {
                String layer = options.prefix() + "layers." + i + ".";
                floats(layer + "input_layernorm.weight", Weights.BF16, options.hidden());
                if (i < options.denseLayers()) {
                    gatedMatrices(layer + "mlp.", 2 * options.intermediate(), Weights.BF16);
                } else {
                    moeLayer(layer);
                }
            }
            store(dir);
        }

        private void moeLayer(String layer) {
            int h = options.hidden();
            boolean mixtral = family.equals("mixtral");
            String block = layer + (mixtral ? "block_sparse_moe." : "mlp.");
            if (family.equals("gpt_oss")) {
                gptOssBlock(block);
                return;
            }
            floats(block + "gate.weight", plain(), options.experts(), h);
            if (List.of("deepseek_v3", "kimi_k2", "glm4_moe").contains(family)) {
                floats(block + "gate.e_score_correction_bias", Weights.F32, options.experts());
            }
            if (options.fused()) {
                int e = options.experts();
                int i = options.intermediate();
                floats(block + "experts.gate_up_proj", options.weights(), e, 2 * i, h);
                floats(block + "experts.down_proj", options.weights(), e, h, i);
            } else {
                for (int e = 0; e < options.experts(); e++) {
                    expert(block + "experts." + e + ".", mixtral);
                }
            }
            int shared = sharedWidth(family, options);
            if (family.equals("qwen2_moe")) {
                gatedMatrices(block + "shared_expert.", shared, options.weights());
                floats(block + "shared_expert_gate.weight", plain(), 1, h);
            } else if (shared > 0) {
                gatedMatrices(block + "shared_experts.", shared, options.weights());
            }
        }

        private void expert(String prefix, boolean mixtral) {
            int h = options.hidden();
            int i = options.intermediate();
            if (mixtral) {
                floats(prefix + "w1.weight", options.weights(), i, h);
                floats(prefix + "w2.weight", options.weights(), h, i);
                floats(prefix + "w3.weight", options.weights(), i, h);
            } else {
                gatedMatrices(prefix, i, options.weights());
            }
        }

        private void gatedMatrices(String prefix, int width, Weights type) {
            floats(prefix + "gate_proj.weight", type, width, options.hidden());
            floats(prefix + "up_proj.weight", type, width, options.hidden());
            floats(prefix + "down_proj.weight", type, options.hidden(), width);
        }

        private void gptOssBlock(String block) {
            int h = options.hidden();
            int i = options.intermediate();
            int e = options.experts();
            floats(block + "router.weight", plain(), e, h);
            floats(block + "router.bias", plain(), e);
            if (options.weights() == Weights.MXFP4) {
                mxfp4(block + "experts.gate_up_proj", e, 2 * i, h);
                mxfp4(block + "experts.down_proj", e, h, i);
            } else {
                floats(block + "experts.gate_up_proj", options.weights(), e, h, 2 * i);
                floats(block + "experts.down_proj", options.weights(), e, i, h);
            }
            floats(block + "experts.gate_up_proj_bias", plain(), e, 2 * i);
            floats(block + "experts.down_proj_bias", plain(), e, h);
        }

        private Weights plain() {
            boolean quantised =
                    options.weights() == Weights.FP8 || options.weights() == Weights.MXFP4;
            return quantised ? Weights.BF16 : options.weights();
        }

        private void mxfp4(String name, int experts, int rows, int cols) {
            byte[] blocks = new byte[experts * rows * cols / 2];
            random.nextBytes(blocks);
            byte[] scales = new byte[experts * rows * cols / 32];
            for (int i = 0; i < scales.length; i++) {
                scales[i] = (byte) (120 + random.nextInt(4));
            }
            add(name + "_blocks", "U8", blocks, experts, rows, cols / 32, 16);
            add(name + "_scales", "U8", scales, experts, rows, cols / 32);
        }

        private void floats(String name, Weights type, long... shape) {
            int count = 1;
            for (long extent : shape) {
                count *= (int) extent;
            }
            float bound = (float) Math.sqrt(3.0 / shape[shape.length - 1]);
            if (type == Weights.FP8) {
                fp8(name, count, bound, shape);
                return;
            }
            int bytes = type == Weights.F32 ? 4 : 2;
            ByteBuffer to = ByteBuffer.allocate(count * bytes).order(ByteOrder.LITTLE_ENDIAN);
            for (int i = 0; i < count; i++) {
                float value = (float) ((2 * random.nextDouble() - 1) * bound);
                switch (type) {
                    case F32 -> to.putFloat(value);
                    case F16 -> to.putShort(Fp16.fromFloat(value));
                    default -> to.putShort(Bf16.fromFloat(value));
                }
            }
            add(name, type.name(), to.array(), shape);
        }

        private void fp8(String name, int count, float bound, long... shape) {
            byte[] values = new byte[count];
            for (int i = 0; i < count; i++) {
                do {
                    values[i] = (byte) random.nextInt(256);
                } while ((values[i] & 0x7f) == 0x7f); // NaN
            }
            add(name, "F8_E4M3", values, shape);
            long[] blocks = shape.clone();
            int n = 1;
            for (int d = 0; d < shape.length; d++) {
                if (d >= shape.length - 2) {
                    blocks[d] = (shape[d] + options.scaleBlock() - 1) / options.scaleBlock();
                }
                n *= (int) blocks[d];
            }
            ByteBuffer scales = ByteBuffer.allocate(n * 4).order(ByteOrder.LITTLE_ENDIAN);
            for (int i = 0; i < n; i++) {
                scales.putFloat((float) (bound / 64 * (0.5 + random.nextDouble())));
            }
            add(name + "_scale_inv", "F32", scales.array(), blocks);
        }

        private void add(String name, String dtype, byte[] bytes, long... shape) {
            shards[next++ % shards.length].add(name, dtype, bytes, shape);
        }

        private void store(Path dir) throws IOException {
            if (shards.length == 1) {
                shards[0].write(dir.resolve("model.safetensors"));
                return;
            }
            TreeMap<String, String> map = new TreeMap<>();
            for (int i = 0; i < shards.length; i++) {
                String file = String.format("model-%05d-of-%05d.safetensors", i + 1, shards.length);
                shards[i].write(dir.resolve(file));
                shards[i].names().forEach(name -> map.put(name, file));
            }
            ObjectNode index = new ObjectMapper().createObjectNode();
            map.forEach(index.putObject("weight_map")::put);
            Files.writeString(dir.resolve("model.safetensors.index.json"), index.toPrettyString());
        }
    }
}
