package io.moe4j.weights;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.model.Activation;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/**
 * One entry of {@code model-families.json}: how a family of models names its tensors and which
 * configuration fields decide sizes and routing. Names are relative to the block, which is relative
 * to the layer ({@code model.layers.3.mlp.} and so on); {@code {e}} stands for the expert's number.
 * Immutable.
 *
 * @param name the family's name, by convention its first model_type
 * @param modelTypes values of model_type that mean this family
 * @param blocks names the Mixture-of-Experts block may have inside a layer
 * @param router router matrix [E, H]
 * @param routerBias router bias [E], or null
 * @param correctionBias selection bias [E] that a checkpoint may have, or null
 * @param experts the arrangements the expert tensors may have
 * @param shared the shared expert, or null
 * @param expertCount configuration fields for E, the first present one counts
 * @param topK configuration fields for K
 * @param intermediate configuration fields for I
 * @param scoring score function
 * @param renormalise whether chosen weights are divided by their sum
 * @param groups number of expert groups, or null for 1
 * @param topkGroups groups to choose from, or null for 1
 * @param scale factor on the final weights, or null for 1
 * @param allowed text fields that must have one of these values if present
 * @param clampedSwiGlu parameters of the clamped activation, or null for plain SwiGLU
 */
record ModelFamily(
        String name,
        List<String> modelTypes,
        List<String> blocks,
        String router,
        String routerBias,
        String correctionBias,
        List<ExpertNames> experts,
        SharedExpert shared,
        List<String> expertCount,
        List<String> topK,
        List<String> intermediate,
        RoutingRule.Scoring scoring,
        Flag renormalise,
        Count groups,
        Count topkGroups,
        Real scale,
        Map<String, List<String>> allowed,
        ClampedSwiGlu clampedSwiGlu) {
    private static final String RESOURCE = "model-families.json";
    private static final List<ModelFamily> ALL;
    private static final Map<String, String> REFUSED;

    static {
        try (InputStream in = ModelFamily.class.getResourceAsStream(RESOURCE)) {
            ObjectMapper mapper = new ObjectMapper();
            JsonNode root = mapper.readTree(in);
            ALL = readFamilies(mapper, root.get("families"));
            REFUSED = new HashMap<>();
            root.get("refused").properties().forEach(e -> REFUSED.put(e.getKey(), text(e)));
        } catch (IOException e) {
            throw new ExceptionInInitializerError(e);
        }
    }

    /**
     * Names of the expert tensors in one arrangement.
     *
     * @param arrangement how they are stored
     * @param gate the gate matrix, or gate and up in one tensor
     * @param up the up matrix, null where gate holds both
     * @param down the down matrix
     * @param gateBias bias of gate and up, or null
     * @param downBias bias of down, or null
     */
    record ExpertNames(
            ExpertArrangement arrangement,
            String gate,
            String up,
            String down,
            String gateBias,
            String downBias) {}

    /**
     * The shared expert.
     *
     * @param prefix in front of {@code .gate_proj.weight} and so on
     * @param scalarGate gate vector [1, H], or null
     * @param width configuration field with the width of one
     * @param count configuration field with their number, or null for 1
     */
    record SharedExpert(String prefix, String scalarGate, String width, String count) {
        String gate() {
            return prefix + ".gate_proj.weight";
        }

        String up() {
            return prefix + ".up_proj.weight";
        }

        String down() {
            return prefix + ".down_proj.weight";
        }
    }

    /**
     * A flag.
     *
     * @param field its configuration field, null if fixed
     * @param fallback value if the field is absent; null if it must be given
     * @param only the one value that is supported, or null
     */
    record Flag(String field, Boolean fallback, Boolean only) {}

    /**
     * A positive whole number.
     *
     * @param field its configuration field
     * @param fallback value if the field is absent; null if it must be given
     */
    record Count(String field, Integer fallback) {}

    /**
     * A positive real number.
     *
     * @param field its configuration field
     * @param fallback value if the field is absent; null if it must be given
     */
    record Real(String field, Float fallback) {}

    /**
     * The clamped activation.
     *
     * @param alpha slope inside the sigmoid
     * @param limit clamp bound
     */
    record ClampedSwiGlu(Real alpha, Real limit) {}

    /** The family of a model_type. */
    static Optional<ModelFamily> ofType(String modelType) {
        return ALL.stream().filter(f -> f.modelTypes.contains(modelType)).findFirst();
    }

    /** All families, in the order in which an unknown model is compared with them. */
    static List<ModelFamily> all() {
        return ALL;
    }

    /** Why a model_type is known not to work, or null. */
    static String refusal(String modelType) {
        return REFUSED.get(modelType);
    }

    /** The layer's sizes. */
    MoeShape shape(ModelConfig config) {
        int hidden = config.size(List.of("hidden_size"));
        int width = config.size(intermediate);
        int count = config.size(expertCount);
        int perToken = config.size(topK);
        long sharedWidth = shared == null ? 0 : sharedWidth(config);
        if (sharedWidth > Integer.MAX_VALUE) {
            throw new CheckpointException(
                    config.file()
                            + ": "
                            + shared.count()
                            + " times "
                            + shared.width()
                            + " is "
                            + sharedWidth
                            + ", more than 2^31-1: use the model's own config.json");
        }
        try {
            return new MoeShape(hidden, width, count, perToken, (int) sharedWidth);
        } catch (CheckpointException e) {
            throw e;
        } catch (IllegalArgumentException e) {
            throw new CheckpointException(config.file() + ": " + e.getMessage(), e);
        }
    }

    /** The routing rule, checked against the sizes. */
    RoutingRule rule(ModelConfig config, MoeShape shape) {
        requireSupported(config);
        int groupCount = groups == null ? 1 : config.sizeOr(groups.field(), groups.fallback());
        int chosen =
                topkGroups == null ? 1 : config.sizeOr(topkGroups.field(), topkGroups.fallback());
        try {
            RoutingRule rule =
                    new RoutingRule(
                            scoring,
                            renormalise(config),
                            groupCount,
                            chosen,
                            scale == null ? 1f : real(config, scale));
            rule.validate(shape);
            return rule;
        } catch (CheckpointException e) {
            throw e;
        } catch (IllegalArgumentException e) {
            throw new CheckpointException(config.file() + ": " + e.getMessage(), e);
        }
    }

    /** The activation between the projections. */
    Activation activation(ModelConfig config) {
        return clampedSwiGlu == null
                ? Activation.swiGlu()
                : Activation.clampedSwiGlu(
                        real(config, clampedSwiGlu.alpha()), real(config, clampedSwiGlu.limit()));
    }

    /**
     * Whether a model of unknown type says in so many words all that this family needs. Defaults do
     * not count: they belong to the family's own model types.
     */
    boolean fits(ModelConfig config, boolean hasCorrectionBias) {
        boolean sizes =
                config.has("hidden_size")
                        && config.hasAny(expertCount)
                        && config.hasAny(topK)
                        && config.hasAny(intermediate)
                        && (shared == null || config.has(shared.width()));
        boolean routing =
                (renormalise.field() == null || config.has(renormalise.field()))
                        && (groups == null || config.has(groups.field()))
                        && (topkGroups == null || config.has(topkGroups.field()))
                        && (scale == null || config.has(scale.field()));
        boolean scores =
                config.has("scoring_func")
                        ? scoringName().equals(config.text("scoring_func"))
                        : hasCorrectionBias || allowed == null;
        return sizes && routing && scores;
    }

    /** The configuration fields this family reads, for messages. */
    String fields() {
        List<String> fields = new ArrayList<>();
        fields.add("hidden_size");
        fields.add(String.join("|", expertCount));
        fields.add(String.join("|", topK));
        fields.add(String.join("|", intermediate));
        if (shared != null) {
            fields.add(shared.width());
        }
        for (String field :
                new String[] {
                    renormalise.field(),
                    groups == null ? null : groups.field(),
                    topkGroups == null ? null : topkGroups.field(),
                    scale == null ? null : scale.field()
                }) {
            if (field != null) {
                fields.add(field);
            }
        }
        return String.join(", ", fields);
    }

    /** A pattern for the names this family's tensors have inside the block. */
    Pattern names() {
        List<String> names = new ArrayList<>();
        names.add(router);
        names.add(routerBias);
        names.add(correctionBias);
        for (ExpertNames e : experts) {
            names.addAll(e.arrangement().tensors(e));
        }
        if (shared != null) {
            names.add(shared.gate());
            names.add(shared.up());
            names.add(shared.down());
            names.add(shared.scalarGate());
        }
        return Pattern.compile(
                names.stream()
                        .filter(Objects::nonNull)
                        .map(n -> Pattern.quote(n).replace("{e}", "\\E\\d+\\Q"))
                        .collect(Collectors.joining("|", "(?:", ")(?:_scale_inv)?")));
    }

    private long sharedWidth(ModelConfig config) {
        long count = shared.count() == null ? 1 : config.countOr(shared.count(), 0);
        return count * config.countOr(shared.width(), 0);
    }

    private void requireSupported(ModelConfig config) {
        requireOneOf(config, "hidden_act", List.of("silu", "swish"));
        requireOneOf(config, "scoring_func", List.of(scoringName()));
        if (allowed != null) {
            allowed.forEach((field, values) -> requireOneOf(config, field, values));
        }
    }

    private void requireOneOf(ModelConfig config, String field, List<String> values) {
        String found = config.text(field);
        if (found != null && !values.contains(found)) {
            throw new CheckpointException(
                    config.file()
                            + ": "
                            + field
                            + "="
                            + CheckpointException.quote(found)
                            + " is not supported for "
                            + name
                            + " models: only "
                            + String.join(" or ", values)
                            + " is");
        }
    }

    private String scoringName() {
        return scoring == RoutingRule.Scoring.SIGMOID ? "sigmoid" : "softmax";
    }

    private boolean renormalise(ModelConfig config) {
        if (renormalise.field() == null) {
            return renormalise.fallback();
        }
        boolean value = config.flag(renormalise.field(), renormalise.fallback());
        if (renormalise.only() != null && value != renormalise.only()) {
            throw new CheckpointException(
                    config.file()
                            + ": "
                            + renormalise.field()
                            + "="
                            + value
                            + " is not supported for "
                            + name
                            + " models: published implementations disagree on its meaning");
        }
        return value;
    }

    private static float real(ModelConfig config, Real real) {
        return config.positive(real.field(), real.fallback());
    }

    private static List<ModelFamily> readFamilies(ObjectMapper mapper, JsonNode entries)
            throws IOException {
        Map<String, ObjectNode> byName = new HashMap<>();
        List<ModelFamily> families = new ArrayList<>();
        for (JsonNode entry : entries) {
            ObjectNode complete = mapper.createObjectNode();
            if (entry.has("like")) {
                complete.setAll(byName.get(entry.get("like").textValue()));
            }
            complete.setAll((ObjectNode) entry);
            complete.remove("like");
            byName.put(complete.get("name").textValue(), complete);
            families.add(mapper.treeToValue(complete, ModelFamily.class));
        }
        return List.copyOf(families);
    }

    private static String text(Map.Entry<String, JsonNode> entry) {
        return entry.getValue().textValue();
    }
}
