package io.moe4j.bench;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Reads cases with exact expert counts, and what peers took for them, as in bench/cases.json. */
public final class CaseFile {
    private CaseFile() {}

    /**
     * {@return all cases of a file}
     *
     * @param file the file
     * @throws IllegalArgumentException naming the file and what is wrong with it
     * @throws IOException if the file cannot be read
     */
    public static List<BenchCase> read(Path file) throws IOException {
        JsonNode root = tree(file);
        List<BenchCase> cases = new ArrayList<>();
        for (JsonNode node : root.path("cases")) {
            cases.add(read(file, node));
        }
        if (cases.isEmpty()) {
            throw new IllegalArgumentException(
                    file + " has no cases: give a file like bench/cases.json");
        }
        return cases;
    }

    /** The floors a file states: case number → type (bf16, fp8) → stage → µs. */
    static Map<Integer, Map<String, Map<String, Double>>> floors(Path file) throws IOException {
        Map<Integer, Map<String, Map<String, Double>>> floors = new LinkedHashMap<>();
        for (JsonNode node : tree(file).path("cases")) {
            floors.put(node.path("case").asInt(), nested(node.path("floor_us")));
        }
        return floors;
    }

    private static JsonNode tree(Path file) throws IOException {
        try {
            return new ObjectMapper().readTree(Files.readAllBytes(file));
        } catch (com.fasterxml.jackson.core.JsonProcessingException e) {
            throw new IllegalArgumentException(file + " is not JSON: " + e.getOriginalMessage(), e);
        }
    }

    private static BenchCase read(Path file, JsonNode node) {
        int[] counts = new int[node.path("expert_counts").size()];
        for (int i = 0; i < counts.length; i++) {
            counts[i] = node.path("expert_counts").get(i).asInt();
        }
        int local = number(file, node, "local_experts");
        if (counts.length != local) {
            throw new IllegalArgumentException(
                    file
                            + ": case "
                            + node.path("case")
                            + " has "
                            + counts.length
                            + " counts for local_experts="
                            + local);
        }
        BenchCase result =
                new BenchCase(
                        number(file, node, "case"),
                        node.path("model").asText("custom"),
                        number(file, node, "hidden"),
                        number(file, node, "intermediate"),
                        number(file, node, "experts"),
                        number(file, node, "topk"),
                        number(file, node, "ep"),
                        number(file, node, "tokens_per_rank"),
                        node.path("routing").asText("file"),
                        counts,
                        nested(node.path("peers_us")));
        if (node.has("rows") && node.path("rows").asInt() != result.rows()) {
            throw new IllegalArgumentException(
                    file + ": case " + result.number() + " counts do not add up to its rows");
        }
        return result;
    }

    private static int number(Path file, JsonNode node, String field) {
        if (!node.path(field).isInt()) {
            throw new IllegalArgumentException(
                    file + ": a case has no number " + field + ": " + node.path("case"));
        }
        return node.path(field).intValue();
    }

    private static Map<String, Map<String, Double>> nested(JsonNode node) {
        Map<String, Map<String, Double>> outer = new LinkedHashMap<>();
        node.fields()
                .forEachRemaining(
                        entry -> {
                            Map<String, Double> inner = new LinkedHashMap<>();
                            entry.getValue()
                                    .fields()
                                    .forEachRemaining(
                                            e -> inner.put(e.getKey(), e.getValue().asDouble()));
                            outer.put(entry.getKey(), inner);
                        });
        return outer;
    }
}
