package io.moe4j.cli;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.bench.BenchReport;
import io.moe4j.bench.BenchRow;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import picocli.CommandLine;

/** {@code moe4j bench} on the CPU backend. */
class BenchCliTest {
    private static final String SMALL =
            "--experts 8 --top-k 2 --hidden 64 --intermediate 32 --backend cpu --sample-ms 5";

    @TempDir private Path folder;

    private record Run(int exitCode, String out, String err) {}

    @Test
    void shouldTimeTheExpertChainOnTheCpu() throws IOException {
        Path file = folder.resolve("report.json");
        Run run = run("bench experts " + SMALL + " --tokens 1,16 --routing hot1 --out " + file);
        assertThat(run.exitCode()).as(run.err()).isZero();
        assertThat(run.out()).contains("| – | custom | 1 | 16 | hot1 | ch | eager, hot | 32 |");
        BenchReport report = BenchReport.read(file);
        assertThat(report.rows()).extracting(BenchRow::tokens).containsExactly(1, 16);
        assertThat(report.rows()).allMatch(row -> row.medianUs() > 0 && row.error() < 1e-5);
        assertThat(report.command())
                .isEqualTo("moe4j bench experts " + SMALL + " --tokens 1,16 --routing hot1");
        assertThat(report.environment()).containsKeys("date", "commit", "jdk");
        assertThat(run("bench show " + file).out()).isEqualTo(run.out());
    }

    @Test
    void shouldTimeOneRankOfAGroup() {
        Run run = run("bench experts " + SMALL + " --tokens 4 --ranks 4 -o csv");
        assertThat(run.exitCode()).as(run.err()).isZero();
        assertThat(run.out()).contains("experts,0,custom,64,32,8,2,4,4,uniform,ch,cpu,eager,hot,");
    }

    @Test
    void shouldTimeExactCountsFromAFile() throws IOException {
        Path cases = folder.resolve("cases.json");
        Files.writeString(
                cases,
                "{\"cases\":[{\"case\":3,\"hidden\":64,\"intermediate\":32,\"experts\":8,"
                        + "\"topk\":2,\"ep\":2,\"tokens_per_rank\":4,\"local_experts\":4,"
                        + "\"expert_counts\":[8,0,1,2]}]}");
        Run run = run("bench experts --backend cpu --sample-ms 5 -o csv --cases " + cases);
        assertThat(run.exitCode()).as(run.err()).isZero();
        assertThat(run.out())
                .contains("experts,3,custom,64,32,8,2,2,4,file,ch,cpu,eager,hot,1,11,3,");
    }

    @Test
    void shouldTimeWholeStepsOverVirtualRanks() {
        for (String routing : List.of("uniform", "zipf:1.1")) {
            Run run = run("bench chain " + SMALL + " --tokens 3 --ranks 2 --routing " + routing);
            assertThat(run.exitCode()).as(run.err()).isZero();
            assertThat(run.out())
                    .contains("| – | custom | 2 | 3 | " + routing + " | step | eager, hot | 12 |");
        }
    }

    @Test
    void shouldExitWithOneIfSlowerThanAllowed() throws IOException {
        Path file = folder.resolve("old.json");
        String call = "bench experts " + SMALL + " --tokens 4";
        assertThat(run(call + " --out " + file).exitCode()).isZero();
        BenchReport old = BenchReport.read(file);
        String text = Files.readString(file);
        double median = old.rows().get(0).medianUs();
        String key = "\"medianUs\" : ";
        Files.writeString(file, text.replace(key + median, key + median / 1e6));
        Run slower = run(call + " --compare " + file + " --fail-slower 50%");
        assertThat(slower.exitCode()).isEqualTo(ExitCodes.MISMATCH);
        assertThat(slower.err()).contains("1 measurements compared, 1 slower than allowed");
        Files.writeString(file, text.replace(key + median, key + median * 1e6));
        assertThat(run(call + " --compare " + file + " --fail-slower 5%").exitCode()).isZero();
        assertThat(run(call + " --compare " + file).exitCode()).isZero();
    }

    @Test
    void shouldShowPeersBesideAnOldReport() {
        String samples = "src/test/resources/bench/";
        Run run = run("bench show " + samples + "report.json --peers " + samples + "peers.json");
        assertThat(run.exitCode()).as(run.err()).isZero();
        assertThat(run.out()).contains("| triton_masked 50.0 | 1.70 |");
    }

    @Test
    void shouldPlotAReport() throws IOException {
        Path file = folder.resolve("plot.svg");
        Run run = run("plot bench/results/2026-11-22-h200/chain.json -o " + file);
        assertThat(run.exitCode()).as(run.err()).isZero();
        assertThat(Files.readString(file)).contains("qwen3-30b-a3b EP1 step | 128.0 | 38");
    }

    @ParameterizedTest
    @CsvSource(
            delimiter = '|',
            value = {
                "bench experts --peers missing.json | missing.json does not exist",
                "plot missing.json -o x.svg | missing.json does not exist",
                "plot missing.json -o x.pdf | ends with neither",
                "plot missing.json | Missing required option",
                "bench | Missing subcommand",
                "bench experts --preset nope | unknown preset nope",
                "bench experts --experts 4 | a custom layer needs",
                "bench experts --tokens 0 | --tokens=0 is not positive",
                "bench chain --ranks 0 | --ranks=0 is not positive",
                "bench experts --routing zipf | use uniform",
                "bench experts --baseline torch | use jcublas",
                "bench experts --graph --eager | mutually exclusive",
                "bench experts --cold --hot | mutually exclusive",
                "bench experts --fail-slower 5% | --fail-slower needs --compare",
                "bench experts --compare x.json --fail-slower x | is not a share",
                "bench experts --out report.txt | ends with none of",
                "bench experts --sample-ms 0 | is not positive",
                "bench experts -o xml | expected one of",
                "bench experts --cases missing.json | missing.json does not exist",
                "bench ep --gpus 1 | --gpus=1 is no group",
                "bench ep --ranks 2 | --ranks does not apply",
                "bench ep --skew -1 | --skew=-1.0 is negative",
                "bench ep --backend cpu | bench ep needs GPUs",
                "bench ep --peers missing.json | missing.json does not exist",
                "bench show missing.json | missing.json does not exist"
            })
    void shouldExplainWrongUse(String call, String message) {
        Run run = run(call);
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains(message);
    }

    private static Run run(String call) {
        StringWriter out = new StringWriter();
        StringWriter err = new StringWriter();
        CommandLine main = Main.commandLine();
        main.setOut(new PrintWriter(out)).setErr(new PrintWriter(err));
        List<String> words = new ArrayList<>(Arrays.asList(call.split(" ")));
        int exit = main.execute(words.toArray(String[]::new));
        return new Run(exit, out.toString(), err.toString());
    }
}
