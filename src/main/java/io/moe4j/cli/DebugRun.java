package io.moe4j.cli;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.SerializationFeature;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.HostSyncCheckedLayer;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Checker;
import io.moe4j.checker.LayerHarness;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.StageChecker;
import io.moe4j.checker.StageReport;
import io.moe4j.checker.StepInput;
import java.io.PrintWriter;
import java.util.ArrayList;
import java.util.List;
import java.util.OptionalDouble;

/** The debugging runs of the commands: {@code --debug-sync} and {@code --host-sync}. */
final class DebugRun {
    private static final int WATCHED_STEPS = 3;

    private final OptionalDouble tolerance;
    private final Checker.RepeatCommand repeat;

    DebugRun(OptionalDouble tolerance, Checker.RepeatCommand repeat) {
        this.tolerance = tolerance;
        this.repeat = repeat;
    }

    /**
     * How one case went: {@code stages} after --debug-sync, {@code violations} after --host-sync.
     */
    record Case(
            String check,
            int layer,
            int tokens,
            int ranks,
            String backend,
            boolean pass,
            String result,
            StageReport stages,
            List<String> violations,
            String repeat) {}

    /** Compares the stages of every case with the CPU backend. */
    List<Case> stages(
            MoeConfig config, List<ReferenceCase> cases, int ranks, ProgressListener progress) {
        MoeConfig opened = configOf(config, cases, ranks);
        List<Case> results = new ArrayList<>();
        StageChecker checker = null;
        try {
            for (ReferenceCase reference : cases) {
                if (checker == null) {
                    checker = StageChecker.open(opened, tolerance, progress);
                }
                StageReport report =
                        checker.check(
                                StepInput.spread(reference.hidden(), reference.tokens(), ranks));
                results.add(
                        result(
                                "debug-sync",
                                reference,
                                ranks,
                                report.backend(),
                                report.pass(),
                                report.toString(),
                                report,
                                List.of()));
                if (!report.pass()) { // its step is unfinished: the next case needs new layers
                    checker.close();
                    checker = null;
                }
            }
        } finally {
            if (checker != null) {
                checker.close();
            }
        }
        return results;
    }

    /** Runs every case on a layer whose driver calls are checked. */
    List<Case> hostSync(
            MoeConfig config, List<ReferenceCase> cases, int ranks, ProgressListener progress) {
        List<Case> results = new ArrayList<>();
        HostSyncCheckedLayer layer = Moe.openHostSyncChecked(configOf(config, cases, ranks));
        try (LayerHarness harness = LayerHarness.over(layer, progress)) {
            for (ReferenceCase reference : cases) {
                int before = layer.violations().size();
                harness.load(reference.hidden(), reference.tokens());
                for (int i = 0; i < WATCHED_STEPS; i++) {
                    harness.step();
                }
                List<String> all = layer.violations();
                List<String> found = List.copyOf(all.subList(before, all.size()));
                String text =
                        found.isEmpty()
                                ? "no host sync in " + WATCHED_STEPS + " steps"
                                : found.size() + " host syncs, the first: " + found.get(0);
                results.add(
                        result(
                                "host-sync",
                                reference,
                                ranks,
                                layer.backend(),
                                found.isEmpty(),
                                text,
                                null,
                                found));
            }
        }
        return results;
    }

    private Case result(
            String check,
            ReferenceCase reference,
            int ranks,
            String backend,
            boolean pass,
            String text,
            StageReport stages,
            List<String> violations) {
        return new Case(
                check,
                reference.layer(),
                reference.tokens(),
                ranks,
                backend,
                pass,
                text,
                stages,
                violations,
                repeat.of(reference, ranks, backend));
    }

    private static MoeConfig configOf(MoeConfig config, List<ReferenceCase> cases, int ranks) {
        int most = cases.stream().mapToInt(ReferenceCase::tokens).max().orElseThrow();
        return config.toBuilder()
                .routingInput(RoutingInput.HIDDEN)
                .ranks(ranks)
                .maxTokensPerRank(LayerHarness.maxTokensPerRank(most, ranks))
                .build();
    }

    /** One line per case; for one that fails all violations and the command that repeats it. */
    static void print(PrintWriter out, List<Case> cases) {
        if (cases.isEmpty()) {
            return;
        }
        out.println();
        for (Case result : cases) {
            out.printf(
                    "%s: layer %d, %d tokens, %d ranks, %s: %s%n",
                    result.check(),
                    result.layer(),
                    result.tokens(),
                    result.ranks(),
                    result.backend(),
                    result.result());
            result.violations().stream().skip(1).forEach(line -> out.printf("  %s%n", line));
            if (!result.pass()) {
                out.printf("  repeat: %s%n", result.repeat());
            }
        }
    }

    /** One line if a case failed: the report's own verdict knows nothing of these. */
    static void printVerdict(PrintWriter out, List<Case> cases) {
        long failed = cases.stream().filter(result -> !result.pass()).count();
        if (failed > 0) {
            out.printf("MISMATCH: %d of %d debugging runs failed%n", failed, cases.size());
        }
    }

    /** The report with the cases as {@code debug}; unchanged if there are none. */
    static String addTo(String reportJson, List<Case> cases) {
        if (cases.isEmpty()) {
            return reportJson;
        }
        try {
            ObjectMapper mapper = new ObjectMapper().enable(SerializationFeature.INDENT_OUTPUT);
            ObjectNode report = (ObjectNode) mapper.readTree(reportJson);
            report.set("debug", mapper.valueToTree(cases));
            report.put(
                    "pass", report.path("pass").asBoolean() && cases.stream().allMatch(Case::pass));
            return mapper.writeValueAsString(report);
        } catch (JsonProcessingException e) {
            throw new IllegalStateException("report is not serialisable", e);
        }
    }
}
