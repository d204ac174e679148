package io.moe4j.checker;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.within;

import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class TokenErrorsTest {
    private static final int WIDTH = 16;

    @Test
    void shouldBeZeroForEqualOutputs() {
        double[] want = random(5);
        assertThat(TokenErrors.of(narrow(want), want, 5, WIDTH)).isEqualTo(new TokenErrors(0, 0));
    }

    @Test
    void shouldBeRelativeToTheTokensOwnNorm() {
        double[] want = {3, 4, 300, 400};
        float[] got = {3, 4.5f, 300, 400.5f};
        TokenErrors errors = TokenErrors.of(got, want, 2, 2);
        assertThat(errors.max()).isCloseTo(0.5 / 5, within(1e-15));
        assertThat(errors.worstToken()).isZero();
    }

    @Test
    void shouldNotChangeWhenBothSidesAreScaled() {
        double[] want = random(7);
        float[] got = narrow(want);
        got[40] += 0.25f;
        double[] scaledWant = want.clone();
        float[] scaledGot = got.clone();
        for (int i = 0; i < want.length; i++) {
            scaledWant[i] *= 1024;
            scaledGot[i] *= 1024;
        }
        assertThat(TokenErrors.of(scaledGot, scaledWant, 7, WIDTH))
                .isEqualTo(TokenErrors.of(got, want, 7, WIDTH));
    }

    @Test
    void shouldCatchOneWrongRowAmongAThousand() {
        int tokens = 1000;
        double[] want = random(tokens);
        float[] got = narrow(want);
        for (int i = 0; i < WIDTH; i++) {
            got[617 * WIDTH + i] *= 1.01f;
        }
        TokenErrors errors = TokenErrors.of(got, want, tokens, WIDTH);
        assertThat(errors.max()).isCloseTo(0.01, within(1e-4));
        assertThat(errors.worstToken()).isEqualTo(617);
    }

    @ParameterizedTest
    @ValueSource(floats = {Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY})
    void shouldBeInfiniteForAnyValueThatIsNotFinite(float value) {
        double[] want = random(4);
        float[] got = narrow(want);
        got[2 * WIDTH + 5] = value;
        assertThat(TokenErrors.of(got, want, 4, WIDTH))
                .isEqualTo(new TokenErrors(Double.POSITIVE_INFINITY, 2));
        double[] badWant = want.clone();
        badWant[3 * WIDTH] = value;
        assertThat(TokenErrors.of(narrow(want), badWant, 4, WIDTH))
                .isEqualTo(new TokenErrors(Double.POSITIVE_INFINITY, 3));
    }

    @Test
    void shouldUseTheAbsoluteErrorWhereTheWantedRowIsZero() {
        double[] want = {1, 0, 0, 0};
        float[] got = {1, 0, 0.3f, 0.4f};
        TokenErrors errors = TokenErrors.of(got, want, 2, 2);
        assertThat(errors.max()).isCloseTo(0.5, within(1e-7));
        assertThat(errors.worstToken()).isEqualTo(1);
    }

    @Test
    void shouldHaveNoWorstTokenWithoutTokens() {
        assertThat(TokenErrors.of(new float[0], new double[0], 0, 8))
                .isEqualTo(new TokenErrors(0, -1));
    }

    @Test
    void shouldRefuseOutputsOfOtherSizes() {
        assertThatThrownBy(() -> TokenErrors.of(new float[7], new double[8], 2, 4))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("got has 7");
    }

    private static double[] random(int tokens) {
        return new Random(42).doubles((long) tokens * WIDTH, -1, 1).map(d -> (float) d).toArray();
    }

    private static float[] narrow(double[] values) {
        float[] narrow = new float[values.length];
        for (int i = 0; i < narrow.length; i++) {
            narrow[i] = (float) values[i];
        }
        return narrow;
    }
}
