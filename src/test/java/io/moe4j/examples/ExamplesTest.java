package io.moe4j.examples;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.TokenErrors;
import io.moe4j.weights.Checkpoint;
import io.moe4j.weights.CheckpointLayer;
import java.io.ByteArrayOutputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Arrays;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The programs in the documentation run, compute the right thing and are the ones shown. */
class ExamplesTest {
    private static final Path GOLDEN = Path.of("src/test/resources/golden");

    @ParameterizedTest
    @ValueSource(strings = {"qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"})
    void shouldComputeWhatTheFloat64OracleComputes(String name) {
        float[] got = ReadmeExample.firstToken(GOLDEN.resolve(name));
        try (Checkpoint checkpoint = Checkpoint.open(GOLDEN.resolve(name))) {
            CheckpointLayer layer = checkpoint.layer(checkpoint.moeLayers().get(0));
            float[] ones = new float[got.length];
            Arrays.fill(ones, 1f);
            double[] want =
                    Float64Oracle.of(layer.config().build()).expect(layer.index(), ones, 1).full();
            assertThat(TokenErrors.of(got, want, 1, got.length).max()).isLessThan(1e-5);
        }
    }

    @Test
    void shouldPrintThePlanAndFourNumbers() {
        PrintStream before = System.out;
        ByteArrayOutputStream captured = new ByteArrayOutputStream();
        System.setOut(new PrintStream(captured, true, StandardCharsets.UTF_8));
        try {
            ReadmeExample.main(new String[] {GOLDEN.resolve("qwen3_moe").toString()});
        } finally {
            System.setOut(before);
        }
        String text = captured.toString(StandardCharsets.UTF_8);
        assertThat(text).contains("CPU backend: R=1 M=8 H=256").contains("receive buffer");
        assertThat(text.strip().lines().reduce((a, b) -> b).orElse("").split(", ")).hasSize(4);
    }
}
