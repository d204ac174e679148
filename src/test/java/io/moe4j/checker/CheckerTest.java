package io.moe4j.checker;

import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import java.io.IOException;
import java.util.List;
import java.util.OptionalDouble;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Whether the checker sees a difference, wherever it is put into an otherwise right reference. */
class CheckerTest {
    private static final int TOKENS = 7;
    private static final MoeShape SHAPE = new MoeShape(40, 24, 9, 3, 16);
    private static final MoeConfig CONFIG =
            MoeConfig.builder()
                    .weights(RandomWeights.of(SHAPE, 3).withSharedGate())
                    .rule(RoutingRule.softmaxTopK(true))
                    .routingInput(RoutingInput.HIDDEN)
                    .backend("cpu")
                    .threads(2)
                    .build();
    private static final ReferenceCase RIGHT =
            Float64Oracle.of(CONFIG)
                    .expect(0, Checker.randomHidden(8, 0, TOKENS, SHAPE.hidden()), TOKENS);

    @ParameterizedTest
    @ValueSource(ints = {1, 2, 3, 4, 9, 12})
    void shouldPassARightReferenceOnAnyNumberOfRanks(int ranks) {
        CaseResult result = check(RIGHT, ranks);
        assertThat(result.pass()).as(result.failure()).isTrue();
        assertThat(result.failure()).isEmpty();
        assertThat(result.routingAgreeing()).isEqualTo(TOKENS);
        assertThat(result.routed().max()).isPositive();
    }

    @Test
    void shouldIgnoreTheOrderOfATokensExperts() {
        int[] ids = RIGHT.routing().ids().clone();
        float[] weights = RIGHT.routing().weights().clone();
        swap(ids, weights, 3, 5);
        assertThat(check(with(ids, weights), 2).pass()).isTrue();
    }

    @Test
    void shouldNameBothExpertsAndTheirGapWhereRoutingDiffers() {
        int[] ids = RIGHT.routing().ids().clone();
        int real = ids[4 * SHAPE.topK()];
        int absent = absentExpert(RIGHT.routing().sortedIds(4));
        ids[4 * SHAPE.topK()] = absent;
        CaseResult result = check(with(ids, RIGHT.routing().weights()), 2);
        assertThat(result.pass()).isFalse();
        assertThat(result.routingAgreeing()).isEqualTo(TOKENS - 1);
        RoutingMismatch mismatch = result.routingMismatches().get(0);
        assertThat(mismatch.token()).isEqualTo(4);
        assertThat(mismatch.missing()).isEqualTo(absent);
        assertThat(mismatch.unexpected()).isEqualTo(real);
        assertThat(mismatch.scoreGap()).isNegative();
        assertThat(result.failure()).contains("routing of token 4: expert " + absent);
    }

    @Test
    void shouldSeeAWrongRoutingWeight() {
        float[] weights = RIGHT.routing().weights().clone();
        weights[10] *= 1.001f;
        CaseResult result = check(with(RIGHT.routing().ids(), weights), 1);
        assertThat(result.pass()).isFalse();
        assertThat(result.failure()).contains("routing weights off");
    }

    @Test
    void shouldTellTheRoutedOutputFromTheFullOne() {
        double[] wrong = RIGHT.routed().clone();
        wrong[6 * SHAPE.hidden()] += 0.1;
        CaseResult routed = check(outputs(wrong, RIGHT.full()), 3);
        assertThat(routed.pass()).isFalse();
        assertThat(routed.failure()).startsWith("routed output off").endsWith("at token 6");

        wrong = RIGHT.full().clone();
        wrong[2 * SHAPE.hidden()] = Double.NaN;
        CaseResult full = check(outputs(RIGHT.routed(), wrong), 3);
        assertThat(full.full()).isEqualTo(new TokenErrors(Double.POSITIVE_INFINITY, 2));
        assertThat(full.worstToken()).isEqualTo(2);
    }

    @Test
    void shouldReportFailuresAsTextAndJson() throws IOException {
        double[] wrong = RIGHT.full().clone();
        wrong[0] = Double.NaN;
        CheckReport report =
                new CheckReport(
                        "layer",
                        List.of(check(RIGHT, 1), check(outputs(RIGHT.routed(), wrong), 1)));
        assertThat(report.pass()).isFalse();
        assertThat(report.failures()).hasSize(1);
        assertThat(report.table()).contains("7/7", "ok", "MISMATCH", "repeat: again R=1 cpu");
        assertThat(report.verdict()).contains("1 of 2 cases agree").contains("inf");
        JsonNode json = new ObjectMapper().readTree(report.toJson());
        assertThat(json.get("pass").asBoolean()).isFalse();
        assertThat(json.get("cases").get(1).get("full").get("max").asText()).isEqualTo("Infinity");
    }

    @Test
    void shouldFailWhenRowsPastTheTokenCountWereWritten() {
        TokenErrors none = new TokenErrors(0, 0);
        CaseResult result =
                new CaseResult(
                        0, 1, 1, "cpu", "oracle", 1, List.of(), 0, none, none, 1e-5, false, true,
                        "");
        assertThat(result.pass()).isFalse();
        assertThat(result.failure()).isEqualTo("rows past the token count were written");
    }

    @Test
    void shouldFailWhenABitDiffersFromVirtualRanks() {
        TokenErrors none = new TokenErrors(0, 0);
        CaseResult result =
                new CaseResult(
                        0, 1, 2, "cuda", "golden", 1, List.of(), 0, none, none, 6e-3, true, true,
                        "");
        assertThat(result.against(true).pass()).isTrue();
        assertThat(result.against(false).pass()).isFalse();
        assertThat(result.against(false).failure())
                .isEqualTo("bits differ from those of virtual ranks on one GPU");
    }

    @Test
    void shouldNotPassWithoutCases() {
        assertThat(new CheckReport("nothing", List.of()).pass()).isFalse();
    }

    @Test
    void shouldSpreadTokensEvenlyAndLeaveLateRanksEmpty() {
        assertThat(LayerHarness.spread(7, 3)).containsExactly(3, 2, 2);
        assertThat(LayerHarness.spread(1, 4)).containsExactly(1, 0, 0, 0);
        assertThat(LayerHarness.maxTokensPerRank(7, 3)).isEqualTo(3);
        assertThat(LayerHarness.maxTokensPerRank(0, 3)).isEqualTo(1);
    }

    private static CaseResult check(ReferenceCase reference, int ranks) {
        return new Checker(OptionalDouble.empty())
                .check(
                        CONFIG,
                        List.of(reference),
                        ranks,
                        (r, count, backend) -> "again R=" + count + " " + backend,
                        ProgressListener.NONE)
                .get(0);
    }

    private static ReferenceCase with(int[] ids, float[] weights) {
        Routing routing = new Routing(TOKENS, SHAPE.topK(), ids, weights);
        return new ReferenceCase(
                0, "changed", TOKENS, RIGHT.hidden(), routing, RIGHT.routed(), RIGHT.full());
    }

    private static ReferenceCase outputs(double[] routed, double[] full) {
        return new ReferenceCase(
                0, "changed", TOKENS, RIGHT.hidden(), RIGHT.routing(), routed, full);
    }

    private static int absentExpert(int[] ids) {
        int expert = 0;
        for (int id : ids) {
            if (id == expert) {
                expert++;
            }
        }
        return expert;
    }

    private static void swap(int[] ids, float[] weights, int a, int b) {
        int id = ids[a];
        ids[a] = ids[b];
        ids[b] = id;
        float weight = weights[a];
        weights[a] = weights[b];
        weights[b] = weight;
    }
}
