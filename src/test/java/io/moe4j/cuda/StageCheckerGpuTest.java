package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.FaultyLayer;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Stage;
import io.moe4j.checker.StageChecker;
import io.moe4j.checker.StageDifference;
import io.moe4j.checker.StageReport;
import io.moe4j.checker.StepInput;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.model.Activation;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.tensor.DType;
import java.util.ArrayList;
import java.util.List;
import java.util.SplittableRandom;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.TestFactory;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Every stage on the GPU agrees with the CPU backend, and a corrupted device buffer is named. */
@EnabledIfCuda
class StageCheckerGpuTest {
    private static final MoeShape SMALL = new MoeShape(64, 48, 12, 4, 32);
    private static final int M = 8;
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    @ParameterizedTest
    @CsvSource({
        // H, I, E, K, shared, ranks, M, hidden, input, rule
        "64, 48, 12, 4, 0, 1, 16, BF16, TOPK, softmax",
        "100, 72, 12, 4, 40, 3, 24, F32, TOPK, softmax",
        "128, 96, 8, 2, 0, 2, 70, F16, LOGITS, topk",
        "256, 128, 16, 8, 64, 4, 33, BF16, HIDDEN, softmax",
        "256, 128, 16, 4, 128, 8, 9, F32, HIDDEN, sigmoid",
        "192, 96, 8, 4, 0, 1, 130, BF16, HIDDEN, topk",
        "2048, 768, 32, 8, 0, 2, 64, BF16, HIDDEN, softmax",
        "4100, 200, 10, 3, 72, 5, 7, F32, LOGITS, sigmoid"
    })
    void shouldAgreeWithTheCpuInEveryStage(
            int h,
            int i,
            int e,
            int k,
            int shared,
            int ranks,
            int m,
            DType hidden,
            RoutingInput input,
            String rule) {
        MoeShape shape = new MoeShape(h, i, e, k, shared);
        RandomWeights weights = RandomWeights.of(shape, 31).withCorrectionBias();
        boolean biased = rule.equals("topk");
        MoeConfig config =
                MoeConfig.builder()
                        .weights(biased ? weights.withBias() : weights.withSharedGate())
                        .rule(
                                switch (rule) {
                                    case "softmax" -> RoutingRule.softmaxTopK(true);
                                    case "topk" -> RoutingRule.topKSoftmax();
                                    default -> RoutingRule.sigmoidGrouped(2, 1, true, 2.5f);
                                })
                        .activation(
                                biased ? Activation.clampedSwiGlu(1.702f, 7f) : Activation.swiGlu())
                        .routingInput(input)
                        .hiddenDType(hidden)
                        .ranks(ranks)
                        .maxTokensPerRank(m)
                        .backend("cuda")
                        .build();
        try (StageChecker checker =
                new StageChecker(
                        prepared(config),
                        prepared(config.toBuilder().backend("cpu").build()),
                        gpu.stream(),
                        Checker.CUDA_TOLERANCE)) {
            SplittableRandom random = new SplittableRandom(h);
            for (int step = 0; step < 4; step++) {
                List<StepInput> inputs = new ArrayList<>();
                for (int rank = 0; rank < ranks; rank++) {
                    int tokens =
                            switch ((step + rank) % 4) {
                                case 0 -> m;
                                case 1 -> 0;
                                case 2 -> 1;
                                default -> random.nextInt(m + 1);
                            };
                    inputs.add(random(shape, input, tokens, 100L * step + rank));
                }
                StageReport report = checker.check(inputs);
                assertThat(report.pass()).as("step %d: %s", step, report).isTrue();
                assertThat(report.stagesAgreeing()).isEqualTo(shared > 0 ? 17 : 16);
            }
        }
    }

    private static StepInput random(MoeShape shape, RoutingInput input, int tokens, long seed) {
        Batch batch = Harness.random(shape, tokens, seed);
        SplittableRandom random = new SplittableRandom(~seed);
        int h = shape.hidden();
        int k = shape.topK();
        float[] hidden = new float[tokens * h];
        int[] ids = new int[tokens * k];
        float[] weights = new float[tokens * k];
        float[] logits = new float[tokens * shape.experts()];
        for (int t = 0; t < tokens; t++) {
            System.arraycopy(batch.hidden()[t], 0, hidden, t * h, h);
            System.arraycopy(batch.ids()[t], 0, ids, t * k, k);
            System.arraycopy(batch.weights()[t], 0, weights, t * k, k);
            if (t % 5 == 1) {
                ids[t * k] = 1 << 20; // dropped
                ids[t * k + k - 1] = ids[t * k + 1]; // named twice
            }
        }
        for (int j = 0; j < logits.length; j++) {
            logits[j] = (float) random.nextDouble(-4, 4);
        }
        return switch (input) {
            case TOPK -> StepInput.topk(tokens, hidden, ids, weights);
            case LOGITS -> StepInput.logits(tokens, hidden, logits);
            case HIDDEN -> StepInput.hidden(tokens, hidden);
        };
    }

    /** A device buffer to damage once a stage is done: bytes from an offset on. */
    private record Damage(Stage stage, String buffer, long offset, int bytes, int expert) {}

    @TestFactory
    Stream<DynamicTest> shouldNameTheStageOfADamagedDeviceBuffer() {
        // token 0 of rank 0 visits experts 0 and 1 on rank 0: its rows are first in every buffer
        return Stream.of(
                        new Damage(Stage.TOKENS, "home_tokens", 0, 4, -1),
                        new Damage(Stage.EXPERT_IDS, "home_ids", 4, 4, 7),
                        new Damage(Stage.ROUTING_WEIGHTS, "home_weights", 8, 4, -1),
                        new Damage(Stage.RECEIVED_TOKENS, "recv_tokens", 0, 4, -1),
                        new Damage(Stage.RECEIVED_IDS, "recv_ids", 8, 4, 1),
                        new Damage(Stage.RECEIVED_WEIGHTS, "recv_weights", 0, 4, -1),
                        new Damage(Stage.RECEIVED_ROWS, "recv_rows", 10, 2, -1),
                        new Damage(Stage.EXPERT_COUNTS, "expert_counts", 0, 4, 0),
                        new Damage(Stage.EXPERT_OFFSETS, "expert_offsets", 4, 4, 1),
                        new Damage(Stage.ROW_LISTS, "expert_rows", 0, 4, 0),
                        new Damage(Stage.PACKED_ROWS, "packed_row_of", 0, 4, 0),
                        new Damage(Stage.ACTIVATED_ROWS, "activated", 0, 16, 0),
                        new Damage(Stage.EXPERT_OUTPUTS, "expert_out", 2, 16, 0),
                        new Damage(Stage.COMBINED_ROWS, "combine_rows", 32, 16, -1),
                        new Damage(Stage.SHARED_OUTPUT, "shared_out", 0, 32, -1))
                .map(damage -> DynamicTest.dynamicTest(damage.buffer(), () -> find(damage)));
    }

    private static void find(Damage damage) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SMALL, 7))
                        .backend("cuda")
                        .maxTokensPerRank(M)
                        .ranks(2)
                        .build();
        CudaLayer layer = (CudaLayer) prepared(config);
        MoeLayer faulty =
                FaultyLayer.after(damage.stage().phase(), layer, t -> overwrite(layer, damage));
        try (StageChecker checker =
                new StageChecker(
                        faulty,
                        prepared(config.toBuilder().backend("cpu").build()),
                        gpu.stream(),
                        Checker.CUDA_TOLERANCE)) {
            List<StepInput> inputs = new ArrayList<>();
            for (int rank = 0; rank < 2; rank++) {
                Batch batch = Harness.random(SMALL, 3, 50 + rank);
                float[] hidden = new float[3 * 64];
                int[] ids = new int[3 * 4];
                float[] weights = new float[3 * 4];
                for (int t = 0; t < 3; t++) {
                    System.arraycopy(batch.hidden()[t], 0, hidden, t * 64, 64);
                    System.arraycopy(batch.weights()[t], 0, weights, t * 4, 4);
                    int[] chosen = rank + t == 0 ? new int[] {0, 7, 1, 8} : new int[] {2, 9, 3, 10};
                    System.arraycopy(chosen, 0, ids, t * 4, 4);
                }
                inputs.add(StepInput.topk(3, hidden, ids, weights));
            }
            StageDifference found = checker.check(inputs).firstDifference().orElseThrow();
            String line = found.toString();
            System.out.println("DAMAGE " + damage.buffer() + " -> " + line);
            assertThat(found.stage()).as(line).isEqualTo(damage.stage());
            assertThat(found.rank()).as(line).isZero();
            assertThat(found.expert()).as(line).isEqualTo(damage.expert());
            if (found.token() >= 0) {
                assertThat(found.token()).as(line).isZero();
                assertThat(found.sourceRank()).as(line).isZero();
            }
        }
    }

    /** Fills with 0x41: a large int, 12.08 as float, 12.06 as bfloat16. */
    private static void overwrite(CudaLayer layer, Damage damage) {
        CudaHandle handle = layer.handle(0);
        long base = handle.workspace(0, damage.buffer());
        if (base == 0) {
            base = handle.symmetric(0, damage.buffer());
        }
        layer.synchronize(gpu.stream());
        try (Scope scope = gpu.context.enter()) {
            gpu.driver.memsetD8(base + damage.offset(), (byte) 0x41, damage.bytes());
            gpu.driver.contextSynchronize();
        }
    }

    private static MoeLayer prepared(MoeConfig config) {
        MoeLayer layer = Moe.open(config);
        layer.prepare();
        return layer;
    }
}
