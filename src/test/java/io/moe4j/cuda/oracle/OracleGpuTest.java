package io.moe4j.cuda.oracle;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.LayerHarness;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.cuda.EnabledIfCuda;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.oracle.LibraryBridge.Finding;
import io.moe4j.cuda.oracle.LibraryBridge.Library;
import io.moe4j.cuda.oracle.LibraryBridge.Way;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.RandomWeights;
import java.util.Arrays;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/**
 * Layers of well-known models at full size against two judges: the same layer by cuBLAS and cuDNN
 * (all tokens), and the textbook formula in float64 (the first and the last token). The judges are
 * compared with each other too.
 */
@EnabledIfCuda
class OracleGpuTest {
    private static final int[] TOKENS = {1, 8, 37, 128};
    private static final long SEED = 20_260;

    @ParameterizedTest
    @EnumSource(
            value = ModelPreset.class,
            names = {"QWEN3_30B_A3B", "QWEN3_235B_A22B", "DEEPSEEK_R1", "GPT_OSS_120B"})
    void shouldAgreeWithCublasAndCudnnAndFloat64AtFullSize(ModelPreset preset) {
        for (Library library : Library.values()) {
            Finding finding = LibraryBridge.find(library);
            assumeTrue(finding.way() != Way.MISSING, finding.line());
        }
        RandomWeights weights = preset.randomWeights(SEED);
        int most = Arrays.stream(TOKENS).max().orElseThrow();
        MoeConfig config =
                MoeConfig.builder()
                        .weights(weights)
                        .rule(preset.rule())
                        .activation(preset.activation())
                        .routingInput(RoutingInput.HIDDEN)
                        .maxTokensPerRank(most)
                        .backend("cuda")
                        .build();
        try (Context context = new Context(Drivers.open(), 0)) {
            long needed = 2 * LibraryLayer.bytes(preset) + (2L << 30);
            long free = freeBytes(context);
            assumeTrue(
                    free >= needed,
                    () ->
                            "needs "
                                    + (needed >> 30)
                                    + " GiB of device memory, free "
                                    + (free >> 30));
            long start = System.nanoTime();
            try (LibraryLayer libraries = new LibraryLayer(context, preset, weights, most);
                    LayerHarness moe4j = LayerHarness.open(config, ProgressListener.NONE)) {
                System.out.printf(
                        "%s: weights there after %.1f s%n",
                        preset.id(), (System.nanoTime() - start) / 1e9);
                for (int tokens : TOKENS) {
                    compare(preset, config, libraries, moe4j, tokens);
                }
            }
        }
    }

    private static void compare(
            ModelPreset preset,
            MoeConfig config,
            LibraryLayer libraries,
            LayerHarness moe4j,
            int tokens) {
        int h = config.shape().hidden();
        float[] hidden = Checker.randomHidden(SEED, tokens, tokens, h);
        moe4j.load(hidden, tokens);
        moe4j.step();
        LayerHarness.Output got = moe4j.collect();
        LibraryLayer.Result judge = libraries.run(hidden, tokens);

        String label = preset.id() + ", T=" + tokens + ", seed " + SEED;
        assertSameRouting(label, got.routing(), judge.routing());
        TokenErrors versusLibraries = TokenErrors.of(got.out(), judge.out(), tokens, h);
        double versusFloat64 = 0;
        double librariesVersusFloat64 = 0;
        for (int token : tokens == 1 ? new int[] {0} : new int[] {0, tokens - 1}) {
            float[] row = Arrays.copyOfRange(hidden, token * h, (token + 1) * h);
            ReferenceCase exact = Float64Oracle.of(config).expect(0, row, 1);
            assertThat(got.routing().sortedIds(token))
                    .as("%s: experts of token %d in float64", label, token)
                    .isEqualTo(exact.routing().sortedIds(0));
            versusFloat64 = Math.max(versusFloat64, error(got.out(), exact.full(), token, h));
            librariesVersusFloat64 =
                    Math.max(
                            librariesVersusFloat64,
                            error(narrow(judge.out()), exact.full(), token, h));
        }
        System.out.printf(
                "%s: worst token off by %.2e from cuBLAS/cuDNN (token %d), %.2e from float64;"
                        + " cuBLAS/cuDNN from float64 %.2e%n",
                label,
                versusLibraries.max(),
                versusLibraries.worstToken(),
                versusFloat64,
                librariesVersusFloat64);
        assertThat(versusLibraries.max()).as(label).isLessThanOrEqualTo(Checker.CUDA_TOLERANCE);
        assertThat(versusFloat64).as(label).isLessThanOrEqualTo(Checker.CUDA_TOLERANCE);
        assertThat(librariesVersusFloat64).as(label).isLessThanOrEqualTo(Checker.CUDA_TOLERANCE);
        assertThat(got.paddingUntouched()).as(label).isTrue();
    }

    private static void assertSameRouting(String label, Routing got, Routing want) {
        for (int token = 0; token < want.tokens(); token++) {
            assertThat(got.sortedIds(token))
                    .as("%s: experts of token %d", label, token)
                    .isEqualTo(want.sortedIds(token));
            for (int expert : want.sortedIds(token)) {
                assertThat(got.weightOf(token, expert))
                        .as("%s: weight of token %d for expert %d", label, token, expert)
                        .isCloseTo(
                                want.weightOf(token, expert),
                                org.assertj.core.data.Percentage.withPercentage(1e-4));
            }
        }
    }

    private static double error(float[] got, double[] want, int token, int h) {
        return TokenErrors.of(Arrays.copyOfRange(got, token * h, (token + 1) * h), want, 1, h)
                .max();
    }

    private static float[] narrow(double[] values) {
        float[] narrow = new float[values.length];
        for (int i = 0; i < narrow.length; i++) {
            narrow[i] = (float) values[i];
        }
        return narrow;
    }

    private static long freeBytes(Context context) {
        try (Scope scope = context.enter()) {
            return context.driver().memGetInfo().free();
        }
    }
}
