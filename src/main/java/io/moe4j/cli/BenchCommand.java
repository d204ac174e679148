package io.moe4j.cli;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.bench.BenchCase;
import io.moe4j.bench.BenchOptions;
import io.moe4j.bench.BenchReport;
import io.moe4j.bench.BenchRow;
import io.moe4j.bench.CaseFile;
import io.moe4j.bench.ChainBench;
import io.moe4j.bench.Comparison;
import io.moe4j.bench.EpBench;
import io.moe4j.bench.EpCase;
import io.moe4j.bench.ExpertsBench;
import io.moe4j.bench.LaunchBench;
import io.moe4j.bench.Machine;
import io.moe4j.bench.OverlapBench;
import io.moe4j.bench.PeersFile;
import io.moe4j.bench.Prefill;
import io.moe4j.bench.RoutingPattern;
import io.moe4j.model.Activation;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import java.io.IOException;
import java.io.PrintWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import picocli.CommandLine;
import picocli.CommandLine.ArgGroup;
import picocli.CommandLine.Command;
import picocli.CommandLine.Mixin;
import picocli.CommandLine.Model.CommandSpec;
import picocli.CommandLine.Option;
import picocli.CommandLine.Parameters;
import picocli.CommandLine.Spec;

/** {@code moe4j bench}: times the expert chain, whole steps, or what a launch costs the host. */
@Command(
        name = "bench",
        description = {
            "Times the expert chain, whole steps, or what a launch costs the host, with random"
                    + " weights. Every result is checked before it is timed."
        },
        subcommands = {
            BenchCommand.Experts.class,
            BenchCommand.Chain.class,
            BenchCommand.Ep.class,
            BenchCommand.Launch.class,
            BenchCommand.Show.class,
            CommandLine.HelpCommand.class
        })
final class BenchCommand implements Runnable {
    @Spec private CommandSpec spec;

    @Override
    public void run() {
        throw new CommandLine.ParameterException(
                spec.commandLine(), "Missing subcommand: experts, chain, ep, launch or show");
    }

    /** Forms a report can be printed in. */
    enum Format {
        MD,
        CSV,
        JSON;

        @Override
        public String toString() {
            return name().toLowerCase(Locale.ROOT);
        }
    }

    /** Whose layer. */
    static final class LayerOptions {
        @Option(
                names = "--preset",
                paramLabel = "NAME",
                description = "A well-known model's layer (default: qwen3-30b-a3b).")
        private String preset;

        @Option(names = "--experts", paramLabel = "E", description = "Experts of a custom layer.")
        private Integer experts;

        @Option(names = "--top-k", paramLabel = "K", description = "Experts per token.")
        private Integer topK;

        @Option(names = "--hidden", paramLabel = "H", description = "Hidden size.")
        private Integer hidden;

        @Option(names = "--intermediate", paramLabel = "I", description = "Intermediate size.")
        private Integer intermediate;

        @Option(
                names = "--ranks",
                paramLabel = "R",
                defaultValue = "1",
                description = {
                    "Ranks of the expert-parallel group (default: ${DEFAULT-VALUE}). experts: times"
                            + " one of them; chain: virtual ranks that all run here."
                })
        private int ranks;

        @Option(
                names = "--tokens",
                paramLabel = "T",
                split = ",",
                defaultValue = "1,8,32,128",
                description = "Tokens of each rank, comma-separated (default: ${DEFAULT-VALUE}).")
        private List<Integer> tokens;

        @Option(
                names = "--routing",
                paramLabel = "PATTERN",
                defaultValue = "uniform",
                description = {
                    "uniform, zipf:S, hot1 or file:PATH with one line of expert ids per token"
                            + " (default: ${DEFAULT-VALUE})."
                })
        private String routing;

        private boolean isCustom() {
            boolean all = experts != null && topK != null && hidden != null && intermediate != null;
            boolean any = experts != null || topK != null || hidden != null || intermediate != null;
            if (any && (!all || preset != null)) {
                throw new IllegalArgumentException(
                        "a custom layer needs --experts, --top-k, --hidden and --intermediate, and"
                                + " no --preset");
            }
            return all;
        }

        private ModelPreset preset() {
            return LayerSource.preset(preset == null ? "qwen3-30b-a3b" : preset);
        }

        private String model() {
            return isCustom() ? "custom" : preset().id();
        }

        private MoeShape shape() {
            requirePositive("--ranks", ranks);
            tokens.forEach(count -> requirePositive("--tokens", count));
            return isCustom() ? MoeShape.of(hidden, intermediate, experts, topK) : preset().shape();
        }

        private RandomWeights weights(long seed) {
            return isCustom() ? RandomWeights.of(shape(), seed) : preset().randomWeights(seed);
        }

        private RoutingRule rule() {
            return isCustom() ? RoutingRule.softmaxTopK(true) : preset().rule();
        }

        private Activation activation() {
            return isCustom() ? Activation.swiGlu() : preset().activation();
        }

        private static void requirePositive(String option, int value) {
            if (value < 1) {
                throw new IllegalArgumentException(option + "=" + value + " is not positive");
            }
        }
    }

    /** How to time. */
    static final class TimingOptions {
        @ArgGroup private Mode mode;
        @ArgGroup private Cache cache;

        @Option(
                names = "--backend",
                defaultValue = "auto",
                description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
        private BackendName backend;

        private static final class Mode {
            @Option(
                    names = "--graph",
                    description = "Time captured graphs (the default on CUDA; the CPU has none).")
            private boolean graph;

            @Option(names = "--eager", description = "Time separate launches.")
            private boolean eager;
        }

        private static final class Cache {
            @Option(
                    names = "--cold",
                    description = "Rotate weight sets of more than 400 MB (the default on CUDA).")
            private boolean cold;

            @Option(names = "--hot", description = "Use one weight set.")
            private boolean hot;
        }

        private BenchOptions options(
                ReportOptions report, String baseline, ConsoleProgress progress) {
            String chosen = Moe.choose(backend.toString()).provider().name();
            boolean cuda = chosen.equals("cuda");
            return new BenchOptions(
                    chosen,
                    report.seed,
                    cuda && (mode == null || !mode.eager),
                    cuda && (cache == null || !cache.hot),
                    baseline,
                    report.sampleMs,
                    progress);
        }
    }

    /** What to do with the result. */
    static final class ReportOptions {
        @Option(
                names = "--seed",
                paramLabel = "S",
                defaultValue = "1",
                description = "Seed of weights, inputs and routing (default: ${DEFAULT-VALUE}).")
        private long seed;

        @Option(
                names = "--sample-ms",
                paramLabel = "N",
                defaultValue = "100",
                description = "Time to spend on one measurement (default: ${DEFAULT-VALUE}).")
        private int sampleMs;

        @Option(
                names = {"-o", "--output"},
                paramLabel = "FORMAT",
                defaultValue = "md",
                description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
        private Format format;

        @Option(
                names = "--out",
                paramLabel = "FILE",
                description = {
                    "Also write the report to a file, in the form its name ends with: .json, .csv or"
                            + " .md."
                })
        private Path file;

        @Option(
                names = "--compare",
                paramLabel = "OLD.json",
                description = "Compare with an older report.")
        private Path older;

        @Option(
                names = "--fail-slower",
                paramLabel = "SHARE",
                description = {
                    "With --compare: exit with 1 if a median is slower by more, for example 5%."
                })
        private String failSlower;

        private void requireUsable() {
            if (failSlower != null) {
                Comparison.parseAllowed(failSlower);
                if (older == null) {
                    throw new IllegalArgumentException("--fail-slower needs --compare");
                }
            }
            if (sampleMs < 1) {
                throw new IllegalArgumentException("--sample-ms=" + sampleMs + " is not positive");
            }
            if (file != null) {
                formatOf(file);
            }
        }
    }

    private static Format formatOf(Path file) {
        String name = file.toString();
        for (Format format : Format.values()) {
            if (name.endsWith("." + format)) {
                return format;
            }
        }
        throw new IllegalArgumentException(
                "--out=" + file + " ends with none of .json, .csv and .md");
    }

    private static String text(BenchReport report, Format format) {
        return switch (format) {
            case MD -> report.toMarkdown();
            case CSV -> report.toCsv();
            case JSON -> report.toJson();
        };
    }

    /** A kind of benchmark: measures, then reports and compares. */
    abstract static class Kind extends BaseCommand {
        @Mixin private ReportOptions report;
        @Spec private CommandSpec self;

        abstract List<BenchRow> measure(ReportOptions to) throws IOException;

        abstract String backend();

        /** What peers.py wrote, or null. */
        Path peers() {
            return null;
        }

        @Override
        public Integer call() throws IOException {
            report.requireUsable();
            BenchReport old = report.older == null ? null : BenchReport.read(report.older);
            PeersFile peers = peers() == null ? null : PeersFile.read(peers());
            List<BenchRow> rows = measure(report);
            Map<String, String> facts = Machine.facts(backend());
            BenchReport measured = new BenchReport(facts, repeat(), report.seed, rows);
            if (peers != null) {
                peers.doubts(measured).forEach(this::note);
            }
            BenchReport now = peers == null ? measured : peers.merge(measured);
            out().print(text(now, report.format));
            out().flush();
            if (report.file != null) {
                Files.writeString(report.file, text(now, formatOf(report.file)));
            }
            return old == null ? ExitCodes.OK : compare(now, old);
        }

        /** The call as it was made, but for where its result went. */
        private String repeat() {
            List<String> words = new ArrayList<>();
            boolean skip = false;
            for (String word : self.root().commandLine().getParseResult().originalArgs()) {
                if (!skip && !word.startsWith("--out=")) {
                    if (word.equals("--out")) {
                        skip = true;
                        continue;
                    }
                    words.add(LayerSource.shellQuote(word));
                }
                skip = false;
            }
            return "moe4j " + String.join(" ", words);
        }

        private int compare(BenchReport now, BenchReport old) {
            double allowed =
                    report.failSlower == null
                            ? Double.POSITIVE_INFINITY
                            : Comparison.parseAllowed(report.failSlower);
            Comparison comparison = Comparison.of(now, old, allowed);
            PrintWriter err = self.commandLine().getErr();
            comparison.lines().forEach(err::println);
            err.printf(
                    "%d measurements compared, %d slower than allowed, %d not in %s%n",
                    comparison.lines().size(),
                    comparison.slower().size(),
                    comparison.unmatched(),
                    report.older);
            if (!comparison.lines().isEmpty() && !sameMachine(now, old)) {
                err.println("the older report is from another GPU: " + old.environment());
            }
            err.flush();
            return comparison.slower().isEmpty() ? ExitCodes.OK : ExitCodes.MISMATCH;
        }

        private static boolean sameMachine(BenchReport now, BenchReport old) {
            String mine = now.environment().get("gpu");
            return mine == null
                    || old.environment() == null
                    || mine.equals(old.environment().get("gpu"));
        }

        void note(String line) {
            self.commandLine().getErr().println("note: " + line);
            self.commandLine().getErr().flush();
        }
    }

    /** The experts phase over exact counts. */
    @Command(
            name = "experts",
            description = {
                "The expert chain of one rank, gate/up, activation, down, over row counts that only"
                        + " the device knows; on CUDA also each product alone."
            })
    static final class Experts extends Kind {
        @Mixin private LayerOptions layer;
        @Mixin private TimingOptions timing;

        @Option(
                names = "--cases",
                paramLabel = "FILE",
                description = {
                    "Exact expert counts, and times of others to compare with, as in"
                            + " bench/cases.json; instead of a layer, tokens and routing."
                })
        private Path cases;

        @Option(
                names = "--baseline",
                paramLabel = "NAME",
                description =
                        "jcublas: also time cuBLAS per expert, with counts known on the host.")
        private String baseline;

        @Option(
                names = "--prefill",
                description = {
                    "Also times 4096 tokens of qwen3-30b-a3b and of mixtral-8x7b, and on CUDA a"
                            + " dense 8192³ product by cuBLAS beside them; without --cases these"
                            + " alone."
                })
        private boolean prefill;

        @Option(
                names = "--peers",
                paramLabel = "PEERS.json",
                description = "Puts the times that bench/peers/peers.py wrote beside ours.")
        private Path peers;

        @Override
        Path peers() {
            return peers;
        }

        private String backend = "cpu";

        @Override
        String backend() {
            return backend;
        }

        @Override
        List<BenchRow> measure(ReportOptions report) throws IOException {
            if (baseline != null && !baseline.equals("jcublas")) {
                throw new IllegalArgumentException(
                        "--baseline=" + baseline + " is unknown: use jcublas");
            }
            List<BenchCase> all = new ArrayList<>();
            if (cases != null) {
                all.addAll(CaseFile.read(cases));
            } else if (!prefill) {
                all.addAll(generated(report.seed));
            }
            if (prefill) {
                all.addAll(Prefill.cases(report.seed));
            }
            try (ConsoleProgress progress = new ConsoleProgress("experts")) {
                BenchOptions options = timing.options(report, baseline, progress);
                backend = options.backend();
                ExpertsBench bench = new ExpertsBench(options);
                List<BenchRow> rows = prefill ? bench.runBesideDense(all) : bench.run(all);
                bench.notes().forEach(this::note);
                return rows;
            }
        }

        /** The counts of rank 0. */
        private List<BenchCase> generated(long seed) throws IOException {
            MoeShape shape = layer.shape();
            RoutingPattern routing = RoutingPattern.parse(layer.routing);
            int local = (shape.experts() + layer.ranks - 1) / layer.ranks;
            List<BenchCase> made = new ArrayList<>();
            for (int tokens : layer.tokens) {
                int[] ids =
                        routing.ids(
                                Math.multiplyExact(layer.ranks, tokens),
                                shape.experts(),
                                shape.topK(),
                                seed);
                made.add(
                        new BenchCase(
                                0,
                                layer.model(),
                                shape.hidden(),
                                shape.intermediate(),
                                shape.experts(),
                                shape.topK(),
                                layer.ranks,
                                tokens,
                                routing.toString(),
                                RoutingPattern.counts(ids, 0, local),
                                Map.of()));
            }
            return made;
        }
    }

    /** Whole steps. */
    @Command(
            name = "chain",
            description = "The whole step, router to combine, over virtual ranks on one device.")
    static final class Chain extends Kind {
        @Mixin private LayerOptions layer;
        @Mixin private TimingOptions timing;

        private String backend = "cpu";

        @Override
        String backend() {
            return backend;
        }

        @Override
        List<BenchRow> measure(ReportOptions report) throws IOException {
            layer.shape();
            RandomWeights weights = layer.weights(report.seed);
            MoeConfig config =
                    MoeConfig.builder()
                            .weights(weights)
                            .rule(layer.rule())
                            .activation(layer.activation())
                            .ranks(layer.ranks)
                            .build();
            RoutingPattern routing = RoutingPattern.parse(layer.routing);
            try (ConsoleProgress progress = new ConsoleProgress("chain")) {
                BenchOptions options = timing.options(report, null, progress);
                backend = options.backend();
                return new ChainBench(options)
                        .run(layer.model(), config, weights, routing, layer.tokens);
            }
        }
    }

    /** Several GPUs. */
    @Command(
            name = "ep",
            description = {
                "Expert parallelism over several GPUs of this host, one rank each: dispatch and"
                        + " combine alone, the experts, and whole steps. The slowest rank counts."
            })
    static final class Ep extends Kind {
        @Mixin private LayerOptions layer;
        @Mixin private TimingOptions timing;

        @Option(
                names = "--gpus",
                paramLabel = "N",
                defaultValue = "2",
                description = "GPUs, from device 0 on (default: ${DEFAULT-VALUE}).")
        private int gpus;

        @Option(
                names = "--cases",
                paramLabel = "FILE",
                description = {
                    "Sizes of dispatch and combine, and times of others to compare with, as in"
                            + " bench/ep.json; instead of a layer and tokens, and without experts."
                })
        private Path cases;

        @Option(
                names = "--skew",
                paramLabel = "US",
                description = {
                    "Also times pairs in which each rank comes so many microseconds after the one"
                            + " before; the last one's time counts."
                })
        private double skewUs;

        @Option(
                names = "--overlap",
                description = {
                    "Instead, whole steps three ways: T tokens as one step, as two steps of T/2,"
                            + " and as two overlapped steps of T/2. Time per layer of eight in a"
                            + " graph."
                })
        private boolean overlap;

        @Option(
                names = "--peers",
                paramLabel = "PEERS.json",
                description = "Puts the times that bench/peers/nccl.py wrote beside ours.")
        private Path peers;

        @Override
        Path peers() {
            return peers;
        }

        @Override
        String backend() {
            return "cuda";
        }

        @Override
        List<BenchRow> measure(ReportOptions report) throws IOException {
            if (gpus < 2) {
                throw new IllegalArgumentException(
                        "--gpus=" + gpus + " is no group: give 2 or more, or use bench chain");
            }
            if (layer.ranks != 1) {
                throw new IllegalArgumentException("--ranks does not apply: give --gpus");
            }
            if (!(skewUs >= 0)) {
                throw new IllegalArgumentException("--skew=" + skewUs + " is negative");
            }
            try (ConsoleProgress progress = new ConsoleProgress("ep")) {
                BenchOptions options = timing.options(report, null, progress);
                if (!options.backend().equals("cuda")) {
                    throw new IllegalArgumentException("bench ep needs GPUs: see moe4j info");
                }
                if (overlap && (cases != null || skewUs > 0 || !options.graph())) {
                    throw new IllegalArgumentException(
                            "--overlap times graphs of whole steps: leave out --cases, --skew and"
                                    + " eager mode");
                }
                RoutingPattern routing = RoutingPattern.parse(layer.routing);
                return cases == null
                        ? wholeSteps(options, report, routing)
                        : pairs(options, report, routing);
            }
        }

        private List<BenchRow> wholeSteps(
                BenchOptions options, ReportOptions report, RoutingPattern routing) {
            layer.shape();
            RandomWeights weights = layer.weights(report.seed);
            MoeConfig config =
                    MoeConfig.builder().weights(weights).activation(layer.activation()).build();
            if (overlap) {
                return new OverlapBench(options, gpus)
                        .run(layer.model(), config, weights, routing, layer.tokens);
            }
            return new EpBench(options, gpus, true, skewUs, List.of())
                    .run(layer.model(), config, weights, routing, layer.tokens);
        }

        /** Experts as narrow as they come: they do not run. */
        private List<BenchRow> pairs(
                BenchOptions options, ReportOptions report, RoutingPattern routing)
                throws IOException {
            List<EpCase> all = EpCase.read(cases);
            EpBench bench = new EpBench(options, gpus, false, skewUs, all);
            List<BenchRow> rows = new ArrayList<>();
            for (EpCase one : all) {
                if (one.ranks() == gpus) {
                    MoeShape shape = MoeShape.of(one.hidden(), 64, one.experts(), one.topK());
                    RandomWeights weights = RandomWeights.of(shape, report.seed);
                    MoeConfig config = MoeConfig.builder().weights(weights).build();
                    rows.addAll(
                            bench.run("custom", config, weights, routing, List.of(one.tokens())));
                }
            }
            if (rows.isEmpty()) {
                throw new IllegalArgumentException(cases + " has no case for --gpus=" + gpus);
            }
            return rows;
        }
    }

    /** An old report in another form. */
    @Command(name = "show", description = "Prints a report that --out wrote as JSON.")
    static final class Show extends BaseCommand {
        @Parameters(paramLabel = "REPORT.json", description = "The report.")
        private Path file;

        @Option(
                names = {"-o", "--output"},
                paramLabel = "FORMAT",
                defaultValue = "md",
                description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
        private Format format;

        @Option(
                names = "--peers",
                paramLabel = "PEERS.json",
                description = "Puts the times that bench/peers/peers.py wrote beside the rows.")
        private Path peers;

        @Override
        public Integer call() throws IOException {
            BenchReport report = BenchReport.read(file);
            if (peers != null) {
                report = PeersFile.read(peers).merge(report);
            }
            out().print(text(report, format));
            out().flush();
            return ExitCodes.OK;
        }
    }

    /** Host cost. */
    @Command(
            name = "launch",
            description = {
                "A cold start, from opening a layer to its first output; then what the host"
                        + " spends on a step of a small layer: enqueueing its kernels, and"
                        + " launching it as a graph. Needs a GPU."
            })
    static final class Launch extends Kind {
        @Option(
                names = "--ranks",
                paramLabel = "R",
                defaultValue = "1",
                description = "Virtual ranks (default: ${DEFAULT-VALUE}).")
        private int ranks;

        @Override
        String backend() {
            return "cuda";
        }

        @Override
        List<BenchRow> measure(ReportOptions report) {
            try (ConsoleProgress progress = new ConsoleProgress("launch")) {
                BenchOptions options =
                        new BenchOptions(
                                "cuda", report.seed, true, false, null, report.sampleMs, progress);
                return new LaunchBench(options).run(ranks);
            }
        }
    }
}
