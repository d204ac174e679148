package io.moe4j;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.Harness.Batch;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.overlap.TwoBatchOverlap;
import io.moe4j.tensor.DType;
import java.util.ArrayList;
import java.util.List;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The laws every backend keeps, bit for bit. Every message carries the seed. */
public abstract class MoeLayerContract {
    protected static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);

    protected abstract String backend();

    /** The stream steps are enqueued on. */
    protected long stream() {
        return 0L;
    }

    protected MoeConfig.Builder config(MoeShape shape, long seed) {
        return MoeConfig.builder()
                .weights(RandomWeights.of(shape, seed))
                .backend(backend())
                .hiddenDType(DType.F32)
                .maxTokensPerRank(24);
    }

    protected Harness harness(MoeConfig config) {
        return new Harness(config, false, stream());
    }

    private Harness harness(MoeConfig config, boolean accumulate) {
        return new Harness(config, accumulate, stream());
    }

    private static void assertSameBits(float[] got, float[] want, String what) {
        for (int j = 0; j < want.length; j++) {
            if (Float.floatToRawIntBits(got[j]) != Float.floatToRawIntBits(want[j])) {
                throw new AssertionError(
                        what + ": element " + j + " is " + got[j] + ", expected " + want[j]);
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"1,1", "2,1", "3,2", "4,4", "5,8"})
    void shouldPermuteTheOutputBitwiseWhenTokensArePermutedOverSlotsAndRanks(long seed, int ranks) {
        Batch all = Harness.random(SHAPE, 20, seed);
        try (Harness one = harness(config(SHAPE, seed).ranks(ranks).build())) {
            int[][] first = Harness.spread(20, ranks, seed);
            int[][] second = Harness.spread(20, ranks, seed + 100);
            float[][] a = gather(one.run(batches(all, first)), first, 20);
            float[][] b = gather(one.run(batches(all, second)), second, 20);
            for (int t = 0; t < 20; t++) {
                assertSameBits(b[t], a[t], "seed " + seed + " ranks " + ranks + " token " + t);
            }
        }
    }

    @ParameterizedTest
    @ValueSource(longs = {11, 12, 13})
    void shouldGiveTheSameRowsBitwiseWhenABatchIsSplit(long seed) {
        Batch all = Harness.random(SHAPE, 24, seed);
        try (Harness layer = harness(config(SHAPE, seed).build())) {
            float[][] whole = layer.run(all);
            int cut = 1 + (int) (seed % 23);
            for (int t = 0; t < 24; t++) {
                int from = t < cut ? 0 : cut;
                int to = t < cut ? cut : 24;
                int[] part = java.util.stream.IntStream.range(from, to).toArray();
                float[][] rows = layer.run(all.permuted(part));
                assertSameBits(rows[t - from], whole[t], "seed " + seed + " token " + t);
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"21,1", "22,2", "23,4"})
    void shouldChangeNoBitOfOtherTokensWhenNanAndInfinityTokensAreAdded(long seed, int ranks) {
        Batch good = Harness.random(SHAPE, 10, seed);
        Batch bad = Harness.random(SHAPE, 10, seed + 1);
        SplittableRandom random = new SplittableRandom(seed);
        for (int t = 0; t < 10; t++) {
            float poison = t % 2 == 0 ? Float.NaN : Float.POSITIVE_INFINITY;
            bad.hidden()[t][random.nextInt(SHAPE.hidden())] = poison;
            if (t % 3 == 0) {
                bad.weights()[t][random.nextInt(SHAPE.topK())] = Float.NaN;
            }
        }
        try (Harness layer = harness(config(SHAPE, seed).ranks(ranks).build())) {
            int[][] where = Harness.spread(10, ranks, seed);
            float[][] alone = gather(layer.run(batches(good, where)), where, 10);
            int[][] mixed = Harness.spread(20, ranks, seed + 5);
            float[][] together = gather(layer.run(batches(good.plus(bad), mixed)), mixed, 20);
            for (int t = 0; t < 10; t++) {
                assertSameBits(together[t], alone[t], "seed " + seed + " token " + t);
            }
            assertThat(Float.isNaN(together[10][0])).as("the NaN token itself").isTrue();
        }
    }

    @ParameterizedTest
    @ValueSource(ints = {1, 4})
    void shouldGiveZerosWhenAllIdsAreMinusOne(int ranks) {
        long seed = 31;
        Batch batch = Harness.random(SHAPE, 6, seed);
        for (int[] ids : batch.ids()) {
            java.util.Arrays.fill(ids, -1);
        }
        try (Harness layer = harness(config(SHAPE, seed).ranks(ranks).build())) {
            float[][][] out = layer.run(batches(batch, Harness.spread(6, ranks, seed)));
            int[][] where = Harness.spread(6, ranks, seed);
            for (int t = 0; t < 6; t++) {
                assertThat(gather(out, where, 6)[t]).containsOnly(0f);
            }
            assertThat(layer.layer.counters().droppedIds()).isZero();
        }
    }

    @Test
    void shouldGiveTheSharedExpertAloneWhenAllIdsAreMinusOne() {
        MoeShape shape = new MoeShape(64, 48, 12, 4, 80);
        Batch batch = Harness.random(shape, 6, 32);
        Batch none = Harness.random(shape, 6, 32);
        for (int[] ids : none.ids()) {
            java.util.Arrays.fill(ids, -1);
        }
        RandomWeights weights = RandomWeights.of(shape, 32).withSharedGate();
        try (Harness full = harness(config(shape, 32).weights(weights).build());
                Harness routed =
                        harness(config(shape, 32).weights(weights).sharedExpert(false).build())) {
            float[][] both = full.run(batch);
            float[][] shared = full.run(none);
            float[][] experts = routed.run(batch);
            for (int t = 0; t < 6; t++) {
                for (int j = 0; j < shape.hidden(); j++) {
                    assertThat(both[t][j]).isEqualTo(experts[t][j] + shared[t][j]);
                }
                assertThat(shared[t]).isNotEqualTo(new float[shape.hidden()]);
            }
        }
    }

    @ParameterizedTest
    @ValueSource(longs = {41, 42})
    void shouldCountADuplicateIdTwice(long seed) {
        MoeShape shape = MoeShape.of(64, 48, 12, 2);
        Batch twice = Harness.random(shape, 8, seed);
        Batch once = Harness.random(shape, 8, seed);
        for (int t = 0; t < 8; t++) {
            twice.ids()[t][1] = twice.ids()[t][0];
            twice.weights()[t][1] = twice.weights()[t][0];
            once.ids()[t][1] = -1;
            once.weights()[t][0] *= 2;
        }
        try (Harness layer = harness(config(shape, seed).build())) {
            float[][] a = layer.run(once);
            float[][] b = layer.run(twice);
            for (int t = 0; t < 8; t++) {
                assertSameBits(b[t], a[t], "seed " + seed + " token " + t);
            }
            assertThat(layer.layer.counters().duplicateIds()).isEqualTo(8);
        }
    }

    @ParameterizedTest
    @CsvSource({"51,1", "52,2", "53,4", "54,8"})
    void shouldReturnEachTokenTimesTheSumOfItsWeightsWhenExpertsAreTheIdentity(
            long seed, int ranks) {
        MoeShape shape = MoeShape.of(48, 48, 8, 4);
        float[] ones = new float[8];
        java.util.Arrays.fill(ones, 1f);
        Batch batch = Harness.small(shape, 16, seed);
        SplittableRandom random = new SplittableRandom(seed);
        for (float[] weights : batch.weights()) {
            for (int k = 0; k < 4; k++) {
                weights[k] = (1 + random.nextInt(15)) / 8f; // exact sums
            }
        }
        MoeConfig config =
                config(SHAPE, seed)
                        .weights(Harness.scalingExperts(shape, ones))
                        .ranks(ranks)
                        .build();
        try (Harness layer = harness(config)) {
            int[][] where = Harness.spread(16, ranks, seed);
            float[][] out = gather(layer.run(batches(batch, where)), where, 16);
            for (int t = 0; t < 16; t++) {
                float sum = 0;
                for (float w : batch.weights()[t]) {
                    sum += w;
                }
                for (int j = 0; j < 48; j++) {
                    assertThat(out[t][j])
                            .as("seed %d token %d element %d", seed, t, j)
                            .isEqualTo(sum * batch.hidden()[t][j]);
                }
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"61,1", "62,2", "63,4", "64,8"})
    void shouldSendEveryRowToItsExpertAndHomeWhenExpertsScaleByTheirOwnFactor(
            long seed, int ranks) {
        MoeShape shape = MoeShape.of(48, 48, 16, 4);
        float[] factors = new float[16];
        for (int e = 0; e < 16; e++) {
            factors[e] = e + 1;
        }
        Batch batch = Harness.small(shape, 24, seed);
        for (float[] weights : batch.weights()) {
            for (int k = 0; k < 4; k++) {
                weights[k] = 1 << k;
            }
        }
        MoeConfig config =
                config(SHAPE, seed)
                        .weights(Harness.scalingExperts(shape, factors))
                        .ranks(ranks)
                        .build();
        try (Harness layer = harness(config)) {
            int[][] where = Harness.spread(24, ranks, seed);
            float[][] out = gather(layer.run(batches(batch, where)), where, 24);
            for (int t = 0; t < 24; t++) {
                float factor = 0;
                for (int k = 0; k < 4; k++) {
                    factor += (batch.ids()[t][k] + 1) * (1 << k);
                }
                for (int j = 0; j < 48; j++) {
                    assertThat(out[t][j])
                            .as("seed %d token %d element %d", seed, t, j)
                            .isEqualTo(factor * batch.hidden()[t][j]);
                }
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"71,1", "72,4"})
    void shouldDropAndCountIdsOutOfRangeAndTouchNoOtherToken(long seed, int ranks) {
        Batch clean = Harness.random(SHAPE, 18, seed);
        Batch dirty = Harness.random(SHAPE, 18, seed);
        SplittableRandom random = new SplittableRandom(seed);
        int[] garbage = {12, 13, 1 << 20, Integer.MAX_VALUE, Integer.MIN_VALUE, -2, -1000};
        int planted = 0;
        for (int t = 0; t < 18; t += 2) {
            int k = random.nextInt(4);
            dirty.ids()[t][k] = garbage[planted++ % garbage.length];
            clean.ids()[t][k] = -1; // dropping equals skipping
        }
        try (Harness layer = harness(config(SHAPE, seed).ranks(ranks).build())) {
            int[][] where = Harness.spread(18, ranks, seed);
            float[][] a = gather(layer.run(batches(clean, where)), where, 18);
            assertThat(layer.layer.counters().droppedIds()).isZero();
            float[][] b = gather(layer.run(batches(dirty, where)), where, 18);
            for (int t = 0; t < 18; t++) {
                assertSameBits(b[t], a[t], "seed " + seed + " token " + t);
            }
            assertThat(layer.layer.counters().droppedIds()).isEqualTo(planted);
        }
    }

    @Test
    void shouldClampAndCountTokensAboveTheMaximum() {
        Batch batch = Harness.random(SHAPE, 24, 81);
        try (Harness layer = harness(config(SHAPE, 81).build())) {
            float[][] full = layer.run(batch);
            layer.tokenCount(0, 1000);
            layer.layer.enqueue(stream(), layer.step());
            layer.layer.synchronize(stream());
            float[][] clamped = layer.outputs()[0];
            for (int t = 0; t < 24; t++) {
                assertSameBits(clamped[t], full[t], "token " + t);
            }
            assertThat(layer.layer.counters().overCapacityTokens()).isEqualTo(976);
        }
    }

    @Test
    void shouldLeaveRowsPastTheTokenCountUntouchedAndAcceptZeroAndNegativeCounts() {
        Batch batch = Harness.random(SHAPE, 3, 91);
        try (Harness layer = harness(config(SHAPE, 91).ranks(2).build())) {
            float[][][] out = layer.run(List.of(batch, Batch.empty()), 77f);
            assertThat(out[0][2]).isNotEqualTo(constant(77f));
            for (int t = 3; t < 24; t++) {
                assertThat(out[0][t]).isEqualTo(constant(77f));
                assertThat(out[1][t]).isEqualTo(constant(77f));
            }
            float[][][] none = layer.run(List.of(Batch.empty(), Batch.empty()), 5f);
            assertThat(none[0][0]).isEqualTo(constant(5f));
            layer.tokenCount(0, -7);
            layer.layer.enqueue(stream(), layer.step());
            layer.layer.synchronize(stream());
            assertThat(layer.outputs()[0][0]).isEqualTo(constant(5f));
        }
    }

    @Test
    void shouldRepeatBitwiseWhateverRanInBetween() {
        Batch batch = Harness.random(SHAPE, 9, 101);
        try (Harness layer = harness(config(SHAPE, 101).ranks(4).build())) {
            int[][] where = Harness.spread(9, 4, 101);
            float[][] first = gather(layer.run(batches(batch, where)), where, 9);
            SplittableRandom random = new SplittableRandom(101);
            for (int i = 0; i < 20; i++) {
                int tokens = new int[] {0, 1, 3, 24}[random.nextInt(4)];
                Batch other = Harness.random(SHAPE, tokens, 1000 + i);
                layer.run(batches(other, Harness.spread(tokens, 4, i)));
                float[][] again = gather(layer.run(batches(batch, where)), where, 9);
                for (int t = 0; t < 9; t++) {
                    assertSameBits(again[t], first[t], "after run " + i + " token " + t);
                }
            }
        }
    }

    @Test
    void shouldScaleTheOutputExactlyWhenWeightsAreScaledByAPowerOfTwo() {
        Batch batch = Harness.random(SHAPE, 12, 111);
        Batch scaled = Harness.random(SHAPE, 12, 111);
        for (float[] weights : scaled.weights()) {
            for (int k = 0; k < weights.length; k++) {
                weights[k] *= 8;
            }
        }
        try (Harness layer = harness(config(SHAPE, 111).ranks(2).build())) {
            int[][] where = Harness.spread(12, 2, 111);
            float[][] a = gather(layer.run(batches(batch, where)), where, 12);
            float[][] b = gather(layer.run(batches(scaled, where)), where, 12);
            for (int t = 0; t < 12; t++) {
                for (int j = 0; j < SHAPE.hidden(); j++) {
                    assertThat(b[t][j]).isEqualTo(8 * a[t][j]);
                }
            }
        }
    }

    @Test
    void shouldAddToTheOutputWhenAccumulating() {
        Batch batch = Harness.random(SHAPE, 7, 121);
        try (Harness plain = harness(config(SHAPE, 121).build());
                Harness residual = harness(config(SHAPE, 121).build(), true)) {
            float[][] alone = plain.run(batch);
            float[][] added = residual.run(List.of(batch), 0.5f)[0];
            for (int t = 0; t < 7; t++) {
                for (int j = 0; j < SHAPE.hidden(); j++) {
                    assertThat(added[t][j]).isEqualTo(alone[t][j] + 0.5f);
                }
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"F32,F32", "F16,F32", "F16,F16", "BF16,F32", "BF16,BF16"})
    void shouldAgreeOverAllActivationTypes(DType in, DType out) {
        Batch batch = Harness.random(SHAPE, 7, 131); // exact in every type
        try (Harness reference = harness(config(SHAPE, 131).build());
                Harness typed = harness(config(SHAPE, 131).hiddenDType(in).outDType(out).build())) {
            float[][] want = reference.run(batch);
            float[][] got = typed.run(batch);
            double step = out == DType.F32 ? 0 : out == DType.F16 ? 0x1p-11 : 0x1p-8;
            for (int t = 0; t < 7; t++) {
                for (int j = 0; j < SHAPE.hidden(); j++) {
                    assertThat(Math.abs(got[t][j] - want[t][j]))
                            .isLessThanOrEqualTo(
                                    (float)
                                            (Math.abs(want[t][j]) * step
                                                    + 1e-7 * (step == 0 ? 0 : 1)));
                }
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"7,3", "5,4", "12,5", "3,8"})
    void shouldServeExpertsThatDoNotDivideByTheRanks(int experts, int ranks) {
        MoeShape shape = MoeShape.of(48, 48, experts, 2);
        float[] factors = new float[experts];
        for (int e = 0; e < experts; e++) {
            factors[e] = e + 1;
        }
        Batch batch = Harness.small(shape, 24, 141);
        for (float[] weights : batch.weights()) {
            weights[0] = 1;
            weights[1] = 2;
        }
        MoeConfig config =
                config(SHAPE, 141)
                        .weights(Harness.scalingExperts(shape, factors))
                        .ranks(ranks)
                        .build();
        try (Harness layer = harness(config)) {
            int[][] where = Harness.spread(24, ranks, 141);
            float[][] out = gather(layer.run(batches(batch, where)), where, 24);
            for (int t = 0; t < 24; t++) {
                float factor = (batch.ids()[t][0] + 1) + 2 * (batch.ids()[t][1] + 1);
                for (int j = 0; j < 48; j++) {
                    assertThat(out[t][j]).isEqualTo(factor * batch.hidden()[t][j]);
                }
            }
        }
    }

    @Test
    void shouldRunPhasesOneByOneWithTheSameResultAndRefuseThemOutOfOrder() {
        Batch batch = Harness.random(SHAPE, 5, 151);
        try (Harness layer = harness(config(SHAPE, 151).build())) {
            float[][] whole = layer.run(batch);
            layer.write(List.of(batch));
            assertThatThrownBy(
                            () ->
                                    layer.layer.enqueue(
                                            stream(),
                                            layer.step(),
                                            Phase.EXPERTS,
                                            Phase.COMBINE_RECV))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("EXPERTS")
                    .hasMessageContaining("ROUTE");
            for (Phase phase : Phase.values()) {
                layer.layer.enqueue(stream(), layer.step(), phase, phase);
            }
            layer.layer.synchronize(stream());
            float[][] pieces = layer.outputs()[0];
            for (int t = 0; t < 5; t++) {
                assertSameBits(pieces[t], whole[t], "token " + t);
            }
        }
    }

    @Test
    void shouldReplayACapturedStepWithAnyTokensAndAnyRouting() {
        try (Harness layer = harness(config(SHAPE, 171).ranks(2).handles(2).build());
                MoeGraph graph = layer.layer.capture(stream(), layer.step())) {
            assertThat(graph.nodeCount()).isPositive();
            for (int i = 0; i < 12; i++) {
                int tokens = new int[] {24, 1, 0, 3}[i % 4];
                Batch batch = Harness.random(SHAPE, tokens, 1710 + i);
                int[][] where = Harness.spread(tokens, 2, i);
                float[][] eager = gather(layer.run(batches(batch, where)), where, tokens);
                layer.write(batches(batch, where));
                graph.launch(stream());
                layer.layer.synchronize(stream());
                float[][] replayed = gather(layer.outputs(), where, tokens);
                for (int t = 0; t < tokens; t++) {
                    assertSameBits(replayed[t], eager[t], "replay " + i + " token " + t);
                }
            }
            layer.layer.close();
            assertThatThrownBy(() -> graph.launch(stream()))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("closed");
        }
    }

    @Test
    void shouldInterleaveTwoStepsOnTwoHandles() {
        MoeConfig config = config(SHAPE, 181).handles(2).build();
        Batch first = Harness.random(SHAPE, 9, 181);
        Batch second = Harness.random(SHAPE, 5, 182);
        try (Harness layer = harness(config)) {
            float[][] wantFirst = layer.run(first);
            float[][] wantSecond = layer.run(second);
            Harness.Second other = layer.second(1);
            layer.write(List.of(first));
            other.write(second);
            for (Phase phase : Phase.values()) {
                layer.layer.enqueue(stream(), layer.step(), phase, phase);
                layer.layer.enqueue(stream(), other.step(), phase, phase);
            }
            layer.layer.synchronize(stream());
            float[][] gotFirst = layer.outputs()[0];
            float[][] gotSecond = other.outputs();
            for (int t = 0; t < 9; t++) {
                assertSameBits(gotFirst[t], wantFirst[t], "first " + t);
            }
            for (int t = 0; t < 5; t++) {
                assertSameBits(gotSecond[t], wantSecond[t], "second " + t);
            }
        }
    }

    @Test
    void shouldGiveTheBitsOfSeparateStepsWhenTwoBatchesOverlap() {
        MoeConfig config = config(SHAPE, 191).handles(2).build();
        try (Harness layer = harness(config)) {
            Harness.Second other = layer.second(1);
            try (TwoBatchOverlap overlap = TwoBatchOverlap.of(layer.step(), other.step());
                    MoeGraph graph = overlap.capture(stream())) {
                for (int i = 0; i < 8; i++) {
                    Batch first = Harness.random(SHAPE, new int[] {9, 0, 24, 1}[i % 4], 191 + i);
                    Batch second = Harness.random(SHAPE, 5 * (i % 3), 291 + i);
                    float[][] wantFirst = layer.run(first);
                    float[][] wantSecond = layer.run(second);
                    layer.write(List.of(first));
                    other.write(second);
                    if (i % 2 == 0) {
                        overlap.enqueue(stream());
                    } else {
                        graph.launch(stream());
                    }
                    layer.layer.synchronize(stream());
                    float[][] gotFirst = layer.outputs()[0];
                    float[][] gotSecond = other.outputs();
                    for (int t = 0; t < first.tokens(); t++) {
                        assertSameBits(gotFirst[t], wantFirst[t], i + ", first " + t);
                    }
                    for (int t = 0; t < second.tokens(); t++) {
                        assertSameBits(gotSecond[t], wantSecond[t], i + ", second " + t);
                    }
                }
                overlap.close();
                assertThatThrownBy(() -> overlap.enqueue(stream()))
                        .isInstanceOf(IllegalStateException.class)
                        .hasMessage("the schedule is closed: make a new one");
            }
            assertThatThrownBy(() -> TwoBatchOverlap.of(layer.step(), layer.step()))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("both steps use handle 0");
        }
    }

    @Test
    void shouldExplainMisuseBeforeTouchingAnything() {
        MoeConfig config = config(SHAPE, 161).ranks(2).build();
        MoeLayer layer = Moe.open(config);
        assertThatThrownBy(() -> layer.bind(List.of()))
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("prepare");
        layer.prepare();
        assertThatThrownBy(() -> layer.bind(List.of()))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("ranks=2");
        layer.close();
        layer.close();
        assertThatThrownBy(layer::prepare)
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("closed");
        assertThatThrownBy(() -> layer.bind(List.of())).isInstanceOf(IllegalStateException.class);
    }

    static List<Batch> batches(Batch all, int[][] where) {
        List<Batch> batches = new ArrayList<>();
        for (int[] tokens : where) {
            batches.add(all.permuted(tokens));
        }
        return batches;
    }

    static float[][] gather(float[][][] out, int[][] where, int tokens) {
        float[][] rows = new float[tokens][];
        for (int r = 0; r < where.length; r++) {
            for (int i = 0; i < where[r].length; i++) {
                rows[where[r][i]] = out[r][i];
            }
        }
        return rows;
    }

    private static float[] constant(float value) {
        float[] row = new float[SHAPE.hidden()];
        java.util.Arrays.fill(row, value);
        return row;
    }
}
