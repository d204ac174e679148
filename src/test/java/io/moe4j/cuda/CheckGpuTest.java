package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cli.Main;
import io.moe4j.weights.TinyCheckpoints;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.file.Path;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;
import picocli.CommandLine;

/** The checker on CUDA: golden folders and generated checkpoints of every family, R = 1 to 8. */
@EnabledIfCuda
class CheckGpuTest {
    @TempDir Path folder;

    private static Path golden() {
        return Path.of(System.getProperty("moe4j.golden", "src/test/resources/golden"));
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
    void shouldAgreeWithGoldenOutput(String name) {
        check(golden().resolve(name));
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "olmoe",
                "deepseek_v3",
                "kimi_k2",
                "glm4_moe",
                "gpt_oss"
            })
    void shouldAgreeWithTheOracleOnGeneratedCheckpoints(String family) throws Exception {
        TinyCheckpoints.write(folder, family, TinyCheckpoints.Options.defaults(), 77);
        check(folder);
    }

    private static void check(Path checkpoint) {
        StringWriter out = new StringWriter();
        CommandLine main = Main.commandLine();
        main.setOut(new PrintWriter(out));
        main.setErr(new PrintWriter(out));
        int exit =
                main.execute(
                        "check",
                        "--checkpoint",
                        checkpoint.toString(),
                        "--backend",
                        "cuda",
                        "--ranks",
                        "1,2,4,8");
        System.out.println(out);
        assertThat(exit).as(out.toString()).isZero();
    }
}
