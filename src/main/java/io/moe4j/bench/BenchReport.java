package io.moe4j.bench;

import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.annotation.JsonInclude;
import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.SerializationFeature;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Objects;

/**
 * The measurements of one run and where they were made.
 *
 * @param environment GPU, driver, clocks, JDK, commit: see {@link Environment}
 * @param command how to repeat it
 * @param seed of weights, hidden states and routing
 * @param rows the measurements
 * @param peers null, or the peers measured beside it: see {@link PeersFile}
 */
@JsonIgnoreProperties(ignoreUnknown = true)
@JsonInclude(JsonInclude.Include.NON_NULL)
public record BenchReport(
        Map<String, String> environment,
        String command,
        long seed,
        List<BenchRow> rows,
        PeersRun peers) {
    private static final List<String> CSV_COLUMNS =
            List.of(
                    "bench",
                    "case",
                    "model",
                    "hidden",
                    "intermediate",
                    "experts",
                    "topk",
                    "ep",
                    "tokens",
                    "routing",
                    "stage",
                    "backend",
                    "mode",
                    "cache",
                    "weight_sets",
                    "rows",
                    "hit_experts",
                    "median_us",
                    "p20_us",
                    "p80_us",
                    "samples",
                    "tflops",
                    "gb_per_s",
                    "floor_us",
                    "times_floor",
                    "baseline",
                    "baseline_us",
                    "faster_than_baseline",
                    "peer",
                    "peer_us",
                    "faster_than_peer",
                    "run_peer",
                    "run_peer_us",
                    "faster_than_run_peer",
                    "aim_us",
                    "error",
                    "kernels",
                    "gpu",
                    "commit");

    /**
     * A report without peers of its run.
     *
     * @param environment facts of the machine
     * @param command the command that repeats it
     * @param seed seed of what is random
     * @param rows the measurements
     */
    public BenchReport(
            Map<String, String> environment, String command, long seed, List<BenchRow> rows) {
        this(environment, command, seed, rows, null);
    }

    /**
     * Reads a report that {@link #toJson} wrote.
     *
     * @param file the file
     * @return the report
     * @throws IOException if the file cannot be read
     */
    public static BenchReport read(Path file) throws IOException {
        try {
            BenchReport report =
                    new ObjectMapper()
                            .disable(DeserializationFeature.FAIL_ON_UNKNOWN_PROPERTIES)
                            .readValue(Files.readAllBytes(file), BenchReport.class);
            if (report.rows() == null) {
                throw new IllegalArgumentException(file + " has no rows: give a bench report");
            }
            return report;
        } catch (JsonProcessingException e) {
            throw new IllegalArgumentException(
                    file + " is not a report of moe4j bench: " + e.getOriginalMessage(), e);
        }
    }

    /**
     * {@return the for programs, and for --compare; with peers or a dense product of the run also
     * the {@link Summary}}
     */
    public String toJson() {
        ObjectMapper mapper = new ObjectMapper().enable(SerializationFeature.INDENT_OUTPUT);
        ObjectNode tree = mapper.valueToTree(this);
        if (Summary.fits(this)) {
            tree.set("summary", mapper.valueToTree(Summary.of(this)));
        }
        try {
            return mapper.writeValueAsString(tree) + "\n";
        } catch (JsonProcessingException e) {
            throw new IllegalStateException(e);
        }
    }

    /** {@return one line per measurement, and a header} */
    public String toCsv() {
        StringBuilder csv = new StringBuilder(String.join(",", CSV_COLUMNS)).append('\n');
        for (BenchRow r : rows) {
            Object[] cells = {
                r.bench(),
                r.number(),
                r.model(),
                r.hidden(),
                r.intermediate(),
                r.experts(),
                r.topK(),
                r.ep(),
                r.tokens(),
                r.routing(),
                r.stage(),
                r.backend(),
                r.mode(),
                r.cache(),
                r.weightSets(),
                r.rows(),
                r.hitExperts(),
                r.medianUs(),
                r.p20Us(),
                r.p80Us(),
                r.samples(),
                r.tflops(),
                r.gbPerS(),
                r.floorUs(),
                r.timesFloor(),
                r.baseline(),
                r.baselineUs(),
                r.fasterThanBaseline(),
                r.peer(),
                r.peerUs(),
                r.fasterThanPeer(),
                r.runPeer(),
                r.runPeerUs(),
                r.fasterThanRunPeer(),
                r.aimUs(),
                r.error(),
                r.kernels(),
                environment.getOrDefault("gpu", ""),
                environment.getOrDefault("commit", "")
            };
            for (int i = 0; i < cells.length; i++) {
                csv.append(i == 0 ? "" : ",").append(csvCell(cells[i]));
            }
            csv.append('\n');
        }
        return csv.toString();
    }

    private static String csvCell(Object value) {
        if (value == null) {
            return "";
        }
        if (value instanceof Double number) {
            return String.format(Locale.ROOT, "%.4g", number);
        }
        String text = value.toString();
        return text.matches("[^,\"\\n]*") ? text : '"' + text.replace("\"", "\"\"") + '"';
    }

    /** {@return a table for people, with the environment above it} */
    public String toMarkdown() {
        StringBuilder text = new StringBuilder();
        environment.forEach(
                (key, value) ->
                        text.append("- ").append(key).append(": ").append(value).append('\n'));
        rows.stream()
                .filter(row -> row.error() != null)
                .mapToDouble(BenchRow::error)
                .max()
                .ifPresent(
                        error ->
                                text.append(
                                        String.format(
                                                Locale.ROOT,
                                                "- checked before timing: worst token off by %.1e"
                                                        + " from float64%n",
                                                error)));
        if (peers != null) {
            describePeers(text);
        }
        text.append("- seed: ")
                .append(seed)
                .append("\n- command: `")
                .append(command)
                .append("`\n\n");
        text.append("| case | model | EP | T | routing | stage | mode | rows | hit | median µs");
        text.append(" | p20 | p80 | TFLOP/s | GB/s | floor µs | × floor | baseline µs");
        text.append(" | vs baseline | best peer | vs peer |");
        text.append(peers == null ? "" : " peer of this run | vs it |");
        boolean aims = rows.stream().anyMatch(row -> row.aimUs() != null);
        text.append(aims ? " aim µs |" : "");
        int columns = 20 + (peers == null ? 0 : 2) + (aims ? 1 : 0);
        text.append("\n|").append("---|".repeat(columns)).append('\n');
        for (BenchRow r : rows) {
            text.append("| ").append(r.number() == 0 ? "–" : r.number());
            cell(text, r.model());
            cell(text, r.ep());
            cell(text, r.tokens());
            cell(text, r.routing());
            cell(text, r.stage());
            cell(text, r.mode() + ", " + r.cache());
            cell(text, r.rows());
            cell(text, r.hitExperts());
            cell(text, number(r.medianUs()));
            cell(text, number(r.p20Us()));
            cell(text, number(r.p80Us()));
            cell(text, number(r.tflops()));
            cell(text, number(r.gbPerS()));
            cell(text, number(r.floorUs()));
            cell(text, ratio(r.timesFloor()));
            cell(text, number(r.baselineUs()));
            cell(text, ratio(r.fasterThanBaseline()));
            cell(text, r.peer() == null ? "–" : r.peer() + " " + number(r.peerUs()));
            cell(text, ratio(r.fasterThanPeer()));
            if (peers != null) {
                cell(text, r.runPeer() == null ? "–" : r.runPeer() + " " + number(r.runPeerUs()));
                cell(text, ratio(r.fasterThanRunPeer()));
            }
            if (aims) {
                cell(text, number(r.aimUs()));
            }
            text.append(" |\n");
        }
        if (Summary.fits(this)) {
            text.append('\n');
            Summary.of(this).lines().forEach(line -> text.append(line).append('\n'));
        }
        return text.toString();
    }

    private void describePeers(StringBuilder text) {
        text.append("- peers of this run: ");
        List<String> facts = new ArrayList<>();
        Map<String, String> named = new LinkedHashMap<>();
        named.put("torch ", peers.torch());
        named.put("Triton ", peers.triton());
        named.put("NCCL ", peers.nccl());
        named.put("", peers.gpu());
        named.put("driver ", peers.driver());
        named.forEach((name, fact) -> facts.add(fact == null ? null : name + fact));
        facts.add(peers.date());
        text.append(String.join(", ", facts.stream().filter(Objects::nonNull).toList()));
        text.append('\n');
        if (peers.denseTflops() != null) {
            text.append("- dense 8192³ product: ").append(number(peers.denseTflops()));
            text.append(" TFLOP/s\n");
        }
        if (peers.copyGbPerS() != null) {
            text.append("- copy in device memory: ").append(number(peers.copyGbPerS()));
            text.append(" GB/s read and written\n");
        }
        for (String failure : peers.failures() == null ? List.<String>of() : peers.failures()) {
            text.append("- peer not measured: ").append(failure).append('\n');
        }
    }

    private static void cell(StringBuilder text, Object value) {
        text.append(" | ").append(value);
    }

    private static String number(Double value) {
        if (value == null) {
            return "–";
        }
        return String.format(Locale.ROOT, value < 100 ? "%.1f" : "%.0f", value);
    }

    private static String ratio(Double value) {
        return value == null ? "–" : String.format(Locale.ROOT, "%.2f", value);
    }
}
