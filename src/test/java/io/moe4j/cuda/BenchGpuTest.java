package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cli.Main;
import java.io.PrintWriter;
import java.io.StringWriter;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;
import picocli.CommandLine;

/**
 * Benchmarks on a GPU check their results before they time them; so these tests show that weights
 * filled on the device are those the host computes: with biases, shared experts, gates and widths
 * that need padding.
 */
@EnabledIfCuda
class BenchGpuTest {
    @ParameterizedTest
    @ValueSource(
            strings = {
                "experts --preset qwen3-30b-a3b --tokens 1,16 --ranks 8",
                "experts --experts 8 --top-k 2 --hidden 200 --intermediate 72 --tokens 1,70 --eager"
                        + " --hot",
                "experts --preset gpt-oss-20b --tokens 3 --hot --routing hot1",
                "chain --experts 8 --top-k 2 --hidden 200 --intermediate 72 --tokens 5 --ranks 3 --hot",
                "chain --preset gpt-oss-20b --tokens 2 --hot",
                "chain --preset qwen1.5-moe-a2.7b --tokens 2 --ranks 2 --hot",
                "chain --preset qwen1.5-moe-a2.7b --tokens 4 --routing zipf:1.2 --eager",
                "chain --preset glm-4.5-air --tokens 2 --hot",
                "launch --ranks 2"
            })
    void shouldCheckAndTime(String call) {
        StringWriter out = new StringWriter();
        CommandLine main = Main.commandLine();
        main.setOut(new PrintWriter(out)).setErr(new PrintWriter(out));
        String backend = call.startsWith("launch") ? "" : " --backend cuda";
        int exit = main.execute(("bench " + call + backend + " --sample-ms 5").split(" "));
        System.out.println(out);
        assertThat(exit).as(out.toString()).isZero();
    }
}
