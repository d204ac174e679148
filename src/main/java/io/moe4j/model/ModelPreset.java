package io.moe4j.model;

import java.util.Arrays;
import java.util.Optional;
import java.util.stream.Collectors;

/**
 * The layer shapes and routing rules of well-known models, from their published config.json, for
 * plans, demos and benchmarks with random weights.
 */
public enum ModelPreset {
    /** Qwen3-30B-A3B: 128 experts, top-8, softmax renormalised. */
    QWEN3_30B_A3B("qwen3-30b-a3b", MoeShape.of(2048, 768, 128, 8), RoutingRule.softmaxTopK(true)),
    /** Qwen3-235B-A22B: 128 experts, top-8, softmax renormalised. */
    QWEN3_235B_A22B(
            "qwen3-235b-a22b", MoeShape.of(4096, 1536, 128, 8), RoutingRule.softmaxTopK(true)),
    /** DeepSeek-R1 and V3: 256 experts, top-8 of 4 of 8 groups, one shared expert. */
    DEEPSEEK_R1(
            "deepseek-r1",
            new MoeShape(7168, 2048, 256, 8, 2048),
            RoutingRule.sigmoidGrouped(8, 4, true, 2.5f)),
    /** Mixtral-8x7B: 8 experts, top-2, softmax renormalised. */
    MIXTRAL_8X7B("mixtral-8x7b", MoeShape.of(4096, 14336, 8, 2), RoutingRule.softmaxTopK(true)),
    /** gpt-oss-120b: 128 experts, top-4, biases and clamped SwiGLU. */
    GPT_OSS_120B("gpt-oss-120b", MoeShape.of(2880, 2880, 128, 4), RoutingRule.topKSoftmax()),
    /** gpt-oss-20b: 32 experts, top-4, biases and clamped SwiGLU. */
    GPT_OSS_20B("gpt-oss-20b", MoeShape.of(2880, 2880, 32, 4), RoutingRule.topKSoftmax()),
    /** OLMoE-1B-7B: 64 experts, top-8, softmax not renormalised. */
    OLMOE_1B_7B("olmoe-1b-7b", MoeShape.of(2048, 1024, 64, 8), RoutingRule.softmaxTopK(false)),
    /** Qwen1.5-MoE-A2.7B: 60 experts, top-4, not renormalised, gated shared expert. */
    QWEN15_MOE_A27B(
            "qwen1.5-moe-a2.7b",
            new MoeShape(2048, 1408, 60, 4, 5632),
            RoutingRule.softmaxTopK(false)),
    /** Kimi-K2: 384 experts, top-8, one shared expert. */
    KIMI_K2(
            "kimi-k2",
            new MoeShape(7168, 2048, 384, 8, 2048),
            RoutingRule.sigmoidGrouped(1, 1, true, 2.827f)),
    /** GLM-4.5-Air: 128 experts, top-8, one shared expert. */
    GLM_45_AIR(
            "glm-4.5-air",
            new MoeShape(4096, 1408, 128, 8, 1408),
            RoutingRule.sigmoidGrouped(1, 1, true, 1.0f));

    private final String id;
    private final MoeShape shape;
    private final RoutingRule rule;

    ModelPreset(String id, MoeShape shape, RoutingRule rule) {
        this.id = id;
        this.shape = shape;
        this.rule = rule;
    }

    /** {@return the name used on the command line} */
    public String id() {
        return id;
    }

    /** {@return the layer's sizes} */
    public MoeShape shape() {
        return shape;
    }

    /** {@return the model's routing rule} */
    public RoutingRule rule() {
        return rule;
    }

    /** {@return the model's activation} */
    public Activation activation() {
        return isGptOss() ? Activation.clampedSwiGlu(1.702f, 7f) : Activation.swiGlu();
    }

    /**
     * {@return the random weights with the parts this model has (biases, shared gate, correction
     * bias)}
     *
     * @param seed seed of all values
     */
    public RandomWeights randomWeights(long seed) {
        RandomWeights weights = RandomWeights.of(shape, seed);
        if (isGptOss()) {
            weights = weights.withBias();
        }
        if (this == QWEN15_MOE_A27B) {
            weights = weights.withSharedGate();
        }
        if (rule.scoring() == RoutingRule.Scoring.SIGMOID) {
            weights = weights.withCorrectionBias();
        }
        return weights;
    }

    /**
     * {@return the preset of that name, ignoring case}
     *
     * @param id a name as on the command line
     */
    public static Optional<ModelPreset> find(String id) {
        return Arrays.stream(values()).filter(p -> p.id.equalsIgnoreCase(id)).findFirst();
    }

    /** {@return all names, comma-separated} */
    public static String ids() {
        return Arrays.stream(values()).map(ModelPreset::id).collect(Collectors.joining(", "));
    }

    private boolean isGptOss() {
        return this == GPT_OSS_120B || this == GPT_OSS_20B;
    }
}
