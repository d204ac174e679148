package io.moe4j.weights;

import com.fasterxml.jackson.databind.JsonNode;
import java.util.ArrayList;
import java.util.List;

/**
 * Typed, checked access to a model's config.json. Fields of a nested {@code text_config} win over
 * those beside it, so that multimodal models read like text models. A field that is null counts as
 * absent. Immutable.
 */
final class ModelConfig {
    private static final String NESTED = "text_config";

    private final String file;
    private final JsonNode outer;
    private final JsonNode inner;

    private ModelConfig(String file, JsonNode outer, JsonNode inner) {
        this.file = file;
        this.outer = outer;
        this.inner = inner;
    }

    /**
     * Wraps a parsed configuration.
     *
     * @param file named in messages
     * @throws CheckpointException if it is not an object
     */
    static ModelConfig of(JsonNode root, String file) {
        if (root == null || !root.isObject()) {
            throw new CheckpointException(
                    file + ": is not a JSON object: use the model's own config.json");
        }
        JsonNode nested = root.get(NESTED);
        if (nested == null || nested.isNull()) {
            return new ModelConfig(file, root, root);
        }
        if (!nested.isObject()) {
            throw new CheckpointException(
                    file + ": text_config is not an object: use the model's own config.json");
        }
        return new ModelConfig(file, root, nested);
    }

    /** The file's name in messages. */
    String file() {
        return file;
    }

    /** The model_type values, nested one first; empty if there is none. */
    List<String> modelTypes() {
        List<String> types = new ArrayList<>();
        for (JsonNode node : List.of(inner, outer)) {
            JsonNode type = node.get("model_type");
            if (type != null && type.isTextual() && !types.contains(type.textValue())) {
                types.add(type.textValue());
            }
        }
        return types;
    }

    /** Whether a field is there and not null. */
    boolean has(String field) {
        return node(field) != null;
    }

    /** Whether one of the fields is there and not null. */
    boolean hasAny(List<String> names) {
        return names.stream().anyMatch(this::has);
    }

    /** A size that must be given under one of several names: 1..2^31-1. */
    int size(List<String> names) {
        return whole(present(names), 1);
    }

    /** A count that may be absent: 0..2^31-1, or the default. */
    int countOr(String field, int fallback) {
        return has(field) ? whole(field, 0) : fallback;
    }

    /** A flag, or the default; null as default means that the field must be given. */
    boolean flag(String field, Boolean fallback) {
        JsonNode node = node(field);
        if (node == null) {
            return require(field, fallback);
        }
        if (!node.isBoolean()) {
            throw bad(field, node, "true or false");
        }
        return node.booleanValue();
    }

    /** A positive size, or the default; null as default means that the field must be given. */
    int sizeOr(String field, Integer fallback) {
        return has(field) ? whole(field, 1) : require(field, fallback);
    }

    /** A finite positive number; null as default means that the field must be given. */
    float positive(String field, Float fallback) {
        JsonNode node = node(field);
        if (node == null) {
            return require(field, fallback);
        }
        float value = node.isNumber() ? node.floatValue() : Float.NaN;
        if (!(value > 0 && Float.isFinite(value))) {
            throw bad(field, node, "a finite positive number");
        }
        return value;
    }

    /** A string, or null if the field is absent. */
    String text(String field) {
        JsonNode node = node(field);
        if (node != null && !node.isTextual()) {
            throw bad(field, node, "a string");
        }
        return node == null ? null : node.textValue();
    }

    /** How the weights are quantised, or null: {@code quantization_config.quant_method}. */
    String quantMethod() {
        JsonNode quantization = node("quantization_config");
        JsonNode method = quantization == null ? null : quantization.get("quant_method");
        return method == null || !method.isTextual() ? null : method.textValue();
    }

    /** Rows and columns of one FP8 scale block; 128 x 128 unless the configuration differs. */
    int[] scaleBlock() {
        JsonNode quantization = node("quantization_config");
        JsonNode block = quantization == null ? null : quantization.get("weight_block_size");
        if (block == null || block.isNull()) {
            return new int[] {128, 128};
        }
        String field = "quantization_config.weight_block_size";
        if (!block.isArray() || block.size() != 2) {
            throw bad(field, block, "an array of two sizes");
        }
        return new int[] {whole(field, block.get(0), 1), whole(field, block.get(1), 1)};
    }

    private JsonNode node(String field) {
        JsonNode node = inner.get(field);
        if (node == null || node.isNull()) {
            node = outer.get(field);
        }
        return node == null || node.isNull() ? null : node;
    }

    private String present(List<String> names) {
        return names.stream()
                .filter(this::has)
                .findFirst()
                .orElseThrow(() -> missing(String.join(" or ", names)));
    }

    private int whole(String field, int least) {
        return whole(field, node(field), least);
    }

    private int whole(String field, JsonNode node, int least) {
        if (!node.isIntegralNumber() || !node.canConvertToInt() || node.intValue() < least) {
            throw bad(field, node, "a whole number " + least + "..2147483647");
        }
        return node.intValue();
    }

    private <T> T require(String field, T fallback) {
        if (fallback == null) {
            throw missing(field);
        }
        return fallback;
    }

    private CheckpointException missing(String field) {
        return new CheckpointException(
                file
                        + ": "
                        + field
                        + " is missing: use the model's own config.json or add the field");
    }

    private CheckpointException bad(String field, JsonNode found, String expected) {
        return new CheckpointException(
                file
                        + ": "
                        + field
                        + "="
                        + CheckpointException.quote(found.toString())
                        + " is not "
                        + expected
                        + ": use the model's own config.json");
    }
}
