package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cli.Main;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;
import picocli.CommandLine;

/**
 * Every golden folder on two GPUs, by threads and by processes: the bounds of one GPU, and no bit
 * that differs from two virtual ranks on one GPU.
 */
@EnabledIfCuda(devices = 2)
class CheckMultiGpuTest {
    private static Path golden(String name) {
        return Path.of(System.getProperty("moe4j.golden", "src/test/resources/golden"))
                .resolve(name);
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "qwen3_moe_fp8",
                "deepseek_v3",
                "deepseek_v3_fp8",
                "gpt_oss"
            })
    void shouldAgreeWithGoldenOutputAndVirtualRanksByThreads(String name) {
        check(golden(name), "--gpus", "2");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "qwen3_moe_fp8",
                "deepseek_v3",
                "deepseek_v3_fp8",
                "gpt_oss"
            })
    void shouldAgreeWithGoldenOutputAndVirtualRanksByProcesses(String name) {
        check(golden(name), "--gpus", "2", "--processes");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "qwen3_moe_fp8",
                "deepseek_v3",
                "deepseek_v3_fp8",
                "gpt_oss"
            })
    void shouldAgreeWithGoldenOutputAndVirtualRanksWhereTwoRanksShareEachGpu(String name) {
        check(golden(name), "--gpus", "2", "--ranks", "4");
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "qwen3_moe_fp8",
                "deepseek_v3",
                "deepseek_v3_fp8",
                "gpt_oss"
            })
    void shouldAgreeWithGoldenOutputAndVirtualRanksByProcessesOfTwoRanks(String name) {
        check(golden(name), "--gpus", "2", "--ranks", "4", "--processes");
    }

    private static void check(Path checkpoint, String... more) {
        StringWriter out = new StringWriter();
        CommandLine main = Main.commandLine();
        main.setOut(new PrintWriter(out));
        main.setErr(new PrintWriter(out));
        List<String> arguments =
                new ArrayList<>(List.of("check", "--checkpoint", checkpoint.toString()));
        arguments.addAll(List.of(more));
        int exit = main.execute(arguments.toArray(String[]::new));
        System.out.println(out);
        assertThat(exit).as(out.toString()).isZero();
        assertThat(out.toString()).contains("OK: ").doesNotContain("MISMATCH");
    }
}
