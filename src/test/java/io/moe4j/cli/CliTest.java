package io.moe4j.cli;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeFalse;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.moe4j.BackendProvider;
import io.moe4j.Moe;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import picocli.CommandLine;

class CliTest {
    private static final Path GOLDEN = Path.of("src/test/resources/golden");
    private static final ObjectMapper JSON = new ObjectMapper();

    @TempDir private Path temp;

    /** What a command did. */
    private record Run(int exitCode, String out, String err) {}

    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithEveryGoldenCheckpointOnTheCpu(String name) {
        Run run =
                run("check", "--checkpoint", golden(name), "--backend", "cpu", "--ranks", "1,2,4");
        assertThat(run.exitCode()).as(run.out() + run.err()).isEqualTo(ExitCodes.OK);
        assertThat(run.out()).contains("37/37").contains("OK: ");
    }

    @Test
    void shouldAgreeWithTheOracleWhenAskedForIt() {
        Run run =
                run(
                        "check",
                        "--checkpoint",
                        golden("deepseek_v3"),
                        "--oracle",
                        "--backend",
                        "cpu",
                        "--tokens",
                        "5",
                        "--ranks",
                        "3");
        assertThat(run.exitCode()).as(run.out() + run.err()).isEqualTo(ExitCodes.OK);
        assertThat(run.out()).contains("oracle").contains("5/5");
    }

    @Test
    void shouldExitWithOneAndNameTheTokenWhenARecordedOutputIsCorrupt() throws IOException {
        Path folder = copyOfGolden("qwen3_moe");
        Path file = folder.resolve("golden.safetensors");
        corrupt(file, "layer1.t37.out", 5);
        Run run = run("check", "--checkpoint", folder.toString(), "--backend", "cpu");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.MISMATCH);
        assertThat(run.out())
                .contains("MISMATCH")
                .contains("at token 5")
                .contains("repeat: moe4j check --checkpoint " + folder)
                .contains("--layer 1 --ranks 4 --tokens 37 --backend cpu");
    }

    @Test
    void shouldRepeatAFailureWithThePrintedCommand() throws IOException {
        Path folder = copyOfGolden("qwen3_moe");
        corrupt(folder.resolve("golden.safetensors"), "layer1.t8.routed_out", 2);
        Run first = run("check", "--checkpoint", folder.toString(), "--backend", "cpu");
        String command =
                first.out()
                        .lines()
                        .filter(line -> line.contains("repeat: moe4j "))
                        .map(line -> line.substring(line.indexOf("moe4j ") + 6))
                        .findFirst()
                        .orElseThrow();
        Run again = run(command.split(" "));
        assertThat(again.exitCode()).isEqualTo(ExitCodes.MISMATCH);
        assertThat(again.out()).contains("at token 2").contains("0 of 1 cases agree");
    }

    @Test
    void shouldPrintAReportThatParses() throws IOException {
        Run run = run("check", "--checkpoint", golden("gpt_oss"), "--backend", "cpu", "--json");
        JsonNode report = JSON.readTree(run.out());
        assertThat(run.exitCode()).isEqualTo(ExitCodes.OK);
        assertThat(report.get("pass").asBoolean()).isTrue();
        JsonNode first = report.get("cases").get(0);
        assertThat(first.get("backend").asText()).isEqualTo("cpu");
        assertThat(first.get("routingAgreeing").asInt()).isEqualTo(first.get("tokens").asInt());
        assertThat(first.get("full").get("max").asDouble())
                .isLessThanOrEqualTo(first.get("tolerance").asDouble());
        assertThat(first.get("repeat").asText()).contains("check --checkpoint");
    }

    @Test
    void shouldExitWithOneWhenTheToleranceIsZero() {
        Run run =
                run(
                        "check",
                        "--checkpoint",
                        golden("mixtral"),
                        "--backend",
                        "cpu",
                        "--tolerance",
                        "0");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.MISMATCH);
        assertThat(run.out()).contains("--tolerance 0.0");
    }

    @Test
    void shouldExitWithTwoForWrongUsage() {
        for (String[] args :
                List.of(
                        new String[] {},
                        new String[] {"check"},
                        new String[] {"check", "--checkpoint", golden("mixtral"), "--ranks", "two"},
                        new String[] {"check", "--checkpoint", golden("mixtral"), "--ranks", "65"},
                        new String[] {"check", "--checkpoint", golden("mixtral"), "--tokens", "0"},
                        new String[] {
                            "check",
                            "--checkpoint",
                            golden("mixtral"),
                            "--gpus",
                            "2",
                            "--ranks",
                            "2,4"
                        },
                        new String[] {
                            "check", "--checkpoint", golden("mixtral"), "--backend", "tpu"
                        },
                        new String[] {"plan"},
                        new String[] {"plan", "--preset", "mixtral-8x7b", "--budget", "much"},
                        new String[] {"demo", "--steps", "0"},
                        new String[] {"fly"})) {
            Run run = run(args);
            assertThat(run.exitCode()).as(String.join(" ", args)).isEqualTo(ExitCodes.BAD_INPUT);
            assertThat(run.err()).as(String.join(" ", args)).isNotBlank();
        }
    }

    @Test
    void shouldNameAFolderThatIsMissingWithoutAStackTrace() {
        for (String command : List.of("check", "demo", "plan")) {
            Run run = run(command, "--checkpoint", "no/such/folder", "--backend", "cpu");
            assertThat(run.exitCode()).as(command).isEqualTo(ExitCodes.BAD_INPUT);
            assertThat(run.err().lines()).as(command).hasSize(1);
            assertThat(run.err()).contains("no/such/folder");
        }
    }

    @Test
    void shouldPrintAStackTraceOnlyWhenAskedFor() {
        Run run = run("check", "--checkpoint", "no/such/folder", "--stacktrace");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains("\tat io.moe4j.cli");
    }

    @Test
    void shouldNameAGoldenFileThatIsMissingOrBroken() throws IOException {
        Path broken = Files.write(temp.resolve("broken.safetensors"), new byte[] {1, 2, 3});
        for (String file : List.of(temp.resolve("missing").toString(), broken.toString())) {
            Run run = run("check", "--checkpoint", golden("mixtral"), "--golden", file);
            assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
            assertThat(run.err()).contains(file);
        }
    }

    @Test
    void shouldRefuseTheGoldenFileOfAnotherCheckpoint() {
        String other = GOLDEN.resolve("deepseek_v3/golden.safetensors").toString();
        Run run = run("check", "--checkpoint", golden("qwen3_moe"), "--golden", other);
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains("layer1.t1.topk_ids").contains("another checkpoint");
    }

    @Test
    void shouldListTheRecordedCasesWhenNoneMatches() {
        Run run = run("check", "--checkpoint", golden("mixtral"), "--layer", "9");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains("no case with that layer", "layer 1 with 37 tokens");
    }

    @Test
    void shouldListThePresetsWhenOneIsUnknown() {
        for (String command : List.of("plan", "demo")) {
            Run run = run(command, "--preset", "gpt-9");
            assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
            assertThat(run.err()).contains("gpt-9").contains("qwen3-30b-a3b");
        }
    }

    @Test
    void shouldExitWithThreeWhenAGpuIsAskedForAndNoneIsUsable() {
        assumeFalse(gpuIsUsable(), "this machine has a usable GPU");
        for (String command : List.of("check", "demo")) {
            Run run = run(command, "--checkpoint", golden("mixtral"), "--backend", "cuda");
            assertThat(run.exitCode()).isEqualTo(ExitCodes.NO_GPU);
            assertThat(run.err().lines()).hasSize(1);
            assertThat(run.err()).contains("cuda");
        }
        assertThat(run("info", "--require-gpu").exitCode()).isEqualTo(ExitCodes.NO_GPU);
    }

    @Test
    void shouldShowTheFlowOfADemoStageByStage() {
        Run run = run("demo", "--backend", "cpu", "--steps", "2");
        assertThat(run.exitCode()).as(run.err()).isEqualTo(ExitCodes.OK);
        assertThat(run.out())
                .contains("1 route", "2 dispatch", "3 experts", "4 combine", "5 compare", "OK: ");
    }

    @Test
    void shouldCompareEveryStageWhenDebugSyncIsAskedFor() throws IOException {
        String[] args = {
            "check",
            "--checkpoint",
            golden("deepseek_v3"),
            "--backend",
            "cpu",
            "--ranks",
            "3",
            "--tokens",
            "8",
            "--debug-sync"
        };
        Run text = run(args);
        assertThat(text.exitCode()).as(text.err()).isEqualTo(ExitCodes.OK);
        assertThat(text.out())
                .contains(
                        "debug-sync: layer 1, 8 tokens, 3 ranks, cpu: all 17 stages agree",
                        "OK: 1 of 1 cases agree");
        String[] json = Arrays.copyOf(args, args.length + 1);
        json[args.length] = "--json";
        JsonNode report = JSON.readTree(run(json).out());
        assertThat(report.get("pass").asBoolean()).isTrue();
        assertThat(report.get("debug").get(0).get("stages").get("stagesAgreeing").asInt())
                .isEqualTo(17);
        assertThat(report.get("debug").get(0).get("repeat").asText()).contains("--debug-sync");
    }

    @Test
    void shouldCompareEveryStageOfADemo() {
        Run run = run("demo", "--backend", "cpu", "--steps", "1", "--tokens", "8", "--debug-sync");
        assertThat(run.exitCode()).as(run.err()).isEqualTo(ExitCodes.OK);
        assertThat(run.out()).contains("all 16 stages agree");
    }

    @Test
    void shouldSayThatOnlyCudaHasHostSyncs() {
        Run run =
                run("check", "--checkpoint", golden("mixtral"), "--backend", "cpu", "--host-sync");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains("host syncs are checked on cuda only");
    }

    @Test
    void shouldSayWhatTheCudaBackendHasAndWhatIsMissing() throws IOException {
        JsonNode machine = JSON.readTree(run("info", "--json").out());
        for (JsonNode backend : machine.get("backends")) {
            if (backend.get("name").asText().equals("cuda")) {
                assertThat(backend.get("details").toString())
                        .contains("kernels: ", "jcuda: ", "jcublas: ", "jcudnn: ", "PDL: ")
                        .contains("cuBLAS: ", "cuDNN: ");
                if (!backend.get("usable").asBoolean()) {
                    assertThat(backend.get("reason").asText()).isNotBlank();
                }
                return;
            }
        }
        throw new AssertionError("no cuda backend");
    }

    @Test
    void shouldRefuseAPresetThatTheHeapCannotHold() {
        Run run = run("demo", "--preset", "kimi-k2", "--backend", "cpu");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(run.err()).contains("MOE4J_JAVA_OPTS=-Xmx");
    }

    @Test
    void shouldPlanOneRankOfSeveralGpus() {
        Run both = run("plan", "--preset", "qwen3-30b-a3b", "--backend", "cuda", "--ranks", "2");
        Run one = run("plan", "--preset", "qwen3-30b-a3b", "--gpus", "2");
        assertThat(one.exitCode()).as(one.err()).isEqualTo(ExitCodes.OK);
        assertThat(both.out())
                .contains("w_gate_up               768.0 MiB")
                .doesNotContain("lines");
        assertThat(one.out()).contains("w_gate_up               384.0 MiB", "dispatch_lines");
        Run confused = run("plan", "--preset", "qwen3-30b-a3b", "--gpus", "2", "--ranks", "4");
        assertThat(confused.exitCode()).isEqualTo(ExitCodes.BAD_INPUT);
        assertThat(confused.err()).contains("--gpus=2 and --ranks=4: give one of them");
    }

    @Test
    void shouldPlanAPresetAndFindTheLargestBatchInABudget() throws IOException {
        Run run =
                run(
                        "plan",
                        "--preset",
                        "qwen3-30b-a3b",
                        "--backend",
                        "cpu",
                        "--ranks",
                        "2",
                        "--budget",
                        "8GiB",
                        "--json");
        assertThat(run.exitCode()).as(run.err()).isEqualTo(ExitCodes.OK);
        JsonNode report = JSON.readTree(run.out());
        int largest = report.get("largestMaxTokensPerRank").asInt();
        assertThat(largest).isPositive();
        assertThat(planBytes(largest)).isLessThanOrEqualTo(8L << 30);
        assertThat(planBytes(largest + 1)).isGreaterThan(8L << 30);
        long sum = 0;
        for (JsonNode entry : report.get("entries")) {
            assertThat(entry.get("formula").asText()).isNotBlank();
            sum += entry.get("bytes").asLong();
        }
        assertThat(report.get("totalBytes").asLong()).isEqualTo(sum);
    }

    @Test
    void shouldSayWhenNotEvenOneTokenFits() {
        Run run =
                run(
                        "plan",
                        "--checkpoint",
                        golden("mixtral"),
                        "--backend",
                        "cpu",
                        "--budget",
                        "1k");
        assertThat(run.exitCode()).isEqualTo(ExitCodes.OK);
        assertThat(run.out()).contains("total").contains("not even one token");
    }

    @Test
    void shouldDescribeTheMachine() throws IOException {
        Run text = run("info");
        assertThat(text.exitCode()).isEqualTo(ExitCodes.OK);
        assertThat(text.out()).contains("JDK", "heap", "cpu");
        JsonNode machine = JSON.readTree(run("info", "--json").out());
        assertThat(machine.get("processors").asInt()).isPositive();
        assertThat(machine.get("backends")).isNotEmpty();
        assertThat(machine.get("backends").get(0).get("reason").asText()).isNotBlank();
    }

    @Test
    void shouldHelpAndTellItsVersion() {
        assertThat(run("--version").out()).startsWith("moe4j ");
        for (String command : List.of("check", "demo", "plan", "info")) {
            Run run = run(command, "--help");
            assertThat(run.exitCode()).isEqualTo(ExitCodes.OK);
            assertThat(run.out()).contains("Usage: moe4j " + command);
        }
    }

    private long planBytes(int maxTokens) throws IOException {
        Run run =
                run(
                        "plan",
                        "--preset",
                        "qwen3-30b-a3b",
                        "--backend",
                        "cpu",
                        "--ranks",
                        "2",
                        "--max-tokens",
                        Integer.toString(maxTokens),
                        "--json");
        return JSON.readTree(run.out()).get("totalBytes").asLong();
    }

    private static Run run(String... args) {
        StringWriter out = new StringWriter();
        StringWriter err = new StringWriter();
        CommandLine commandLine =
                Main.commandLine()
                        .setOut(new PrintWriter(out))
                        .setErr(new PrintWriter(err))
                        .setColorScheme(
                                CommandLine.Help.defaultColorScheme(CommandLine.Help.Ansi.OFF));
        int exitCode = commandLine.execute(args);
        return new Run(exitCode, out.toString(), err.toString());
    }

    private static String golden(String name) {
        return GOLDEN.resolve(name).toString();
    }

    private Path copyOfGolden(String name) throws IOException {
        Path folder = Files.createDirectory(temp.resolve(name));
        try (var files = Files.list(GOLDEN.resolve(name))) {
            for (Path file : files.toList()) {
                Files.copy(file, folder.resolve(file.getFileName()));
            }
        }
        return folder;
    }

    /** Negates the first eight values of one row of an F32 tensor in a safetensors file. */
    private static void corrupt(Path file, String tensor, int row) throws IOException {
        ByteBuffer bytes = ByteBuffer.wrap(Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN);
        int headerBytes = Math.toIntExact(bytes.getLong(0));
        JsonNode info = JSON.readTree(bytes.array(), 8, headerBytes).get(tensor);
        int width = info.get("shape").get(1).asInt();
        int start = 8 + headerBytes + info.get("data_offsets").get(0).asInt() + row * width * 4;
        for (int i = 0; i < 8; i++) {
            bytes.putFloat(start + 4 * i, -bytes.getFloat(start + 4 * i));
        }
        Files.write(file, bytes.array());
    }

    private static boolean gpuIsUsable() {
        return Moe.backends().stream()
                .filter(provider -> provider.name().equals("cuda"))
                .map(BackendProvider::availability)
                .anyMatch(BackendProvider.Availability::usable);
    }
}
