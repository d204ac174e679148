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
    private final BenchReport portable;
    private final BenchReport chain;
    private final Path epFolder;
    private final BenchReport pairs;
    private final List<BenchReport> layers = new ArrayList<>();

    BenchDocs() throws IOException {
        try (Stream<Path> folders = Files.list(RESULTS)) {
            folder =
                    folders.filter(f -> Files.exists(f.resolve("experts.json")))
                            .max(Comparator.comparing(Path::getFileName))
                            .orElseThrow();
        }
        experts = BenchReport.read(folder.resolve("experts.json"));
        Path steps = folder.resolve("chain.json");
        Path ptx = folder.resolve("experts-ptx.json");
        portable = Files.exists(ptx) ? BenchReport.read(ptx) : null;
        chain = Files.exists(steps) ? BenchReport.read(steps) : null;
        epFolder = newest("ep-pairs.json");
        pairs = BenchReport.read(epFolder.resolve("ep-pairs.json"));
        for (String model : List.of("qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-r1")) {
            String file = "ep-" + model + ".json";
            layers.add(BenchReport.read(newest(file).resolve(file)));
        }
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
                Map.of("measured", measured(""), "pairs", pairs("")),
                Path.of("docs/benchmarks.md"),
                Map.of("figures", figures(), "ep", pairs("../") + "\n" + groups()));
    }

    /** The newest folder that has a file. */
    private static Path newest(String file) throws IOException {
        try (Stream<Path> folders = Files.list(RESULTS)) {
            return folders.filter(f -> Files.exists(f.resolve(file)))
                    .max(Comparator.comparing(Path::getFileName))
                    .orElseThrow();
        }
    }

    /** Dispatch and combine alone, beside what collectives took in the same run. */
    private String pairs(String up) {
        Map<String, String> where = pairs.environment();
        StringBuilder text = new StringBuilder();
        text.append("One dispatch and one combine over GPUs of one host, bf16, top-8, uniform ");
        text.append("routing, in a CUDA graph, the slowest rank; ").append(where.get("gpu"));
        text.append(", NVLink, driver ").append(where.get("driver")).append(", commit ");
        text.append(where.get("commit")).append(" ([").append(epFolder.getFileName());
        text.append("](").append(up).append(epFolder).append("/ep-pairs.md)). NCCL is that of ");
        text.append("the same run: all-gather and reduce-scatter, or two all-to-alls; the others");
        text.append(
                " are recorded. The collectives neither count rows nor build lists of them.\n\n");
        text.append("| GPUs | H | T | µs | aim | fastest NCCL collectives | vs it |");
        text.append(" DeepEP LL | vs it | fastest NCCL EP | vs it |\n");
        text.append("|---|---|---|---|---|---|---|---|---|---|---|\n");
        for (BenchRow row : pairs.rows()) {
            if (!row.mode().equals("graph")) {
                continue;
            }
            Double nccl = row.runPeerUs();
            Double deepEp = row.peersUs().get("deepep_ll");
            Double ncclEp =
                    row.peersUs().entrySet().stream()
                            .filter(e -> e.getKey().startsWith("nccl_ep"))
                            .map(Map.Entry::getValue)
                            .min(Comparator.naturalOrder())
                            .orElse(null);
            text.append(
                    line(
                            row.ep(),
                            row.hidden(),
                            row.tokens(),
                            us(row.medianUs()),
                            us(row.aimUs()),
                            us(nccl),
                            ratio(over(nccl, row)),
                            us(deepEp),
                            ratio(over(deepEp, row)),
                            us(ncclEp),
                            ratio(over(ncclEp, row))));
        }
        return text.toString();
    }

    private static Double over(Double peer, BenchRow row) {
        return peer == null ? null : peer / row.medianUs();
    }

    /** Whole steps of a group beside what they are made of. */
    private String groups() {
        StringBuilder text = new StringBuilder();
        text.append("Whole steps over the same GPUs, ids given, without the shared expert, cold ");
        text.append(
                "weights: the experts and the pair measured alone, the step, and its floor.\n\n");
        text.append("| model | GPUs | T | pair µs | experts µs | step µs | × (experts + pair) |");
        text.append(" floor µs | × floor | commit |\n|---|---|---|---|---|---|---|---|---|---|\n");
        for (BenchReport report : layers) {
            Map<String, BenchRow> stage = new LinkedHashMap<>();
            for (BenchRow row : report.rows()) {
                stage.put(row.stage(), row);
                if (row.stage().equals("step")) {
                    text.append(
                            line(
                                    row.model(),
                                    row.ep(),
                                    row.tokens(),
                                    us(stage.get("pair").medianUs()),
                                    us(stage.get("ch").medianUs()),
                                    us(row.medianUs()),
                                    ratio(row.medianUs() / row.baselineUs()),
                                    us(row.floorUs()),
                                    ratio(row.timesFloor()),
                                    report.environment().get("commit")));
                }
            }
        }
        return text.toString();
    }

    private String figures() {
        StringBuilder text = new StringBuilder(measured("../"));
        if (experts.peers() != null) {
            text.append('\n');
            Summary.of(experts).lines().forEach(line -> text.append(line).append('\n'));
        }
        if (portable != null) {
            addPortable(text);
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

    private void addPortable(StringBuilder text) {
        text.append("\nThe portable kernels on the same GPU (`moe4j.cuda.kernels=ptx`: the code");
        text.append(" for compute_80, compiled by the driver):\n\n");
        text.append("| case | model | µs | × floor | vs Hopper's kernels |\n");
        text.append("|---|---|---|---|---|\n");
        for (BenchRow row : portable.rows()) {
            for (BenchRow hopper : experts.rows()) {
                if (row.stage().equals("ch") && row.key().equals(hopper.key())) {
                    text.append(
                            line(
                                    row.number(),
                                    row.model(),
                                    us(row.medianUs()),
                                    ratio(row.timesFloor()),
                                    ratio(hopper.medianUs() / row.medianUs())));
                }
            }
        }
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
        text.append("). Floors are the same H200 limits everywhere. ");
        text.append(
                beside
                        ? "The first peer is the fastest of the same run, the second the fastest"
                                + " recorded in the case file, in an earlier run"
                        : "Peers were measured earlier, in another run");
        text.append(" on the same kind of GPU; where “vs” is above 1 we are faster.\n\n");
        text.append("| case | model | EP | T | routing | rows | µs | × floor |");
        text.append(beside ? " peer of the run | µs | vs it |" : "");
        text.append(" recorded peer | µs | vs it |\n");
        text.append("|---|---|---|---|---|---|---|---|---|---|---|");
        text.append(beside ? "---|---|---|\n" : "\n");
        for (BenchRow row : experts.rows()) {
            if (!row.stage().equals("ch")) {
                continue;
            }
            List<Object> cells = new ArrayList<>();
            cells.addAll(
                    List.of(
                            row.number(),
                            row.model(),
                            row.ep(),
                            row.tokens(),
                            row.routing(),
                            row.rows(),
                            us(row.medianUs()),
                            ratio(row.timesFloor())));
            if (beside) {
                cells.addAll(peer(row.runPeer(), row.runPeerUs(), row.fasterThanRunPeer()));
            }
            cells.addAll(peer(row.peer(), row.peerUs(), row.fasterThanPeer()));
            text.append(line(cells.toArray()));
        }
        return text.toString();
    }

    private static List<String> peer(String name, Double us, Double gain) {
        return List.of(name == null ? "–" : "`" + name + "`", us(us), ratio(gain));
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
