package io.moe4j.docs;

import io.moe4j.bench.BenchReport;
import io.moe4j.bench.BenchRow;
import io.moe4j.bench.Chart;
import io.moe4j.bench.Summary;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.stream.Stream;

/**
 * The figures of the documentation, from the newest folder of bench/results: regions between {@code
 * <!-- bench: begin NAME -->} and {@code <!-- bench: end NAME -->}, and plots.
 */
final class BenchDocs {
    static final Path RESULTS = Path.of("bench/results");
    static final Path IMAGES = Path.of("docs/img");

    private final Path folder;
    private final BenchReport experts;
    private final BenchReport chain;

    BenchDocs() throws IOException {
        try (Stream<Path> folders = Files.list(RESULTS)) {
            folder =
                    folders.filter(f -> Files.exists(f.resolve("experts.json")))
                            .max(Comparator.comparing(Path::getFileName))
                            .orElseThrow();
        }
        experts = BenchReport.read(folder.resolve("experts.json"));
        Path steps = folder.resolve("chain.json");
        chain = Files.exists(steps) ? BenchReport.read(steps) : null;
    }

    /** All reports under bench/results; what peers.py wrote is none. */
    static List<Path> reports() throws IOException {
        try (Stream<Path> all = Files.walk(RESULTS)) {
            return all.filter(f -> f.toString().endsWith(".json"))
                    .filter(f -> !f.getFileName().toString().startsWith("peers"))
                    .sorted()
                    .toList();
        }
    }

    /** File name → plot. */
    Map<String, Chart> plots() {
        Map<String, Chart> plots = new LinkedHashMap<>();
        plots.put("experts-floor.svg", Chart.of(experts, Chart.Kind.FLOOR));
        plots.put("experts-roofline.svg", Chart.of(experts, Chart.Kind.ROOFLINE));
        if (chain != null) {
            plots.put("chain-latency.svg", Chart.of(chain, Chart.Kind.LATENCY));
        }
        return plots;
    }

    /** Page → name of a region → its text. */
    Map<Path, Map<String, String>> regions() {
        return Map.of(
                Path.of("README.md"),
                Map.of("measured", measured("")),
                Path.of("docs/benchmarks.md"),
                Map.of("figures", figures()));
    }

    private String figures() {
        StringBuilder text = new StringBuilder(measured("../"));
        if (experts.peers() != null) {
            text.append('\n');
            Summary.of(experts).lines().forEach(line -> text.append(line).append('\n'));
        }
        text.append("\n![time over floor of each case](img/experts-floor.svg)\n");
        text.append("\n![rate over intensity](img/experts-roofline.svg)\n");
        if (chain != null) {
            text.append("\nWhole steps on one GPU, router to combine:\n\n");
            text.append("| model | ranks | T | rows | µs | × floor |\n|---|---|---|---|---|---|\n");
            for (BenchRow row : chain.rows()) {
                text.append(
                        line(
                                row.model(),
                                row.ep(),
                                row.tokens(),
                                row.rows(),
                                us(row.medianUs()),
                                ratio(row.timesFloor())));
            }
            text.append("\n![time of a step over tokens](img/chain-latency.svg)\n");
        }
        return text.toString();
    }

    private String measured(String up) {
        boolean beside = experts.peers() != null;
        Map<String, String> where = experts.environment();
        StringBuilder text = new StringBuilder();
        text.append("Expert chain of one rank, bf16, cold weights, device counts, CUDA graph; ");
        text.append(where.get("gpu")).append(", driver ").append(where.get("driver"));
        text.append(", commit ").append(where.get("commit")).append(" ([");
        text.append(folder.getFileName())
                .append("](")
                .append(up)
                .append(folder)
                .append("/experts.md)");
        text.append("). Floors are the same H200 limits everywhere; peers were measured ");
        text.append(beside ? "in the same run" : "earlier, in another run on the same kind of GPU");
        text.append("; above 1 in the last column we are faster.\n\n");
        text.append(
                "| case | model | EP | T | routing | rows | µs | × floor | fastest peer | µs | vs peer |\n");
        text.append("|---|---|---|---|---|---|---|---|---|---|---|\n");
        for (BenchRow row : experts.rows()) {
            if (!row.stage().equals("ch")) {
                continue;
            }
            String peer = beside ? row.runPeer() : row.peer();
            text.append(
                    line(
                            row.number(),
                            row.model(),
                            row.ep(),
                            row.tokens(),
                            row.routing(),
                            row.rows(),
                            us(row.medianUs()),
                            ratio(row.timesFloor()),
                            peer == null ? "–" : "`" + peer + "`",
                            us(beside ? row.runPeerUs() : row.peerUs()),
                            ratio(beside ? row.fasterThanRunPeer() : row.fasterThanPeer())));
        }
        return text.toString();
    }

    private static String line(Object... cells) {
        List<String> words = new ArrayList<>();
        for (Object cell : cells) {
            words.add("" + cell);
        }
        return "| " + String.join(" | ", words) + " |\n";
    }

    private static String us(Double value) {
        return value == null
                ? "–"
                : String.format(Locale.ROOT, value < 100 ? "%.1f" : "%.0f", value);
    }

    private static String ratio(Double value) {
        return value == null ? "–" : String.format(Locale.ROOT, "%.2f", value);
    }
}
