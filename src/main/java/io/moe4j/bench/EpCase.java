package io.moe4j.bench;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * One dispatch and combine of a group of GPUs, with what others took for it, as in bench/ep.json.
 *
 * @param number in its file
 * @param ranks R, one GPU each
 * @param hidden H
 * @param experts E over all ranks
 * @param topK K
 * @param tokens T of each rank
 * @param peersUs recorded times of others, by name
 * @param aimUs what is to be reached; null if none is given
 */
public record EpCase(
        int number,
        int ranks,
        int hidden,
        int experts,
        int topK,
        int tokens,
        Map<String, Double> peersUs,
        Double aimUs) {
    /**
     * {@return all cases of a file}
     *
     * @param file the file
     * @throws IllegalArgumentException naming the file and what is wrong with it
     * @throws IOException if the file cannot be read
     */
    public static List<EpCase> read(Path file) throws IOException {
        JsonNode root;
        try {
            root = new ObjectMapper().readTree(Files.readAllBytes(file));
        } catch (JsonProcessingException e) {
            throw new IllegalArgumentException(file + " is not JSON: " + e.getOriginalMessage(), e);
        }
        List<EpCase> cases = new ArrayList<>();
        for (JsonNode node : root.path("cases")) {
            Map<String, Double> peers = new LinkedHashMap<>();
            node.path("peers_us")
                    .fields()
                    .forEachRemaining(e -> peers.put(e.getKey(), e.getValue().asDouble()));
            cases.add(
                    new EpCase(
                            number(file, node, "case"),
                            number(file, node, "ep"),
                            number(file, node, "hidden"),
                            number(file, node, "experts"),
                            number(file, node, "topk"),
                            number(file, node, "tokens_per_rank"),
                            peers,
                            node.path("aim_us").isNumber()
                                    ? node.path("aim_us").doubleValue()
                                    : null));
        }
        if (cases.isEmpty()) {
            throw new IllegalArgumentException(
                    file + " has no cases: give a file like bench/ep.json");
        }
        return cases;
    }

    private static int number(Path file, JsonNode node, String field) {
        if (!node.path(field).isInt() || node.path(field).intValue() < 1) {
            throw new IllegalArgumentException(
                    file + ": a case has no positive " + field + ": " + node.path("case"));
        }
        return node.path(field).intValue();
    }

    /** Whether it is a dispatch and combine of these sizes. */
    boolean fits(int ofRanks, int ofHidden, int ofExperts, int ofTopK, int ofTokens) {
        return ranks == ofRanks
                && hidden == ofHidden
                && experts == ofExperts
                && topK == ofTopK
                && tokens == ofTokens;
    }
}
