package io.moe4j.jlama;

import static org.assertj.core.api.Assertions.assertThat;

import com.github.tjake.jlama.model.AbstractModel;
import com.github.tjake.jlama.model.ModelSupport;
import com.github.tjake.jlama.safetensors.DType;
import com.github.tjake.jlama.tensor.AbstractTensor;
import io.moe4j.checker.TokenErrors;
import io.moe4j.weights.Checkpoint;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** A Mixtral model generates text in Jlama with its experts on moe4j. */
class MixtralGenerationTest {
    private static final int TOKENS = 100;
    @TempDir static Path temporary;
    private static Path folder;
    private static Checkpoint checkpoint;

    @BeforeAll
    static void write() {
        folder = TinyMixtral.write(temporary.resolve("tiny"), 7);
        checkpoint = Checkpoint.open(folder);
    }

    @AfterAll
    static void close() {
        checkpoint.close();
    }

    @Test
    void shouldGenerateWhatTheCorrectedReferenceGenerates() {
        String before = own();
        String after;
        try (MoeMixtralModel model =
                MoeMixtralModel.load(folder, config -> config.backend("cpu").threads(2))) {
            after = Generation.text(model, TOKENS);
        }
        String reference = reference();
        System.out.println("before    " + before);
        System.out.println("after     " + after);
        System.out.println("reference " + reference);
        assertThat(after).isEqualTo(reference).hasSizeGreaterThan(40);
        assertThat(Generation.common(before, reference)).isLessThan(5);
    }

    private static String own() {
        try (AbstractModel model = ModelSupport.loadModel(folder.toFile(), DType.F32, DType.I8)) {
            return Generation.text(model, TOKENS);
        }
    }

    private static String reference() {
        try (MoeMixtralModel model =
                MoeMixtralModel.load(
                        folder,
                        DType.F32,
                        DType.I8,
                        (m, layer, config) -> new ReferenceBlock(m, checkpoint, layer))) {
            return Generation.text(model, TOKENS);
        }
    }

    @Test
    void shouldGenerateFromACheckpointOfTransformers() {
        Path golden = TinyMixtral.adapt(Golden.folder(), temporary.resolve("golden"));
        try (Checkpoint recorded = Checkpoint.open(golden);
                MoeMixtralModel moe =
                        MoeMixtralModel.load(golden, config -> config.backend("cpu").threads(2));
                MoeMixtralModel reference =
                        MoeMixtralModel.load(
                                golden,
                                DType.F32,
                                DType.I8,
                                (m, layer, config) -> new ReferenceBlock(m, recorded, layer))) {
            String text = Generation.text(moe, 60);
            System.out.println("bfloat16  " + text);
            assertThat(text).isEqualTo(Generation.text(reference, 60)).isNotEmpty();
        }
    }

    @Test
    void shouldGiveTheReferencesOutputInEveryLayerOfEveryStep() {
        List<Double> errors = new ArrayList<>();
        List<MoeFeedForward> opened = new ArrayList<>();
        MoeMixtralModel.Blocks compared =
                (m, layer, config) -> {
                    ReferenceBlock reference = new ReferenceBlock(m, checkpoint, layer);
                    MoeFeedForward moe =
                            new MoeFeedForward(
                                    config.backend("cpu").threads(2).build(), m::makeDenseTensor);
                    opened.add(moe);
                    return (x, reducer) -> {
                        AbstractTensor y = moe.forward(x, reducer);
                        int tokens = x.shape().first();
                        double[] want = reference.expect(ReferenceBlock.floats(x), tokens).full();
                        float[] got = ReferenceBlock.floats(y);
                        errors.add(TokenErrors.of(got, want, tokens, TinyMixtral.HIDDEN).max());
                        return y;
                    };
                };
        try (MoeMixtralModel model = MoeMixtralModel.load(folder, DType.F32, DType.I8, compared)) {
            Generation.text(model, TOKENS);
        } finally {
            opened.forEach(MoeFeedForward::close);
        }
        System.out.println("worst token " + errors.stream().max(Double::compare).orElseThrow());
        assertThat(errors).hasSizeGreaterThan(2 * 50).allMatch(error -> error <= 1e-5);
    }
}
