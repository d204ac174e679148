package io.moe4j.checker;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.within;

import io.moe4j.model.Activation;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import org.assertj.core.data.Offset;
import org.junit.jupiter.api.Test;

class Float64OracleTest {
    private static final Offset<Double> EXACT = within(1e-12);
    private static final Offset<Float> FLOAT = within(1e-7f);
    private static final float LN2 = (float) Math.log(2);
    private static final float LN3 = (float) Math.log(3);

    /** silu(1): what each expert of a TinyLayer makes of x = 1, before its factor. */
    private static final double SILU_1 = 1 / (1 + Math.exp(-1));

    @Test
    void shouldKeepSoftmaxProbabilitiesWithoutRenormalising() {
        // exp(logits) = 1, 3, 2, 2: probabilities 1/8, 3/8, 2/8, 2/8
        Routing routing =
                route(TinyLayer.of(4, 2), RoutingRule.softmaxTopK(false), 0, LN3, LN2, LN2);
        assertThat(routing.ids()).containsExactly(1, 2);
        assertThat(routing.weights()).containsExactly(new float[] {3 / 8f, 2 / 8f}, FLOAT);
    }

    @Test
    void shouldRenormaliseTheChosenProbabilities() {
        Routing routing =
                route(TinyLayer.of(4, 2), RoutingRule.softmaxTopK(true), 0, LN3, LN2, LN2);
        assertThat(routing.weights()).containsExactly(new float[] {3 / 5f, 2 / 5f}, FLOAT);
    }

    @Test
    void shouldTakeTheSoftmaxOverTheChosenLogitsOnly() {
        Routing routing = route(TinyLayer.of(3, 2), RoutingRule.topKSoftmax(), LN2, -50, LN3);
        assertThat(routing.ids()).containsExactly(2, 0);
        assertThat(routing.weights()).containsExactly(new float[] {3 / 5f, 2 / 5f}, FLOAT);
    }

    @Test
    void shouldTakeTheLowestIdFirstWhereScoresTie() {
        for (RoutingRule rule :
                new RoutingRule[] {
                    RoutingRule.softmaxTopK(true),
                    RoutingRule.topKSoftmax(),
                    RoutingRule.sigmoidGrouped(1, 1, true, 1)
                }) {
            assertThat(route(TinyLayer.of(5, 3), rule, 1, 2, 1, 1, 2).ids())
                    .as(rule.toString())
                    .containsExactly(1, 4, 0);
        }
    }

    @Test
    void shouldRankNanBelowEveryNumber() {
        Routing routing =
                route(TinyLayer.of(3, 2), RoutingRule.topKSoftmax(), Float.NaN, -1e30f, -5);
        assertThat(routing.ids()).containsExactly(2, 1);
    }

    @Test
    void shouldChooseByBiasedScoreButWeighByTheScoreItself() {
        // sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4; the bias lifts expert 0 above expert 1
        Routing routing =
                route(
                        TinyLayer.of(3, 2).withCorrectionBias(1, 0, 0),
                        RoutingRule.sigmoidGrouped(1, 1, false, 2),
                        0,
                        LN3,
                        -LN3);
        assertThat(routing.ids()).containsExactly(0, 1);
        assertThat(routing.weights()).containsExactly(new float[] {1, 1.5f}, FLOAT);
    }

    @Test
    void shouldRenormaliseSigmoidWeightsBeforeScaling() {
        Routing routing =
                route(
                        TinyLayer.of(3, 2),
                        RoutingRule.sigmoidGrouped(1, 1, true, 2.5f),
                        0,
                        LN3,
                        -LN3);
        assertThat(routing.ids()).containsExactly(1, 0);
        assertThat(routing.weights()).containsExactly(new float[] {1.5f, 1f}, FLOAT);
    }

    @Test
    void shouldRankGroupsByTheSumOfTheirTwoBestAndExcludeTheOthers() {
        // group 0 holds the single best expert, group 1 the better pair
        Routing routing =
                route(
                        TinyLayer.of(6, 2),
                        RoutingRule.sigmoidGrouped(2, 1, false, 1),
                        3,
                        -3,
                        -3,
                        1,
                        -9,
                        2);
        assertThat(routing.ids()).containsExactly(5, 3);
    }

    @Test
    void shouldTakeTheLowestGroupFirstWhereGroupsTie() {
        Routing routing =
                route(
                        TinyLayer.of(6, 2),
                        RoutingRule.sigmoidGrouped(3, 1, false, 1),
                        -1,
                        -1,
                        1,
                        2,
                        2,
                        1);
        assertThat(routing.ids()).containsExactly(3, 2);
    }

    @Test
    void shouldNeverChooseFromAClosedGroupEvenIfAllOpenScoresAreNan() {
        Routing routing =
                route(
                        TinyLayer.of(4, 2).withCorrectionBias(9, Float.NaN, Float.NaN, Float.NaN),
                        RoutingRule.sigmoidGrouped(2, 1, false, 1),
                        0,
                        0,
                        0,
                        0);
        assertThat(routing.sortedIds(0)).containsExactly(0, 1);
    }

    @Test
    void shouldAddTheRouterBiasToTheLogits() {
        Float64Oracle oracle =
                oracle(TinyLayer.of(3, 1).withRouterBias(0.5f, 0, -10), RoutingRule.topKSoftmax());
        assertThat(oracle.logits(new float[] {1, -2}, 2))
                .containsExactly(1.5f, 2, -7, -1.5f, -4, -16);
    }

    @Test
    void shouldSumTheWeightedExperts() {
        // expert e returns (e + 1) · silu(1) for x = 1
        Routing routing = new Routing(1, 2, new int[] {2, 0}, new float[] {0.5f, 0.25f});
        double[] output = plain(TinyLayer.of(3, 2)).routed(new float[] {1}, routing);
        assertThat(output[0]).isCloseTo((0.5 * 3 + 0.25) * SILU_1, EXACT);
    }

    @Test
    void shouldSkipInvalidIdsAndCountDuplicatesTwice() {
        Routing routing =
                new Routing(
                        2,
                        3,
                        new int[] {-1, 1, 1, 7, 0, Integer.MIN_VALUE},
                        new float[] {9, 0.5f, 0.25f, 9, 1, 9});
        double[] output = plain(TinyLayer.of(3, 3)).routed(new float[] {1, 1}, routing);
        assertThat(output[0]).isCloseTo(0.75 * 2 * SILU_1, EXACT);
        assertThat(output[1]).isCloseTo(SILU_1, EXACT);
    }

    @Test
    void shouldApplyExpertBiasesInsideAndAfterTheActivation() {
        // x = 1: gate 1 + 1, up 1 + 2, down bias 4, all times the routing weight
        Routing routing = new Routing(1, 1, new int[] {1}, new float[] {0.5f});
        double[] output =
                plain(TinyLayer.of(2, 1).withExpertBias(1, 2, 4)).routed(new float[] {1}, routing);
        double silu2 = 2 / (1 + Math.exp(-2));
        assertThat(output[0]).isCloseTo(0.5 * (2 * silu2 * 3 + 4), EXACT);
    }

    @Test
    void shouldClampGateFromAboveAndUpOnBothSides() {
        Float64Oracle oracle =
                new Float64Oracle(
                        TinyLayer.of(1, 1).withExpertBias(0, 0, 0),
                        null,
                        Activation.clampedSwiGlu(2, 3));
        Routing routing = new Routing(3, 1, new int[] {0, 0, 0}, new float[] {1, 1, 1});
        double[] output = oracle.routed(new float[] {1, 10, -10}, routing);
        assertThat(output[0]).isCloseTo(2 * 1 / (1 + Math.exp(-2)), EXACT);
        assertThat(output[1]).isCloseTo(4 * 3 / (1 + Math.exp(-6)), EXACT);
        assertThat(output[2]).isCloseTo(-2 * -10 / (1 + Math.exp(20)), EXACT);
    }

    @Test
    void shouldAddTheSharedExpertWithItsGate() {
        assertThat(plain(TinyLayer.of(1, 1)).shared(new float[] {1}, 1)).containsExactly(0);
        double[] plain = plain(TinyLayer.of(1, 1).withShared(5, 0)).shared(new float[] {1}, 1);
        assertThat(plain[0]).isCloseTo(5 * SILU_1, EXACT);
        double[] gated = plain(TinyLayer.of(1, 1).withShared(5, 2)).shared(new float[] {1}, 1);
        assertThat(gated[0]).isCloseTo(5 * SILU_1 / (1 + Math.exp(-2)), EXACT);
    }

    @Test
    void shouldTreatEveryTokenOnItsOwn() {
        MoeShape shape = new MoeShape(24, 20, 7, 3, 12);
        Float64Oracle oracle =
                oracle(
                        RandomWeights.of(shape, 5).withBias().withSharedGate(),
                        RoutingRule.softmaxTopK(true));
        int tokens = 9;
        float[] hidden = Checker.randomHidden(11, 0, tokens, shape.hidden());
        ReferenceCase all = oracle.expect(0, hidden, tokens);
        for (int token = 0; token < tokens; token++) {
            int from = token * shape.hidden();
            float[] row = new float[shape.hidden()];
            System.arraycopy(hidden, from, row, 0, row.length);
            ReferenceCase alone = oracle.expect(0, row, 1);
            double[] expected = new double[row.length];
            System.arraycopy(all.full(), from, expected, 0, row.length);
            assertThat(alone.full()).containsExactly(expected);
            assertThat(alone.routing().sortedIds(0)).isEqualTo(all.routing().sortedIds(token));
        }
    }

    private static Routing route(TinyLayer layer, RoutingRule rule, float... logits) {
        return oracle(layer, rule).route(logits, 1);
    }

    private static Float64Oracle plain(TinyLayer layer) {
        return oracle(layer, null);
    }

    private static Float64Oracle oracle(LayerWeights layer, RoutingRule rule) {
        return new Float64Oracle(layer, rule, Activation.swiGlu());
    }
}
