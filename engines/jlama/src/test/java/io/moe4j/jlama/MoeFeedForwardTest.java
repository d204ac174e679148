package io.moe4j.jlama;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import com.github.tjake.jlama.math.ActivationFunction;
import com.github.tjake.jlama.model.MoEBlock;
import com.github.tjake.jlama.model.functions.FeedForward;
import com.github.tjake.jlama.safetensors.DType;
import com.github.tjake.jlama.tensor.AbstractTensor;
import com.github.tjake.jlama.tensor.FloatBufferTensor;
import com.github.tjake.jlama.tensor.Q8ByteBufferTensor;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.model.WeightMatrix;
import io.moe4j.weights.Checkpoint;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.Optional;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The block alone, against what transformers recorded, beside Jlama's own block. */
class MoeFeedForwardTest {
    private static final int H = Golden.SHAPE.hidden();

    /** Jlama rounds to bfloat16 between the projections where the weights are bfloat16. */
    private static final double ROUNDING = 5e-3;

    @TempDir static Path temporary;
    private static Checkpoint checkpoint;
    private static MoeMixtralModel moe;
    private static MoeMixtralModel own;

    @BeforeAll
    static void load() {
        Path folder = TinyMixtral.adapt(Golden.folder(), temporary.resolve("golden"));
        checkpoint = Checkpoint.open(folder);
        // 5 tokens at most: 8 and 37 take several steps
        moe =
                MoeMixtralModel.load(
                        folder, config -> config.backend("cpu").threads(2).maxTokensPerRank(5));
        own = MoeMixtralModel.load(folder, DType.F32, DType.F32, MoeFeedForwardTest::ownBlock);
    }

    @AfterAll
    static void close() {
        moe.close();
        own.close();
        checkpoint.close();
    }

    /** Jlama's block over Jlama's weights, as its MixtralModel makes it. */
    private static MoEBlock ownBlock(MoeMixtralModel model, int layer, MoeConfig.Builder config) {
        String block = "model.layers." + layer + ".block_sparse_moe.";
        return new MoEBlock(
                model,
                Golden.SHAPE.experts(),
                Golden.SHAPE.topK(),
                ActivationFunction.Type.SILU,
                model.getWeights().load(block + "gate.weight"),
                matrices(model, block, ".w1.weight"),
                matrices(model, block, ".w2.weight"),
                matrices(model, block, ".w3.weight"));
    }

    private static AbstractTensor[] matrices(MoeMixtralModel model, String block, String name) {
        return IntStream.range(0, Golden.SHAPE.experts())
                .mapToObj(e -> model.getWeights().load(block + "experts." + e + name))
                .toArray(AbstractTensor[]::new);
    }

    @Test
    void shouldGiveWhatTransformersRecorded() {
        for (DType type : new DType[] {DType.F32, DType.BF16}) {
            for (ReferenceCase golden : Golden.cases()) {
                float[] got = run(moe, golden, type);
                TokenErrors errors = TokenErrors.of(got, golden.full(), golden.tokens(), H);
                System.out.println(
                        "moe4j " + type + " " + golden.tokens() + " tokens " + errors.max());
                assertThat(errors.max()).isLessThan(1e-5);
            }
        }
    }

    /** As in a model that Jlama quantised: activations and weights of 8 bits with scales. */
    @Test
    void shouldTakeQuantisedTensorsByTheirValues() {
        for (ReferenceCase golden : Golden.cases()) {
            AbstractTensor x =
                    new Q8ByteBufferTensor(
                            Golden.tensor(DType.F32, golden.hidden(), golden.tokens()));
            float[] rounded = ReferenceBlock.floats(x);
            assertThat(rounded).isNotEqualTo(golden.hidden());
            double[] want = oracle(golden).expect(golden.layer(), rounded, golden.tokens()).full();
            FeedForward block = moe.blocks().get(golden.layer());
            try (AbstractTensor y = block.forward(x, Optional.empty())) {
                float[] got = ReferenceBlock.floats(y);
                assertThat(TokenErrors.of(got, want, golden.tokens(), H).max()).isLessThan(1e-5);
            }
        }
        AbstractTensor weight =
                new Q8ByteBufferTensor(
                        Golden.tensor(DType.F32, Golden.cases().get(2).hidden(), 37));
        WeightMatrix matrix = JlamaWeights.matrix(weight);
        float[] read = new float[37 * H];
        matrix.read(read);
        assertThat(matrix.rows()).isEqualTo(37);
        assertThat(matrix.cols()).isEqualTo(H);
        assertThat(read).isEqualTo(ReferenceBlock.floats(weight));
    }

    @Test
    void shouldShowThatJlamasBlockDropsTheRoutingWeights() {
        for (ReferenceCase golden : Golden.cases()) {
            if (golden.tokens() == 1) {
                float[] got = run(own, golden, DType.F32);
                double wrong = TokenErrors.of(got, golden.full(), 1, H).max();
                Routing routing = golden.routing();
                float[] ones = new float[routing.ids().length];
                Arrays.fill(ones, 1f);
                double[] unweighted =
                        oracle(golden)
                                .routed(golden.hidden(), new Routing(1, 2, routing.ids(), ones));
                double error = TokenErrors.of(got, unweighted, 1, H).max();
                System.out.println("Jlama 1 token " + wrong + ", unweighted " + error);
                assertThat(wrong).isGreaterThan(0.5);
                assertThat(error).as("the sum without weights").isLessThan(ROUNDING);
            }
        }
    }

    @Test
    void shouldShowThatJlamasBlockWritesTheFirstExpertOfEachTokenToRowZero() {
        for (ReferenceCase golden : Golden.cases()) {
            int tokens = golden.tokens();
            if (tokens == 1) {
                continue;
            }
            float[] got = run(own, golden, DType.F32);
            int right = 0;
            for (int t = 0; t < tokens; t++) {
                right += error(got, golden.full(), t) < 2 * ROUNDING ? 1 : 0;
            }
            System.out.println("Jlama " + tokens + " tokens, rows right: " + right);
            assertThat(right).isZero();
            double[][] alone = {expertAlone(golden, 0), expertAlone(golden, 1)};
            for (int t = 1; t < tokens; t++) {
                assertThat(Math.min(error(got, alone[0], t), error(got, alone[1], t)))
                        .as("row %d has one expert's output only, unweighted", t)
                        .isLessThan(ROUNDING);
            }
            float[] rowZero = new float[tokens * H];
            System.arraycopy(got, 0, rowZero, (tokens - 1) * H, H);
            assertThat(
                            Math.min(
                                    error(rowZero, alone[0], tokens - 1),
                                    error(rowZero, alone[1], tokens - 1)))
                    .as("row 0 has the other expert of the last token")
                    .isLessThan(ROUNDING);
        }
    }

    /** Every token's {@code k}-th expert, unweighted. */
    private static double[] expertAlone(ReferenceCase golden, int k) {
        int[] ids = golden.routing().ids();
        int[] chosen = new int[ids.length / 2];
        float[] ones = new float[chosen.length];
        for (int t = 0; t < chosen.length; t++) {
            chosen[t] = ids[2 * t + k];
            ones[t] = 1f;
        }
        return oracle(golden)
                .routed(golden.hidden(), new Routing(golden.tokens(), 1, chosen, ones));
    }

    private static double error(float[] got, double[] want, int row) {
        return TokenErrors.of(
                        Arrays.copyOfRange(got, row * H, row * H + H),
                        Arrays.copyOfRange(want, row * H, row * H + H),
                        1,
                        H)
                .max();
    }

    private static Float64Oracle oracle(ReferenceCase golden) {
        return Float64Oracle.of(checkpoint.layer(golden.layer()).config().build());
    }

    private static float[] run(MoeMixtralModel model, ReferenceCase golden, DType type) {
        AbstractTensor x = Golden.tensor(type, golden.hidden(), golden.tokens());
        try (AbstractTensor y = model.blocks().get(golden.layer()).forward(x, Optional.empty())) {
            return ReferenceBlock.floats(y);
        }
    }

    @Test
    void shouldSayWhatJlamaGivesItThatItCannotTake() {
        AbstractTensor narrow = new FloatBufferTensor(1, 64);
        assertThatThrownBy(() -> moe.blocks().get(0).forward(narrow, Optional.empty()))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("64 wide but the layer has hidden=128");
        AbstractTensor whole = new FloatBufferTensor(1, 128);
        assertThatThrownBy(
                        () ->
                                moe.blocks()
                                        .get(0)
                                        .forward(
                                                whole, Optional.of((List<AbstractTensor> l) -> {})))
                .isInstanceOf(UnsupportedOperationException.class)
                .hasMessageContaining("load it whole");
        MoeConfig.Builder config =
                checkpoint.layer(0).config().backend("cpu").hiddenDType(io.moe4j.tensor.DType.F32);
        assertThatThrownBy(() -> new MoeFeedForward(config.ranks(2).build(), moe::makeDenseTensor))
                .hasMessageContaining("ranks=2 does not fit Jlama: use ranks(1)");
        assertThatThrownBy(
                        () ->
                                new MoeFeedForward(
                                        config.ranks(1).routingInput(RoutingInput.TOPK).build(),
                                        moe::makeDenseTensor))
                .hasMessageContaining("routingInput=TOPK");
    }
}
