package io.moe4j.checker;

import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.ep.Group;
import io.moe4j.tensor.Bf16;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.OptionalDouble;
import java.util.Random;

/**
 * Compares a backend with references, through the public API only. A layer is opened once per
 * number of ranks (twice if it has a shared expert, to see the routed experts alone) and runs all
 * its cases, one after another, with the same bound tensors. Stateless apart from its settings.
 */
public final class Checker {
    /** Largest relative L2 error of a token on the CPU backend, which computes in float32. */
    public static final double CPU_TOLERANCE = 1e-5;

    /** Largest relative L2 error of a token on CUDA, which multiplies in bfloat16. */
    public static final double CUDA_TOLERANCE = 6e-3;

    private final OptionalDouble tolerance;

    /**
     * A checker.
     *
     * @param tolerance overrides the backend's tolerance if present
     */
    public Checker(OptionalDouble tolerance) {
        this.tolerance = tolerance;
    }

    /** Makes the command that repeats a case. */
    @FunctionalInterface
    public interface RepeatCommand {
        /**
         * {@return the command for this case on {@code ranks} ranks of {@code backend}}
         *
         * @param reference the case
         * @param ranks R, number of ranks
         * @param backend {@code cpu} or {@code cuda}
         */
        String of(ReferenceCase reference, int ranks, String backend);
    }

    /**
     * Runs the cases of one layer.
     *
     * @param config the layer, with weights and backend; ranks and M are set here
     * @param cases at least one, all of that layer
     * @param ranks R
     * @param repeat gives the command that repeats a case
     * @param progress hears about weights being packed
     * @return one result per case, in order
     */
    public List<CaseResult> check(
            MoeConfig config,
            List<ReferenceCase> cases,
            int ranks,
            RepeatCommand repeat,
            ProgressListener progress) {
        int mostTokens = cases.stream().mapToInt(ReferenceCase::tokens).max().orElseThrow();
        MoeConfig routedOnly =
                config.toBuilder()
                        .ranks(ranks)
                        .maxTokensPerRank(LayerHarness.maxTokensPerRank(mostTokens, ranks))
                        .sharedExpert(false)
                        .build();
        Run routed = run(routedOnly, cases, progress);
        Run full = routed;
        if (config.shape().sharedIntermediate() > 0) {
            full = run(routedOnly.toBuilder().sharedExpert(true).build(), cases, progress);
        }
        return results(config, cases, ranks, repeat, routed, full);
    }

    /**
     * Runs the cases of one layer on the GPUs of a group, and again with virtual ranks on one GPU,
     * from which they may not differ in a bit. All ranks of the group call it, each on a thread or
     * in a process of its own; only rank 0 compares.
     *
     * @param config the layer, with weights; backend, group and M are set here
     * @param cases at least one, all of that layer, the same on all ranks
     * @param group this rank's membership
     * @param repeat gives the command that repeats a case
     * @param progress hears about weights being packed
     * @return one result per case, in order, on rank 0; none on the others
     */
    public List<CaseResult> checkGroup(
            MoeConfig config,
            List<ReferenceCase> cases,
            Group group,
            RepeatCommand repeat,
            ProgressListener progress) {
        int mostTokens = cases.stream().mapToInt(ReferenceCase::tokens).max().orElseThrow();
        int ranks = group.ranks();
        MoeConfig virtual =
                config.toBuilder()
                        .backend("cuda")
                        .ranks(ranks)
                        .maxTokensPerRank(LayerHarness.maxTokensPerRank(mostTokens, ranks))
                        .sharedExpert(false)
                        .build();
        List<Run> inGroup = new ArrayList<>();
        List<Run> onOne = new ArrayList<>();
        for (boolean shared : new boolean[] {false, true}) {
            if (shared && config.shape().sharedIntermediate() == 0) {
                continue;
            }
            MoeConfig one = virtual.toBuilder().sharedExpert(shared).build();
            inGroup.add(GroupRun.run(one.toBuilder().group(group).build(), cases, progress));
            if (group.rank() == 0) {
                onOne.add(run(one, cases, progress));
            }
        }
        if (group.rank() != 0) {
            return List.of();
        }
        List<CaseResult> results = new ArrayList<>();
        List<CaseResult> plain =
                results(
                        config,
                        cases,
                        ranks,
                        repeat,
                        inGroup.get(0),
                        inGroup.get(inGroup.size() - 1));
        for (int i = 0; i < plain.size(); i++) {
            boolean equal = true;
            for (int run = 0; run < inGroup.size(); run++) {
                equal &=
                        Arrays.equals(
                                inGroup.get(run).outputs().get(i).out(),
                                onOne.get(run).outputs().get(i).out());
            }
            results.add(plain.get(i).against(equal));
        }
        return results;
    }

    private List<CaseResult> results(
            MoeConfig config,
            List<ReferenceCase> cases,
            int ranks,
            RepeatCommand repeat,
            Run routed,
            Run full) {
        Float64Oracle oracle = Float64Oracle.of(config);
        List<CaseResult> results = new ArrayList<>();
        for (int i = 0; i < cases.size(); i++) {
            ReferenceCase reference = cases.get(i);
            LayerHarness.Output routedOutput = routed.outputs().get(i);
            LayerHarness.Output fullOutput = full.outputs().get(i);
            Routing routing = fullOutput.routing();
            List<RoutingMismatch> mismatches = mismatches(reference, routing, oracle);
            results.add(
                    new CaseResult(
                            reference.layer(),
                            reference.tokens(),
                            ranks,
                            full.backend(),
                            reference.source(),
                            reference.tokens() - mismatches.size(),
                            mismatches,
                            weightError(reference.routing(), routing),
                            errors(routedOutput, reference.routed(), reference),
                            errors(fullOutput, reference.full(), reference),
                            toleranceOf(full.backend()),
                            routedOutput.paddingUntouched() && fullOutput.paddingUntouched(),
                            true,
                            repeat.of(reference, ranks, full.backend())));
        }
        return results;
    }

    /**
     * {@return the tolerance that applies to a backend}
     *
     * @param backend {@code cpu} or {@code cuda}
     */
    public double toleranceOf(String backend) {
        return tolerance.orElse(backend.equals("cpu") ? CPU_TOLERANCE : CUDA_TOLERANCE);
    }

    /**
     * Seeded hidden states [T, H]: standard normal, rounded to bfloat16 so that every backend gets
     * the same numbers. A layer's input depends on seed, layer and T only.
     *
     * @param seed seed of the values
     * @param layer number of the layer
     * @param tokens T, number of tokens
     * @param hidden hidden states [T, H], row-major
     * @return T · H values
     */
    public static float[] randomHidden(long seed, int layer, int tokens, int hidden) {
        Random random = new Random(seed * 1_000_003L + layer);
        float[] values = new float[Math.multiplyExact(tokens, hidden)];
        for (int i = 0; i < values.length; i++) {
            values[i] = Bf16.toFloat(Bf16.fromFloat((float) random.nextGaussian()));
        }
        return values;
    }

    /**
     * {@return the tokens whose set of experts differs from the reference's} The order within a
     * token has no meaning; a repeated or dropped id is a difference.
     *
     * @param reference the case
     * @param got what the layer gave
     * @param oracle for the scores of experts that tie
     */
    public static List<RoutingMismatch> mismatches(
            ReferenceCase reference, Routing got, Float64Oracle oracle) {
        List<RoutingMismatch> mismatches = new ArrayList<>();
        for (int token = 0; token < reference.tokens(); token++) {
            int[] want = reference.routing().sortedIds(token);
            int[] have = got.sortedIds(token);
            if (!Arrays.equals(want, have)) {
                int h = reference.width();
                float[] row = Arrays.copyOfRange(reference.hidden(), token * h, (token + 1) * h);
                double[] scores = oracle.selectionScores(oracle.logits(row, 1));
                int missing = bestOutside(want, have, scores);
                int unexpected = bestOutside(have, want, scores);
                double gap =
                        missing < 0 || unexpected < 0
                                ? Double.NaN
                                : scores[missing] - scores[unexpected];
                mismatches.add(new RoutingMismatch(token, missing, unexpected, gap));
            }
        }
        return mismatches;
    }

    /** The best-scored expert of {@code ids} that {@code others} lacks, −1 if there is none. */
    private static int bestOutside(int[] ids, int[] others, double[] scores) {
        int best = -1;
        for (int id : ids) {
            boolean valid = id >= 0 && id < scores.length;
            if (valid
                    && Arrays.binarySearch(others, id) < 0
                    && (best < 0 || scores[id] > scores[best])) {
                best = id;
            }
        }
        return best;
    }

    /** Worst relative L2 of the routing weights, over the tokens whose experts agree. */
    static double weightError(Routing want, Routing got) {
        double worst = 0;
        for (int token = 0; token < want.tokens(); token++) {
            int[] ids = want.sortedIds(token);
            if (!Arrays.equals(ids, got.sortedIds(token))) {
                continue;
            }
            float[] gotRow = new float[ids.length];
            double[] wantRow = new double[ids.length];
            for (int i = 0; i < ids.length; i++) {
                gotRow[i] = (float) got.weightOf(token, ids[i]);
                wantRow[i] = want.weightOf(token, ids[i]);
            }
            worst = Math.max(worst, TokenErrors.of(gotRow, wantRow, 1, ids.length).max());
        }
        return worst;
    }

    private static TokenErrors errors(
            LayerHarness.Output output, double[] want, ReferenceCase reference) {
        return TokenErrors.of(output.out(), want, reference.tokens(), reference.width());
    }

    private static Run run(MoeConfig config, List<ReferenceCase> cases, ProgressListener progress) {
        try (LayerHarness harness = LayerHarness.open(config, progress)) {
            List<LayerHarness.Output> outputs = new ArrayList<>();
            for (ReferenceCase reference : cases) {
                harness.load(reference.hidden(), reference.tokens());
                harness.step();
                outputs.add(harness.collect());
            }
            return new Run(harness.layer().backend(), outputs);
        }
    }

    /** The outputs of all cases, in order, and the backend that made them. */
    record Run(String backend, List<LayerHarness.Output> outputs) {}
}
