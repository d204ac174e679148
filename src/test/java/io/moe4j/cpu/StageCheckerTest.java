package io.moe4j.cpu;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.FaultyLayer;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.checker.Stage;
import io.moe4j.checker.StageChecker;
import io.moe4j.checker.StageDifference;
import io.moe4j.checker.StageReport;
import io.moe4j.checker.StepInput;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import java.lang.reflect.Proxy;
import java.util.ArrayList;
import java.util.List;
import java.util.OptionalDouble;
import java.util.function.BiConsumer;
import java.util.stream.Stream;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestFactory;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** The stage checker on two CPU layers, one of them with a planted fault. */
class StageCheckerTest {
    private static final MoeShape SHAPE = new MoeShape(64, 48, 12, 4, 32);
    private static final int H = 64;
    private static final int K = 4;
    private static final int M = 8;

    /** A fault behind a phase, and the difference it has to be reported as. */
    private record Plant(
            Stage stage,
            BiConsumer<CpuLayer, List<StepTensors>> fault,
            int rank,
            int sourceRank,
            int token,
            int k,
            int expert) {}

    private static MoeConfig.Builder config(LayerWeights weights) {
        return MoeConfig.builder()
                .weights(weights)
                .backend("cpu")
                .hiddenDType(DType.F32)
                .maxTokensPerRank(M)
                .ranks(2)
                .threads(2);
    }

    /**
     * Five tokens on rank 0, three on rank 1; token 0 of rank 0 visits experts 0, 7, 1 and 8, of
     * which 0 and 1 live on rank 0, and no other token visits expert 0.
     */
    private static List<StepInput> inputs() {
        List<StepInput> inputs = new ArrayList<>();
        for (int rank = 0; rank < 2; rank++) {
            Batch batch = Harness.random(SHAPE, rank == 0 ? 5 : 3, 40 + rank);
            float[] hidden = new float[batch.tokens() * H];
            int[] ids = new int[batch.tokens() * K];
            float[] weights = new float[batch.tokens() * K];
            for (int t = 0; t < batch.tokens(); t++) {
                System.arraycopy(batch.hidden()[t], 0, hidden, t * H, H);
                System.arraycopy(batch.weights()[t], 0, weights, t * K, K);
                int[] chosen = rank + t == 0 ? new int[] {0, 7, 1, 8} : new int[] {2, 9, 3, 10};
                System.arraycopy(chosen, 0, ids, t * K, K);
            }
            inputs.add(StepInput.topk(batch.tokens(), hidden, ids, weights));
        }
        return inputs;
    }

    @TestFactory
    Stream<DynamicTest> shouldNameTheStageTokenAndExpertOfAPlantedFault() {
        List<Plant> plants =
                List.of(
                        new Plant(Stage.TOKENS, (l, t) -> l.rank(1).tokens--, 1, -1, -1, -1, -1),
                        new Plant(
                                Stage.EXPERT_IDS,
                                (l, t) -> l.rank(1).topkIds[2 * K + 3] = 4,
                                1,
                                1,
                                2,
                                3,
                                10),
                        new Plant(
                                Stage.ROUTING_WEIGHTS,
                                (l, t) -> l.rank(0).topkWeights[4 * K + 1] *= 1.01f,
                                0,
                                0,
                                4,
                                -1,
                                -1),
                        new Plant(
                                Stage.RECEIVED_TOKENS,
                                (l, t) -> l.rank(1).recvTokens[0]--,
                                1,
                                0,
                                -1,
                                -1,
                                -1),
                        new Plant(
                                Stage.RECEIVED_IDS,
                                (l, t) -> l.rank(1).recvIds[0][3 * K + 1] = 5,
                                1,
                                0,
                                3,
                                1,
                                9),
                        new Plant(
                                Stage.RECEIVED_WEIGHTS,
                                (l, t) -> l.rank(0).recvWeights[1][K] = 2,
                                0,
                                1,
                                1,
                                -1,
                                -1),
                        new Plant(
                                Stage.RECEIVED_ROWS,
                                (l, t) -> l.rank(1).recvRows[0][2 * H + 7] += 0x1p-18f,
                                1,
                                0,
                                2,
                                -1,
                                -1),
                        new Plant(
                                Stage.EXPERT_COUNTS,
                                (l, t) -> l.rank(1).expertCounts[3]--,
                                1,
                                -1,
                                -1,
                                -1,
                                9),
                        new Plant(
                                Stage.EXPERT_OFFSETS,
                                (l, t) -> l.rank(0).expertOffsets[2]++,
                                0,
                                -1,
                                -1,
                                -1,
                                2),
                        new Plant(
                                Stage.ROW_LISTS,
                                (l, t) -> l.rank(0).expertRows[0] = 3,
                                0,
                                0,
                                0,
                                -1,
                                0),
                        new Plant(
                                Stage.PACKED_ROWS,
                                (l, t) -> l.rank(1).packedRowOf[(M + 1) * K + 3] = -1,
                                1,
                                1,
                                1,
                                3,
                                10),
                        new Plant(
                                Stage.EXPERT_OUTPUTS,
                                (l, t) -> l.rank(0).expertOut.chunk(1)[H + 5] = Float.NaN,
                                0,
                                0,
                                0,
                                -1,
                                1),
                        new Plant(
                                Stage.COMBINED_ROWS,
                                (l, t) -> l.rank(0).combineRows[1][4 * H + 9] += 1,
                                1,
                                0,
                                4,
                                -1,
                                -1),
                        new Plant(
                                Stage.SHARED_OUTPUT,
                                (l, t) -> l.rank(1).sharedOut[2 * H + 1] += 1,
                                1,
                                1,
                                2,
                                -1,
                                -1),
                        new Plant(
                                Stage.OUTPUT,
                                (l, t) -> t.get(1).out().setFloat(H + 3, 1e6f),
                                1,
                                1,
                                1,
                                -1,
                                -1),
                        new Plant(
                                Stage.PADDING,
                                (l, t) -> t.get(0).out().setFloat(5 * H + 3, 0),
                                0,
                                0,
                                5,
                                -1,
                                -1));
        return plants.stream()
                .map(plant -> DynamicTest.dynamicTest(plant.stage().title(), () -> find(plant)));
    }

    private static void find(Plant plant) {
        MoeConfig config = config(RandomWeights.of(SHAPE, 7)).build();
        CpuLayer layer = prepared(config);
        MoeLayer faulty =
                FaultyLayer.after(
                        plant.stage().phase(), layer, t -> plant.fault().accept(layer, t));
        try (StageChecker checker = new StageChecker(faulty, prepared(config), 0L, 1e-5)) {
            StageReport report = checker.check(inputs());
            StageDifference found = report.firstDifference().orElseThrow();
            String line = found.toString();
            assertThat(found.stage()).as(line).isEqualTo(plant.stage());
            assertThat(report.stagesAgreeing()).as(line).isEqualTo(plant.stage().ordinal());
            assertThat(found.rank()).as(line).isEqualTo(plant.rank());
            assertThat(found.sourceRank()).as(line).isEqualTo(plant.sourceRank());
            assertThat(found.token()).as(line).isEqualTo(plant.token());
            assertThat(found.k()).as(line).isEqualTo(plant.k());
            assertThat(found.expert()).as(line).isEqualTo(plant.expert());
            assertThat(line)
                    .startsWith(plant.stage().title() + " (" + plant.stage().phase() + ") on rank ")
                    .contains("seen ", "expected ");
            assertThatThrownBy(() -> checker.check(inputs()))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("open a new StageChecker");
        }
    }

    @Test
    void shouldTellTheGateFromTheDownProjectionOfAnExpert() {
        MoeConfig right = config(RandomWeights.of(SHAPE, 7)).build();
        for (String matrix : List.of("gate", "up", "down")) {
            MoeConfig wrong = config(withWrong(RandomWeights.of(SHAPE, 7), 9, matrix)).build();
            try (StageChecker checker =
                    new StageChecker(prepared(wrong), prepared(right), 0L, 1e-5)) {
                StageDifference found = checker.check(inputs()).firstDifference().orElseThrow();
                assertThat(found.stage())
                        .as(found.toString())
                        .isEqualTo(
                                matrix.equals("down")
                                        ? Stage.EXPERT_OUTPUTS
                                        : Stage.ACTIVATED_ROWS);
                assertThat(found.expert()).isEqualTo(9);
                assertThat(found.rank()).isEqualTo(1);
                assertThat(found.token()).isEqualTo(1);
                assertThat(found.sourceRank()).isZero();
                assertThat(found.error()).isGreaterThan(1e-5);
            }
        }
    }

    /** The same weights with one value of one matrix of one expert changed. */
    private static LayerWeights withWrong(LayerWeights weights, int expert, String matrix) {
        return (LayerWeights)
                Proxy.newProxyInstance(
                        LayerWeights.class.getClassLoader(),
                        new Class<?>[] {LayerWeights.class},
                        (proxy, method, args) -> {
                            Object result = method.invoke(weights, args);
                            if (!method.getName().equals("expert") || (int) args[0] != expert) {
                                return result;
                            }
                            ExpertWeights e = (ExpertWeights) result;
                            return ExpertWeights.of(
                                    matrix.equals("gate") ? wrong(e.gate()) : e.gate(),
                                    matrix.equals("up") ? wrong(e.up()) : e.up(),
                                    matrix.equals("down") ? wrong(e.down()) : e.down());
                        });
    }

    private static WeightMatrix wrong(WeightMatrix matrix) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values);
        values[values.length / 2] += 1;
        return WeightMatrix.of(values, matrix.rows(), matrix.cols());
    }

    @ParameterizedTest
    @EnumSource(RoutingInput.class)
    void shouldAgreeWithItselfStepAfterStep(RoutingInput input) {
        MoeConfig config =
                config(RandomWeights.of(SHAPE, 3).withBias().withSharedGate())
                        .routingInput(input)
                        .rule(RoutingRule.softmaxTopK(true))
                        .activation(Activation.clampedSwiGlu(1.702f, 7f))
                        .ranks(3)
                        .build();
        try (StageChecker checker =
                StageChecker.open(config, OptionalDouble.of(0), ProgressListener.NONE)) {
            for (int[] tokens : new int[][] {{0, 0, 0}, {M, 0, 1}, {3, M, 5}}) {
                List<StepInput> inputs = new ArrayList<>();
                for (int rank = 0; rank < 3; rank++) {
                    inputs.add(random(input, tokens[rank], 10 * rank + tokens[rank]));
                }
                StageReport report = checker.check(inputs);
                assertThat(report.toString()).isEqualTo("all 17 stages agree");
            }
        }
    }

    private static StepInput random(RoutingInput input, int tokens, long seed) {
        Batch batch = Harness.random(SHAPE, tokens, seed);
        float[] hidden = new float[tokens * H];
        int[] ids = new int[tokens * K];
        float[] weights = new float[tokens * K];
        float[] logits = new float[tokens * SHAPE.experts()];
        for (int t = 0; t < tokens; t++) {
            System.arraycopy(batch.hidden()[t], 0, hidden, t * H, H);
            System.arraycopy(batch.ids()[t], 0, ids, t * K, K);
            System.arraycopy(batch.weights()[t], 0, weights, t * K, K);
            System.arraycopy(batch.hidden()[t], 0, logits, t * 12, 12);
            ids[t * K] = t == 1 ? 99 : ids[t * K]; // an id to drop
            ids[t * K + 2] = ids[t * K + 1]; // and a duplicate
        }
        return switch (input) {
            case TOPK -> StepInput.topk(tokens, hidden, ids, weights);
            case LOGITS -> StepInput.logits(tokens, hidden, logits);
            case HIDDEN -> StepInput.hidden(tokens, hidden);
        };
    }

    @Test
    void shouldRefuseInspectionOfWhatIsNotThere() {
        MoeConfig config = config(RandomWeights.of(SHAPE, 7)).sharedExpert(false).build();
        CpuLayer layer = prepared(config);
        assertThatThrownBy(() -> layer.inspect(1, 0)).hasMessageContaining("handles=1");
        assertThatThrownBy(() -> layer.inspect(0, 2)).hasMessageContaining("ranks=2");
        var inspection = layer.inspect(0, 0);
        assertThatThrownBy(() -> inspection.sharedOutputs(0, 1))
                .isInstanceOf(IllegalStateException.class);
        layer.close();
        assertThatThrownBy(inspection::tokens).isInstanceOf(IllegalStateException.class);
        assertThatThrownBy(() -> layer.inspect(0, 0)).isInstanceOf(IllegalStateException.class);
    }

    private static CpuLayer prepared(MoeConfig config) {
        CpuLayer layer = (CpuLayer) Moe.open(config);
        layer.prepare();
        return layer;
    }
}
