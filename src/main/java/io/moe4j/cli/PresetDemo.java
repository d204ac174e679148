package io.moe4j.cli;

import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.LayerHarness;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.Routing;
import io.moe4j.checker.RoutingMismatch;
import io.moe4j.checker.StageChecker;
import io.moe4j.checker.StageReport;
import io.moe4j.checker.StepInput;
import io.moe4j.checker.TokenErrors;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import java.io.PrintWriter;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.OptionalDouble;

/** The demo at full size: one layer of a well-known model with random weights, timed. */
final class PresetDemo {
    private static final long SEED = 1;
    private static final int VERIFIED_TOKENS = 4;
    private static final long SPARE_BYTES = 256L << 20;

    private final PrintWriter out;
    private final ModelPreset preset;
    private final int ranks;
    private final int tokens;
    private final int steps;
    private final BackendName backend;
    private final boolean debugSync;

    PresetDemo(
            PrintWriter out,
            ModelPreset preset,
            int ranks,
            int tokens,
            int steps,
            BackendName backend,
            boolean debugSync) {
        this.out = out;
        this.preset = preset;
        this.ranks = ranks;
        this.tokens = tokens;
        this.steps = steps;
        this.backend = backend;
        this.debugSync = debugSync;
    }

    int run() {
        Moe.Choice choice = Moe.choose(backend.toString());
        MoeConfig config =
                LayerSource.configOf(preset, SEED)
                        .backend(choice.provider().name())
                        .ranks(ranks)
                        .maxTokensPerRank(LayerHarness.maxTokensPerRank(tokens, ranks))
                        .build();
        MemoryPlan plan = Moe.plan(config);
        out.printf("preset      %s, one layer, %s%n", preset.id(), config.weights().description());
        out.printf("backend     %s%n%n", choice.reason());
        out.println(plan);
        out.flush();
        requireHeap(config, plan);

        float[] hidden = Checker.randomHidden(SEED, 0, tokens, config.shape().hidden());
        LayerHarness.Output output;
        try (LayerHarness harness = open(config)) {
            harness.load(hidden, tokens);
            printTiming(StepTimer.medianMs(harness, steps));
            output = harness.collect();
        }
        boolean stagesAgree = !debugSync || compareStages(config, hidden);
        int verified = verify(config, hidden, output);
        return stagesAgree ? verified : ExitCodes.MISMATCH;
    }

    private static LayerHarness open(MoeConfig config) {
        try (ConsoleProgress progress = new ConsoleProgress("packing weights")) {
            return LayerHarness.open(config, progress);
        }
    }

    /** Refuses before anything is allocated if the heap cannot hold what the demo needs. */
    private void requireHeap(MoeConfig config, MemoryPlan plan) {
        Runtime runtime = Runtime.getRuntime();
        long available = runtime.maxMemory() - (runtime.totalMemory() - runtime.freeMemory());
        long decoding = (config.threads() + 1L) * 4 * config.shape().expertElements();
        long twin =
                debugSync ? Moe.plan(config.toBuilder().backend("cpu").build()).totalBytes() : 0;
        long onHeap = twin + (config.backend().equals("cpu") ? plan.totalBytes() : 0);
        long needed = onHeap + onHeap / 10 + decoding + SPARE_BYTES;
        if (needed > available) {
            throw new IllegalArgumentException(
                    "this demo needs about "
                            + MemoryPlan.human(needed)
                            + " of heap but the JVM has "
                            + MemoryPlan.human(available)
                            + ": set MOE4J_JAVA_OPTS=-Xmx"
                            + ((needed + needed / 16 >> 30) + 1)
                            + "g, or choose a smaller preset or fewer tokens");
        }
    }

    private void printTiming(double medianMs) {
        MoeShape shape = preset.shape();
        double flop =
                2.0
                        * tokens
                        * (3.0 * shape.hidden() * shape.intermediate() * shape.topK()
                                + 3.0 * shape.hidden() * shape.sharedIntermediate()
                                + (double) shape.hidden() * shape.experts());
        out.printf(
                Locale.ROOT,
                "speed       %d tokens over %d rank(s): %.2f ms per step (median of %d),"
                        + " %.0f tokens/s, %.1f GFLOP/s%n",
                tokens,
                ranks,
                medianMs,
                steps,
                tokens / medianMs * 1e3,
                flop / medianMs / 1e6);
        out.flush();
    }

    private boolean compareStages(MoeConfig config, float[] hidden) {
        try (ConsoleProgress progress = new ConsoleProgress("packing weights twice");
                StageChecker checker =
                        StageChecker.open(config, OptionalDouble.empty(), progress)) {
            StageReport report = checker.check(StepInput.spread(hidden, tokens, ranks));
            out.printf("stages      against the cpu backend: %s%n", report);
            out.flush();
            return report.pass();
        }
    }

    private int verify(MoeConfig config, float[] hidden, LayerHarness.Output output) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int count = Math.min(tokens, VERIFIED_TOKENS);
        Float64Oracle oracle = Float64Oracle.of(config);
        ReferenceCase reference = oracle.expect(0, Arrays.copyOf(hidden, count * h), count);
        Routing routing =
                new Routing(
                        count,
                        k,
                        Arrays.copyOf(output.routing().ids(), count * k),
                        Arrays.copyOf(output.routing().weights(), count * k));
        List<RoutingMismatch> mismatches = Checker.mismatches(reference, routing, oracle);
        TokenErrors errors =
                TokenErrors.of(Arrays.copyOf(output.out(), count * h), reference.full(), count, h);
        double tolerance = new Checker(OptionalDouble.empty()).toleranceOf(config.backend());
        boolean pass =
                mismatches.isEmpty() && errors.max() <= tolerance && output.paddingUntouched();
        out.printf(
                Locale.ROOT,
                "verify      first %d tokens against float64: routing %d/%d, worst token off by"
                        + " %.2e (tolerance %.2e)%n",
                count,
                count - mismatches.size(),
                count,
                errors.max(),
                tolerance);
        mismatches.forEach(mismatch -> out.printf("            %s%n", mismatch));
        out.printf("%n%s%n", pass ? "OK" : "MISMATCH");
        out.flush();
        return pass ? ExitCodes.OK : ExitCodes.MISMATCH;
    }
}
