package io.moe4j.cli;

import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.checker.CheckReport;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.GoldenFile;
import io.moe4j.checker.LayerHarness;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.Routing;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.weights.Checkpoint;
import java.io.PrintWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.OptionalDouble;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.IntStream;

/** The demo on a checkpoint: one layer over several ranks, stage by stage, and a verdict. */
final class CheckpointDemo {
    private static final int ORACLE_TOKENS = 37;

    private final PrintWriter out;
    private final Path folder;
    private final int ranks;
    private final Integer tokens;
    private final int steps;
    private final BackendName backend;
    private final boolean debugSync;

    CheckpointDemo(
            PrintWriter out,
            Path folder,
            int ranks,
            Integer tokens,
            int steps,
            BackendName backend,
            boolean debugSync) {
        this.out = out;
        this.folder = folder;
        this.ranks = ranks;
        this.tokens = tokens;
        this.steps = steps;
        this.backend = backend;
        this.debugSync = debugSync;
    }

    int run() {
        Moe.Choice choice = Moe.choose(backend.toString());
        try (Checkpoint checkpoint = Checkpoint.open(LayerSource.folder(folder))) {
            ReferenceCase reference = reference(checkpoint);
            MoeConfig config =
                    checkpoint
                            .layer(reference.layer())
                            .config()
                            .backend(backend.toString())
                            .ranks(ranks)
                            .maxTokensPerRank(
                                    LayerHarness.maxTokensPerRank(reference.tokens(), ranks))
                            .build();
            printLayer(reference, config, choice);
            runStep(reference, config);
            return compare(reference, config);
        }
    }

    /** The recorded case with the most tokens (or T tokens); computed if nothing is recorded. */
    private ReferenceCase reference(Checkpoint checkpoint) {
        Path beside = folder.resolve("golden.safetensors");
        int layer = LayerSource.firstMoeLayer(checkpoint, folder);
        MoeConfig config = checkpoint.layer(layer).config().build();
        if (Files.exists(beside)) {
            try (GoldenFile golden = GoldenFile.open(beside)) {
                GoldenFile.Entry entry =
                        golden.entries().stream()
                                .filter(e -> e.layer() == layer)
                                .filter(e -> tokens == null || e.tokens() == tokens)
                                .max(Comparator.comparingInt(GoldenFile.Entry::tokens))
                                .orElse(null);
                if (entry != null) {
                    return golden.read(entry, config.shape());
                }
            }
        }
        int count = tokens == null ? ORACLE_TOKENS : tokens;
        float[] hidden = Checker.randomHidden(1, layer, count, config.shape().hidden());
        return Float64Oracle.of(config).expect(layer, hidden, count);
    }

    private void printLayer(ReferenceCase reference, MoeConfig config, Moe.Choice choice) {
        MoeShape shape = config.shape();
        out.printf("checkpoint  %s%n", folder);
        out.printf("backend     %s%n", choice.reason());
        out.printf(
                "layer %-5d hidden H=%d, intermediate I=%d, experts E=%d, per token K=%d%s%n",
                reference.layer(),
                shape.hidden(),
                shape.intermediate(),
                shape.experts(),
                shape.topK(),
                shape.sharedIntermediate() > 0
                        ? ", shared expert " + shape.sharedIntermediate()
                        : "");
        out.printf("routing     %s%n", describe(config.rule()));
        out.printf(
                "input       %d tokens over R=%d ranks, at most M=%d per rank%n",
                reference.tokens(), ranks, config.maxTokensPerRank());
    }

    private void runStep(ReferenceCase reference, MoeConfig config) {
        try (ConsoleProgress progress = new ConsoleProgress("packing weights");
                LayerHarness harness = LayerHarness.open(config, progress)) {
            out.printf(
                    "memory      %s in %d buffers, allocated before the first step%n%n",
                    MemoryPlan.human(harness.layer().plan().totalBytes()),
                    harness.layer().plan().entries().size());
            harness.load(reference.hidden(), reference.tokens());
            double medianMs = StepTimer.medianMs(harness, steps);
            Routing routing = harness.collect().routing();
            printRouting(routing);
            printRanks(routing, config);
            out.printf(
                    Locale.ROOT,
                    "%n4 combine   weighted rows return to their ranks; a step takes %.3f ms"
                            + " (median of %d)%n%n",
                    medianMs,
                    steps);
        }
    }

    private void printRouting(Routing routing) {
        String experts =
                IntStream.range(0, routing.topK())
                        .filter(k -> routing.ids()[k] >= 0)
                        .mapToObj(
                                k ->
                                        String.format(
                                                Locale.ROOT,
                                                "%d (%.3f)",
                                                routing.ids()[k],
                                                routing.weights()[k]))
                        .collect(Collectors.joining(", "));
        out.printf("1 route     token 0 visits experts %s%n", experts);
    }

    /** What dispatch sends where: one row per token and rank that owns an expert it chose. */
    private void printRanks(Routing routing, MoeConfig config) {
        int[] counts = LayerHarness.spread(routing.tokens(), ranks);
        int[] rowsReceived = new int[ranks];
        int[] visits = new int[ranks];
        Set<Integer> hit = new TreeSet<>();
        for (int token = 0; token < routing.tokens(); token++) {
            Set<Integer> owners = new TreeSet<>();
            for (int expert : routing.sortedIds(token)) {
                if (expert >= 0) {
                    int owner = config.rankOf(expert);
                    visits[owner]++;
                    owners.add(owner);
                    hit.add(expert);
                }
            }
            owners.forEach(owner -> rowsReceived[owner]++);
        }
        out.printf("2 dispatch  each token goes once to every rank that owns one of its experts%n");
        out.printf("3 experts   each rank multiplies its rows with the experts that were hit%n%n");
        out.printf(
                "            %4s  %7s  %10s  %13s  %13s%n",
                "rank", "tokens", "rows recv.", "experts hit", "expert visits");
        for (int rank = 0; rank < ranks; rank++) {
            int owner = rank;
            long hitHere = hit.stream().filter(e -> config.rankOf(e) == owner).count();
            out.printf(
                    "            %4d  %7d  %10d  %13s  %13d%n",
                    rank,
                    counts[rank],
                    rowsReceived[rank],
                    hitHere + " of " + config.expertsOn(rank),
                    visits[rank]);
        }
    }

    private int compare(ReferenceCase reference, MoeConfig config) {
        CheckReport report =
                new CheckReport(
                        folder.toString(),
                        new Checker(OptionalDouble.empty())
                                .check(
                                        config,
                                        List.of(reference),
                                        ranks,
                                        this::repeat,
                                        ProgressListener.NONE));
        out.printf(
                "5 compare   with the %s output, token by token%n%n",
                reference.source().equals("golden") ? "recorded float64" : "computed float64");
        out.print(report.table());
        List<DebugRun.Case> debugged =
                debugSync
                        ? new DebugRun(OptionalDouble.empty(), this::repeat)
                                .stages(config, List.of(reference), ranks, ProgressListener.NONE)
                        : List.of();
        DebugRun.print(out, debugged);
        out.printf("%n%s%n", report.verdict());
        DebugRun.printVerdict(out, debugged);
        out.flush();
        return report.pass() && debugged.stream().allMatch(DebugRun.Case::pass)
                ? ExitCodes.OK
                : ExitCodes.MISMATCH;
    }

    private String repeat(ReferenceCase reference, int rankCount, String backendName) {
        return String.format(
                "%s demo --checkpoint %s --ranks %d --tokens %d --backend %s%s",
                LayerSource.shellQuote(BaseCommand.toolName()),
                LayerSource.shellQuote(folder.toString()),
                rankCount,
                reference.tokens(),
                backendName,
                debugSync ? " --debug-sync" : "");
    }

    private static String describe(RoutingRule rule) {
        String text =
                switch (rule.scoring()) {
                    case SOFTMAX -> "softmax over all experts, then top-K";
                    case TOPK_SOFTMAX -> "top-K by logit, then softmax over the chosen";
                    case SIGMOID -> "sigmoid scores, then top-K";
                };
        if (rule.groups() > 1) {
            text += " within " + rule.topkGroups() + " of " + rule.groups() + " groups";
        }
        return text + (rule.renormalise() ? ", renormalised" : "");
    }
}
