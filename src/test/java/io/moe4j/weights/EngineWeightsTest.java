package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.examples.EngineWeightsExample;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Weights in an engine's own memory, plain and as GGUF files store them. */
class EngineWeightsTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 96, 5, 2);

    @Test
    void shouldDecodeEveryTypeAsItsFormatSays() {
        ByteBuffer f32 = memory(8).putFloat(1.5f).putFloat(-0x1p-149f).flip();
        assertThat(values(EngineTensor.of(f32, GgufType.F32, 1, 2)))
                .containsExactly(1.5f, -0x1p-149f);
        ByteBuffer f16 = memory(4).putShort((short) 0x3c01).putShort((short) 0x8001).flip();
        assertThat(values(EngineTensor.of(f16, GgufType.F16, 1, 2)))
                .containsExactly(1 + 0x1p-10f, -0x1p-24f);
        ByteBuffer bf16 = memory(4).putShort((short) 0x3f81).putShort((short) 0xc000).flip();
        assertThat(values(EngineTensor.of(bf16, GgufType.BF16, 1, 2)))
                .containsExactly(1 + 0x1p-7f, -2f);

        // two blocks of one row: scales 0.5 and 2^-14
        ByteBuffer q8 = memory(68).putShort((short) 0x3800);
        for (int i = 0; i < 32; i++) {
            q8.put((byte) (i - 16));
        }
        q8.putShort((short) 0x0400);
        for (int i = 0; i < 32; i++) {
            q8.put((byte) (i == 0 ? -128 : 127));
        }
        float[] want = new float[64];
        for (int i = 0; i < 32; i++) {
            want[i] = (i - 16) * 0.5f;
            want[32 + i] = (i == 0 ? -128 : 127) * 0x1p-14f;
        }
        assertThat(values(EngineTensor.of(q8.flip(), GgufType.Q8_0, 1, 64))).containsExactly(want);
    }

    @Test
    void shouldKnowTheNumbersOfGguf() {
        for (GgufType type : GgufType.values()) {
            assertThat(GgufType.ofId(type.id())).isEqualTo(type);
        }
        assertThat(GgufType.Q8_0.id()).isEqualTo(8);
        assertThat(GgufType.BF16.id()).isEqualTo(30);
        assertThat(GgufType.Q8_0.blockElements()).isEqualTo(32);
        assertThatThrownBy(() -> GgufType.ofId(2)).hasMessageContaining("GGUF type 2 is not one");
    }

    @Test
    void shouldFindExpertsHalvesAndInterleavedRows() {
        ByteBuffer memory = memory(4 * 2 * 4 * 3);
        for (int i = 0; i < 24; i++) {
            memory.putFloat(i);
        }
        EngineTensor tensor = EngineTensor.of(memory.flip(), GgufType.F32, 2, 4, 3);
        assertThat(tensor).hasToString("F32[2, 4, 3]");
        assertThat(GgufWriter.values(tensor.matrix(1)))
                .containsExactly(12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
        assertThat(GgufWriter.values(tensor.matrix(0, 0, 1, 2))).containsExactly(0, 1, 2, 3, 4, 5);
        assertThat(GgufWriter.values(tensor.matrix(1, 2, 1, 2)))
                .containsExactly(18, 19, 20, 21, 22, 23);
        assertThat(GgufWriter.values(tensor.matrix(0, 1, 2, 2)))
                .containsExactly(3, 4, 5, 9, 10, 11);
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void shouldReadFromThePositionWhateverTheByteOrder(boolean direct) {
        ByteBuffer all = direct ? ByteBuffer.allocateDirect(64) : ByteBuffer.allocate(64);
        all.order(ByteOrder.LITTLE_ENDIAN).putFloat(12, 3f).putFloat(16, 4f);
        ByteBuffer view = all.asReadOnlyBuffer().order(ByteOrder.BIG_ENDIAN).position(12);
        EngineTensor tensor = EngineTensor.of(view, GgufType.F32, 1, 2);
        view.position(0);
        assertThat(values(tensor)).containsExactly(3f, 4f);
    }

    @Test
    void shouldAddressTensorsAboveTwoGibibytes() {
        List<Long> offsets = new ArrayList<>();
        EngineTensor.Memory memory =
                (offset, bytes) -> {
                    offsets.add(offset);
                    return ByteBuffer.allocate(bytes);
                };
        long bytes = 256L * 4096 * 4096 * 2;
        EngineTensor tensor = EngineTensor.of(memory, bytes, GgufType.BF16, 256, 4096, 4096);
        tensor.matrix(255, 4095, 1, 1).read(new float[4096]);
        assertThat(offsets).containsExactly(bytes - 8192);
    }

    @ParameterizedTest
    @EnumSource(GgufType.class)
    void shouldComputeWhatTheSameNumbersGiveOtherwise(GgufType type) {
        RandomWeights source = RandomWeights.of(SHAPE, 3);
        LayerWeights engine = experts(source, type, false);
        LayerWeights plain = decoded(source, type);
        Batch batch = Harness.random(SHAPE, 7, 11);
        float[][] got = run(engine, batch);
        assertThat(got).as("bit for bit, as from arrays").isDeepEqualTo(run(plain, batch));
        assertThat(run(experts(source, type, true), batch))
                .as("gate and up interleaved in one tensor")
                .isDeepEqualTo(got);
        float[] hidden = flat(batch.hidden());
        double[] want =
                new Float64Oracle(plain, null, io.moe4j.model.Activation.swiGlu())
                        .routed(
                                hidden,
                                new Routing(7, 2, flat(batch.ids()), flat(batch.weights())));
        assertThat(TokenErrors.of(flat(Arrays.copyOf(got, 7)), want, 7, SHAPE.hidden()).max())
                .isLessThan(1e-5);
    }

    @ParameterizedTest
    @EnumSource(GgufType.class)
    void shouldRunTheExpertsOfAGgufFile(GgufType type) {
        int i = SHAPE.intermediate();
        int h = SHAPE.hidden();
        RandomWeights source = RandomWeights.of(SHAPE, 3);
        ByteBuffer gate = memory((int) type.rowBytes(h) * i * 5);
        ByteBuffer up = memory(gate.capacity());
        ByteBuffer down = memory((int) type.rowBytes(i) * h * 5);
        for (int e = 0; e < 5; e++) {
            GgufWriter.encode(gate, type, GgufWriter.values(source.expert(e).gate()));
            GgufWriter.encode(up, type, GgufWriter.values(source.expert(e).up()));
            GgufWriter.encode(down, type, GgufWriter.values(source.expert(e).down()));
        }
        Batch batch = Harness.random(SHAPE, 7, 11);
        LayerWeights weights =
                EngineWeightsExample.gguf(SHAPE, type, gate.flip(), up.flip(), down.flip());
        assertThat(run(weights, batch)).isDeepEqualTo(run(decoded(source, type), batch));
    }

    @Test
    void shouldSayWhatDoesNotFit() {
        ByteBuffer small = memory(100);
        assertThatThrownBy(() -> EngineTensor.of(small, GgufType.F32, 2, 4, 4))
                .hasMessageContaining(
                        "the memory has 100 bytes but F32[2, 4, 4] needs 128: give the whole"
                                + " tensor");
        assertThatThrownBy(() -> EngineTensor.of(small, GgufType.Q8_0, 1, 48))
                .hasMessageContaining("cols=48 is not a multiple of 32, the block of Q8_0");
        assertThatThrownBy(() -> EngineTensor.of(small, GgufType.F32, 0, 4))
                .hasMessageContaining("rows=0 is not positive");
        EngineTensor tensor = EngineTensor.of(small, GgufType.F32, 4, 4);
        assertThatThrownBy(() -> tensor.matrix(1)).isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> tensor.matrix(0, 1, 2, 3))
                .hasMessageContaining("first=1 step=2 count=3 leave the 4 rows of F32[1, 4, 4]");

        ExpertWeights narrow = ExpertWeights.of(tensor.matrix(), tensor.matrix(), tensor.matrix());
        assertThatThrownBy(() -> EngineWeights.of(SHAPE, "test", e -> narrow).build())
                .hasMessageContaining(
                        "gate of expert 0 is [4, 4] but the layer's shape asks for [96, 64]");
        RandomWeights source = RandomWeights.of(SHAPE, 3);
        assertThatThrownBy(
                        () ->
                                EngineWeights.of(SHAPE, "test", source::expert)
                                        .router(tensor.matrix())
                                        .build())
                .hasMessageContaining("router is [4, 4] but the layer's shape asks for [5, 64]");
        assertThatThrownBy(
                        () ->
                                EngineWeights.of(SHAPE, "test", source::expert)
                                        .routerBias(new float[4])
                                        .build())
                .hasMessageContaining("routerBias has 4 elements, expected 5");
        assertThatThrownBy(
                        () ->
                                EngineWeights.of(SHAPE, "test", source::expert)
                                        .sharedExpert(source.expert(0))
                                        .build())
                .hasMessageContaining("sharedIntermediate=0 but the shared expert is given");
        assertThatThrownBy(
                        () ->
                                EngineWeights.of(
                                                new MoeShape(64, 96, 5, 2, 32),
                                                "test",
                                                source::expert)
                                        .build())
                .hasMessageContaining("sharedIntermediate=32 but the shared expert is missing");
    }

    @Test
    void shouldHandOutWhatItWasGiven() {
        MoeShape shape = new MoeShape(64, 96, 5, 2, 32);
        RandomWeights source =
                RandomWeights.of(shape, 3).withBias().withSharedGate().withCorrectionBias();
        EngineWeights weights =
                EngineWeights.of(shape, "model.gguf, layer 3", source::expert)
                        .router(source.router())
                        .routerBias(source.routerBias())
                        .correctionBias(source.correctionBias())
                        .sharedExpert(source.sharedExpert())
                        .sharedExpertGate(source.sharedExpertGate())
                        .build();
        assertThat(weights.shape()).isEqualTo(shape);
        assertThat(weights.hasBias()).isTrue();
        assertThat(weights.description()).isEqualTo("model.gguf, layer 3");
        assertThat(weights.routerBias()).isEqualTo(source.routerBias());
        assertThat(weights.correctionBias()).isEqualTo(source.correctionBias());
        assertThat(weights.sharedExpertGate()).isEqualTo(source.sharedExpertGate());
        assertThat(GgufWriter.values(weights.router()))
                .isEqualTo(GgufWriter.values(source.router()));
        assertThat(weights.sharedExpert().gate().rows()).isEqualTo(32);
        assertThatThrownBy(() -> weights.expert(5)).isInstanceOf(IndexOutOfBoundsException.class);
    }

    // ------------------------------------------------------------------ weights

    /** As an engine has them: one tensor of all experts each for gate, up and down. */
    private static LayerWeights experts(LayerWeights source, GgufType type, boolean interleaved) {
        int i = SHAPE.intermediate();
        int h = SHAPE.hidden();
        int e = SHAPE.experts();
        ByteBuffer gateUp = memory((int) type.rowBytes(h) * 2 * i * e);
        ByteBuffer down = memory((int) type.rowBytes(i) * h * e);
        for (int expert = 0; expert < e; expert++) {
            float[] gate = GgufWriter.values(source.expert(expert).gate());
            float[] up = GgufWriter.values(source.expert(expert).up());
            for (int row = 0; row < 2 * i; row++) {
                boolean fromGate = interleaved ? row % 2 == 0 : row < i;
                int at = (interleaved ? row / 2 : row % i) * h;
                GgufWriter.encode(
                        gateUp, type, Arrays.copyOfRange(fromGate ? gate : up, at, at + h));
            }
            GgufWriter.encode(down, type, GgufWriter.values(source.expert(expert).down()));
        }
        EngineTensor both = EngineTensor.of(gateUp.flip(), type, e, 2 * i, h);
        EngineTensor downs = EngineTensor.of(down.flip(), type, e, h, i);
        return EngineWeights.of(
                        SHAPE,
                        "an engine's tensors",
                        x ->
                                ExpertWeights.of(
                                        interleaved
                                                ? both.matrix(x, 0, 2, i)
                                                : both.matrix(x, 0, 1, i),
                                        interleaved
                                                ? both.matrix(x, 1, 2, i)
                                                : both.matrix(x, i, 1, i),
                                        downs.matrix(x)))
                .build();
    }

    /** The same numbers by a decoder of this test's own. */
    private static LayerWeights decoded(LayerWeights source, GgufType type) {
        return EngineWeights.of(
                        SHAPE,
                        "arrays",
                        e ->
                                ExpertWeights.of(
                                        GgufWriter.round(source.expert(e).gate(), type),
                                        GgufWriter.round(source.expert(e).up(), type),
                                        GgufWriter.round(source.expert(e).down(), type)))
                .build();
    }

    private static float[][] run(LayerWeights weights, Batch batch) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(weights)
                        .backend("cpu")
                        .threads(2)
                        .hiddenDType(DType.F32)
                        .maxTokensPerRank(8)
                        .build();
        try (Harness harness = new Harness(config, false, 0)) {
            return harness.run(batch);
        }
    }

    private static ByteBuffer memory(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
    }

    private static float[] values(EngineTensor tensor) {
        return GgufWriter.values(tensor.matrix());
    }

    private static float[] flat(float[][] rows) {
        float[] all = new float[rows.length * rows[0].length];
        for (int i = 0; i < rows.length; i++) {
            System.arraycopy(rows[i], 0, all, i * rows[0].length, rows[0].length);
        }
        return all;
    }

    private static int[] flat(int[][] rows) {
        return Arrays.stream(rows).flatMapToInt(Arrays::stream).toArray();
    }
}
