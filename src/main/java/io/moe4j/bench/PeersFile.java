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
 * What bench/peers/peers.py or nccl.py measured on the same GPU in the same run: times of other
 * libraries per case and stage, a dense product and a copy.
 *
 * @param run where and with what
 * @param times the times that could be measured
 */
public record PeersFile(PeersRun run, List<Time> times) {
    /**
     * One time of one peer.
     *
     * @param number of the case
     * @param model of the case
     * @param rows rows of its experts
     * @param hitExperts experts with rows
     * @param stage id of the {@link Stage}
     * @param peer its name
     * @param medianUs its median
     */
    public record Time(
            int number,
            String model,
            int rows,
            int hitExperts,
            String stage,
            String peer,
            double medianUs) {
        private boolean fits(BenchRow row) {
            boolean pair = row.stage().equals(Stage.PAIR.id());
            if (!stage.equals(row.stage()) || row.number() != number) {
                return false;
            }
            // why: a pair has a size, not counts; and what came late has no peer
            return pair
                    ? row.mode().equals("graph")
                    : row.bench().equals("experts")
                            && row.model().equals(model)
                            && row.rows() == rows
                            && row.hitExperts() == hitExperts;
        }
    }

    /**
     * Reads what peers.py wrote.
     *
     * @param file the file
     * @return the peers
     * @throws IllegalArgumentException naming the file and what is wrong with it
     * @throws IOException if the file cannot be read
     */
    public static PeersFile read(Path file) throws IOException {
        JsonNode root;
        try {
            root = new ObjectMapper().readTree(Files.readAllBytes(file));
        } catch (JsonProcessingException e) {
            throw new IllegalArgumentException(file + " is not JSON: " + e.getOriginalMessage(), e);
        }
        if (!root.path("cases").isArray()) {
            throw new IllegalArgumentException(
                    file + " has no cases: give a file that a script in bench/peers wrote");
        }
        List<Time> times = new ArrayList<>();
        List<String> failures = new ArrayList<>();
        root.path("errors").forEach(error -> failures.add(error.asText()));
        for (JsonNode node : root.path("cases")) {
            if (!node.path("case").isInt()
                    || !node.path("stage").isTextual()
                    || !node.path("peer").isTextual()) {
                throw new IllegalArgumentException(
                        file + ": an entry has no case, stage or peer: " + node);
            }
            double us = node.path("median_us").asDouble();
            if (us > 0 && Double.isFinite(us)) {
                times.add(time(node, us));
            } else {
                failures.add(failure(node));
            }
        }
        return new PeersFile(run(root, failures), times);
    }

    private static Time time(JsonNode node, double us) {
        return new Time(
                node.path("case").intValue(),
                node.path("model").asText(),
                node.path("rows").asInt(),
                node.path("hit_experts").asInt(),
                node.path("stage").textValue(),
                node.path("peer").textValue(),
                us);
    }

    private static String failure(JsonNode node) {
        return "case "
                + node.path("case").intValue()
                + " "
                + node.path("stage").textValue()
                + " "
                + node.path("peer").textValue()
                + ": "
                + node.path("error").asText("not measured");
    }

    private static PeersRun run(JsonNode root, List<String> failures) {
        return new PeersRun(
                text(root, "gpu"),
                text(root, "driver"),
                text(root, "torch"),
                text(root, "triton"),
                text(root, "nccl"),
                text(root, "date"),
                number(root, "dense_8192_tflops"),
                number(root, "copy_gb_per_s"),
                failures);
    }

    private static String text(JsonNode root, String field) {
        return root.path(field).isTextual() ? root.path(field).textValue() : null;
    }

    private static Double number(JsonNode root, String field) {
        return root.path(field).isNumber() ? root.path(field).doubleValue() : null;
    }

    /**
     * {@return the report with these peers beside every row of the same case, with the same rows,
     * and stage}
     *
     * @param report the report
     */
    public BenchReport merge(BenchReport report) {
        List<BenchRow> rows = report.rows().stream().map(this::beside).toList();
        return new BenchReport(report.environment(), report.command(), report.seed(), rows, run);
    }

    private BenchRow beside(BenchRow row) {
        Map<String, Double> us = new LinkedHashMap<>();
        if (row.floorUs() != null) {
            times.stream().filter(t -> t.fits(row)).forEach(t -> us.put(t.peer(), t.medianUs()));
        }
        return us.isEmpty() ? row : row.withRunPeers(us);
    }

    /**
     * {@return what makes these peers no fair comparison with a report; one line each}
     *
     * @param report the report
     */
    public List<String> doubts(BenchReport report) {
        List<String> doubts = new ArrayList<>();
        for (String fact : List.of("gpu", "driver")) {
            String theirs = fact.equals("gpu") ? run.gpu() : run.driver();
            String ours = report.environment().get(fact);
            if (theirs != null && ours != null && !theirs.equals(ours)) {
                doubts.add("peers were measured with " + fact + " " + theirs + ", not " + ours);
            }
        }
        if (!times.isEmpty()
                && times.stream().noneMatch(t -> report.rows().stream().anyMatch(t::fits))) {
            doubts.add("no peer was measured on a case of this report");
        }
        if (!run.failures().isEmpty()) {
            doubts.add(
                    run.failures().size()
                            + " figures of peers are missing, for example "
                            + run.failures().get(0));
        }
        return doubts;
    }
}
