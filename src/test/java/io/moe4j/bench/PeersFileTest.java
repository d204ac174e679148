package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.within;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.moe4j.ProgressListener;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Times of peers.py beside ours: a sample of each form is in src/test/resources/bench. */
class PeersFileTest {
    private static final Path SAMPLES = Path.of("src/test/resources/bench");

    @TempDir private Path folder;

    private static BenchReport report() throws IOException {
        return BenchReport.read(SAMPLES.resolve("report.json"));
    }

    private static BenchReport merged() throws IOException {
        return PeersFile.read(SAMPLES.resolve("peers.json")).merge(report());
    }

    private static BenchRow row(BenchReport report, int number, Stage stage) {
        return report.rows().stream()
                .filter(r -> r.number() == number && r.stage().equals(stage.id()))
                .findFirst()
                .orElseThrow();
    }

    @Test
    void shouldPutTheFastestPeerOfTheRunBesideTheRecordedOnes() throws IOException {
        BenchRow row = row(merged(), 1, Stage.CHAIN);
        assertThat(row.runPeer()).isEqualTo("triton_masked");
        assertThat(row.runPeerUs()).isEqualTo(50);
        assertThat(row.fasterThanRunPeer()).isEqualTo(50 / row.medianUs());
        assertThat(row.runPeersUs()).containsOnlyKeys("torch_grouped_mm", "triton_masked");
        assertThat(row.peer()).as("of the case file").isEqualTo("c_pt16");
        assertThat(row(merged(), 1, Stage.G2).runPeer()).as("not measured").isNull();
        assertThat(row(merged(), 10, Stage.CHAIN).runPeersUs())
                .as("one failed")
                .containsOnlyKeys("torch_grouped_mm");
    }

    @Test
    void shouldNotCompareAnotherRouting() throws IOException {
        Path file = folder.resolve("peers.json");
        String text = Files.readString(SAMPLES.resolve("peers.json"));
        Files.writeString(file, text.replace("\"rows\": 8,", "\"rows\": 9,"));
        BenchReport merged = PeersFile.read(file).merge(report());
        assertThat(row(merged, 1, Stage.CHAIN).runPeer()).isNull();
    }

    @Test
    void shouldSummariseAgainstFloorsAndPeers() throws IOException {
        BenchReport report = merged();
        Summary summary = Summary.of(report);
        double first = row(report, 1, Stage.CHAIN).timesFloor();
        double second = row(report, 10, Stage.CHAIN).timesFloor();
        Summary.StageMeans chain = summary.stages().get(0);
        assertThat(chain.stage()).isEqualTo("ch");
        assertThat(chain.rows()).as("without prefill").isEqualTo(2);
        assertThat(chain.timesFloor()).isCloseTo(Math.sqrt(first * second), within(1e-9));
        double ours = row(report, 1, Stage.CHAIN).medianUs() / 50;
        double other = row(report, 10, Stage.CHAIN).medianUs() / 144.9; // recorded: c_dg16
        assertThat(chain.timesPeer()).isCloseTo(Math.sqrt(ours * other), within(1e-9));
        assertThat(summary.slower())
                .extracting(Summary.Standing::label)
                .containsExactly(
                        "case 10 qwen3-235b-a22b EP16 T256 zipf",
                        "case 10 qwen3-235b-a22b EP16 T256 zipf",
                        "case 10 qwen3-235b-a22b EP16 T256 zipf",
                        "case 101 qwen3-30b-a3b EP1 T4096");
        assertThat(summary.slower())
                .as("of the run's peers and the recorded ones the fastest")
                .extracting(Summary.Standing::peer)
                .containsExactly("dg16", "dg16", "c_dg16", "torch_grouped_mm");
        assertThat(summary.opportunities()).hasSize(3);
        assertThat(summary.prefill().get(0).ofDense()).isCloseTo(309.24 / 700, within(1e-4));
    }

    @Test
    void shouldComparePrefillWithTheDenseProductOfItsOwnRun() throws IOException {
        BenchReport report = report();
        BenchRow prefill = row(report, 101, Stage.CHAIN);
        BenchCase square =
                new BenchCase(
                        0,
                        "dense",
                        8192,
                        4096,
                        1,
                        1,
                        1,
                        8192,
                        "uniform",
                        new int[] {8192},
                        Map.of());
        Cost cost = Cost.experts(Stage.G1, 8192, 4096, 8192, 1);
        assertThat(cost.flops()).isEqualTo(2.0 * 8192 * 8192 * 8192);
        BenchOptions cuda = new BenchOptions("cuda", 1, true, true, null, 1, ProgressListener.NONE);
        double us = cost.flops() / 800e6;
        Sample sample = Sample.of(new double[] {us}, 1);
        BenchRow dense =
                Rows.row("dense", square, Stage.DENSE, cuda, 1, sample, cost, null, null, null);
        BenchReport with = new BenchReport(report.environment(), "", 1, List.of(prefill, dense));
        assertThat(with.toMarkdown())
                .contains("39 % of a dense 8192³ product")
                .doesNotContain("fastest peer");
        BenchReport both = PeersFile.read(SAMPLES.resolve("peers.json")).merge(with);
        double share = Summary.of(both).prefill().get(0).ofDense();
        assertThat(share).as("not the peers' product").isCloseTo(309.24 / 800, within(1e-4));
    }

    @Test
    void shouldShowPeersInEveryForm() throws IOException {
        BenchReport report = merged();
        String table = report.toMarkdown();
        assertThat(table)
                .contains("- peers of this run: torch 2.11.0, Triton 3.6.0, NVIDIA H200")
                .contains("- dense 8192³ product: 700 TFLOP/s")
                .contains("- peer not measured: case 10 ch triton_masked: OutOfResources")
                .contains("| triton_masked 50.0 | 1.70 |")
                .contains("- ch, 2 rows: geometric mean")
                .contains("44 % of a dense 8192³ product");
        List<String> lines = table.lines().filter(line -> line.startsWith("|")).toList();
        long bars = lines.get(0).chars().filter(c -> c == '|').count();
        assertThat(lines).allMatch(line -> line.chars().filter(c -> c == '|').count() == bars);
        assertThat(report.toCsv()).contains(",triton_masked,50.00,1.700,");
        Path file = folder.resolve("merged.json");
        Files.writeString(file, report.toJson());
        assertThat(BenchReport.read(file)).isEqualTo(report);
        JsonNode summary = new ObjectMapper().readTree(file.toFile()).path("summary");
        assertThat(summary.path("slower")).hasSize(4);
    }

    @Test
    void shouldDoubtPeersOfAnotherGpu() throws IOException {
        PeersFile peers = PeersFile.read(SAMPLES.resolve("peers.json"));
        assertThat(peers.doubts(report())).hasSize(1).first().asString().contains("are missing");
        Map<String, String> other = Map.of("gpu", "NVIDIA H100", "driver", "580.159.04");
        assertThat(peers.doubts(new BenchReport(other, "", 1, report().rows())))
                .anyMatch(line -> line.contains("with gpu NVIDIA H200, not NVIDIA H100"));
        assertThat(peers.doubts(new BenchReport(Map.of(), "", 1, List.of())))
                .anyMatch(line -> line.contains("no peer was measured on a case"));
    }

    @ParameterizedTest
    @CsvSource(
            delimiter = '|',
            value = {
                "{} | has no cases",
                "{\"cases\":[{\"case\":1}]} | has no case, stage or peer",
                "{ | is not JSON"
            })
    void shouldExplainWhatIsNoPeersFile(String text, String message) throws IOException {
        Path file = Files.writeString(folder.resolve("peers.json"), text);
        assertThatThrownBy(() -> PeersFile.read(file))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining(message);
    }

    @Test
    void shouldDrawPrefillRoutingFromTheSeed() throws IOException {
        List<BenchCase> cases = Prefill.cases(1);
        assertThat(cases).extracting(BenchCase::rows).containsExactly(4096 * 8, 4096 * 2);
        assertThat(cases.get(0).counts()).isEqualTo(Prefill.cases(1).get(0).counts());
        assertThat(cases.get(0).counts()).isNotEqualTo(Prefill.cases(2).get(0).counts());
        assertThat(CaseFile.read(Path.of("bench/prefill.json")))
                .usingRecursiveComparison()
                .isEqualTo(cases);
    }

    /** The script measures by the same rules as {@code moe4j bench}. */
    @Test
    void shouldMeasurePeersByOurRules() throws IOException {
        Map<String, Double> rules = new HashMap<>();
        Matcher constant =
                Pattern.compile("(?m)^([A-Z_]+) = ([\\d_.e]+)$")
                        .matcher(Files.readString(Path.of("bench/peers/peers.py")));
        while (constant.find()) {
            rules.put(constant.group(1), Double.parseDouble(constant.group(2).replace("_", "")));
        }
        assertThat(rules)
                .containsEntry("ROTATION_BYTES", (double) BenchOptions.ROTATION_BYTES)
                .containsEntry("MOST_SETS", (double) BenchOptions.MOST_WEIGHT_SETS)
                .containsEntry("GRAPH_US", CudaTimer.GRAPH_US)
                .containsEntry("MOST_ROUNDS", (double) CudaTimer.MOST_ROUNDS)
                .containsEntry("MOST_SAMPLES", (double) CudaTimer.MOST_SAMPLES)
                .containsEntry("FEWEST_SAMPLES", (double) CudaTimer.FEWEST_SAMPLES)
                .containsEntry("WARM_UP_US", CudaTimer.WARM_UP_US);
    }
}
