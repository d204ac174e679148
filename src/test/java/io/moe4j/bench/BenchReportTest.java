package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.ProgressListener;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestFactory;
import org.junit.jupiter.api.io.TempDir;

class BenchReportTest {
    private static final BenchOptions CUDA =
            new BenchOptions("cuda", 1, true, true, "jcublas", 100, ProgressListener.NONE);

    @TempDir private Path folder;

    private static BenchReport report(double... medians) {
        BenchCase benchCase =
                new BenchCase(
                        5,
                        "a, \"b\"",
                        2048,
                        768,
                        128,
                        8,
                        8,
                        128,
                        "zipf",
                        new int[] {100, 0, 28},
                        Map.of("ch", Map.of("c_dg16", 60.0, "c_tri16", 50.0, "c_dg8", 10.0)));
        List<BenchRow> rows = new ArrayList<>();
        List<Stage> stages = List.of(Stage.CHAIN, Stage.G1, Stage.G2);
        for (int i = 0; i < medians.length; i++) {
            Cost cost = Cost.experts(stages.get(i), 2048, 768, 128, 2);
            Sample sample = Sample.of(new double[] {4 * medians[i]}, 4);
            rows.add(
                    Rows.row(
                            "experts",
                            benchCase,
                            stages.get(i),
                            CUDA,
                            22,
                            sample,
                            cost,
                            "jcublas",
                            200.0,
                            2.5e-3));
        }
        return new BenchReport(Map.of("gpu", "NVIDIA H200"), "moe4j bench experts", 1, rows);
    }

    @Test
    void shouldRelateTheMedianToFloorBaselineAndPeers() {
        BenchRow row = report(40).rows().get(0);
        Cost cost = Cost.experts(Stage.CHAIN, 2048, 768, 128, 2);
        assertThat(row.medianUs()).isEqualTo(40);
        assertThat(row.timesFloor()).isEqualTo(40 / cost.floorUs());
        assertThat(row.tflops()).isEqualTo(cost.flops() / 40 / 1e6);
        assertThat(row.gbPerS()).isEqualTo(cost.weightBytes() / 40 / 1e3);
        assertThat(row.fasterThanBaseline()).isEqualTo(5);
        assertThat(row.peer()).as("fp8 peers do not count").isEqualTo("c_tri16");
        assertThat(row.fasterThanPeer()).isEqualTo(1.25);
        assertThat(row.peersUs()).containsOnlyKeys("c_dg16", "c_tri16");
    }

    @Test
    void shouldSayNothingAboutFloorsOfAnotherMachine() {
        BenchOptions cpu =
                new BenchOptions("cpu", 1, false, false, null, 100, ProgressListener.NONE);
        BenchCase benchCase =
                new BenchCase(0, "m", 64, 32, 1, 1, 1, 1, "uniform", new int[] {1}, Map.of());
        BenchRow row =
                Rows.row(
                        "experts",
                        benchCase,
                        Stage.CHAIN,
                        cpu,
                        1,
                        new Sample(1, 1, 1, 5),
                        Cost.experts(Stage.CHAIN, 64, 32, 1, 1),
                        null,
                        null,
                        0.0);
        assertThat(row.floorUs()).isNull();
        assertThat(row.timesFloor()).isNull();
    }

    @Test
    void shouldReadWhatItWrote() throws IOException {
        BenchReport report = report(40, 30);
        Path file = folder.resolve("report.json");
        Files.writeString(file, report.toJson());
        assertThat(BenchReport.read(file)).isEqualTo(report);
        Files.writeString(file, "{\"seed\": 1}");
        assertThatThrownBy(() -> BenchReport.read(file)).hasMessageContaining("has no rows");
        Files.writeString(file, "[1]");
        assertThatThrownBy(() -> BenchReport.read(file)).hasMessageContaining("not a report");
    }

    @Test
    void shouldWriteOneCsvLinePerRowWithAsManyCellsAsColumns() {
        List<String> lines = report(40, 30).toCsv().lines().toList();
        assertThat(lines).hasSize(3);
        assertThat(lines.get(0)).startsWith("bench,case,model,");
        assertThat(lines.get(1)).contains("\"a, \"\"b\"\"\"").contains(",40.00,");
        int columns = lines.get(0).split(",").length;
        String plain = lines.get(1).replace("\"a, \"\"b\"\"\"", "ab");
        assertThat(plain.split(",", -1)).hasSize(columns);
    }

    @Test
    void shouldWriteATableWithEqualColumns() {
        List<String> table =
                report(40, 30).toMarkdown().lines().filter(l -> l.startsWith("|")).toList();
        assertThat(table).hasSize(4);
        long bars = table.get(0).chars().filter(c -> c == '|').count();
        assertThat(table).allMatch(line -> line.chars().filter(c -> c == '|').count() == bars);
        assertThat(report(40).toMarkdown())
                .contains("- gpu: NVIDIA H200")
                .contains("worst token off by 2.5e-03 from float64")
                .contains("| 40.0 |");
    }

    @Test
    void shouldFailWhatIsSlowerThanAllowedOnly() {
        Comparison comparison = Comparison.of(report(104, 106, 50), report(100, 100), 0.05);
        assertThat(comparison.lines()).hasSize(2);
        assertThat(comparison.slower()).hasSize(1).first().asString().contains("+6.0 %", " g1 ");
        assertThat(comparison.unmatched()).isEqualTo(1);
        assertThat(Comparison.of(report(50), report(100), 0).slower()).isEmpty();
    }

    @Test
    void shouldReadShares() {
        assertThat(Comparison.parseAllowed("5%")).isEqualTo(0.05);
        assertThat(Comparison.parseAllowed("0.1")).isEqualTo(0.1);
        for (String wrong : List.of("", "%", "-1%", "five", "NaN")) {
            assertThatThrownBy(() -> Comparison.parseAllowed(wrong)).hasMessageContaining("5%");
        }
    }

    @Test
    void shouldInterpolateQuantiles() {
        Sample sample = Sample.of(new double[] {50, 10, 30, 20, 40, 60}, 10);
        assertThat(sample.medianUs()).isEqualTo(3.5);
        assertThat(sample.p20Us()).isEqualTo(2);
        assertThat(sample.p80Us()).isEqualTo(5);
    }

    @Test
    void shouldRotateEnoughWeightsToBeCold() {
        assertThat(CUDA.weightSets(75e6)).isEqualTo(6);
        assertThat(CUDA.weightSets(2e9)).isEqualTo(1);
        assertThat(CUDA.weightSets(10)).isEqualTo(BenchOptions.MOST_WEIGHT_SETS);
        BenchOptions hot = new BenchOptions("cuda", 1, true, false, null, 1, ProgressListener.NONE);
        assertThat(hot.weightSets(1)).isEqualTo(1);
    }

    /** A figure lives in the JSON; the tables beside it are printed from it. */
    @TestFactory
    Stream<DynamicTest> shouldShowCommittedResultsAsTheirJsonHasThem() throws IOException {
        List<Path> files;
        try (Stream<Path> all = Files.walk(Path.of("bench/results"))) {
            files =
                    all.filter(f -> f.toString().endsWith(".json"))
                            .filter(f -> !f.getFileName().toString().startsWith("peers"))
                            .sorted()
                            .toList();
        }
        assertThat(files).isNotEmpty();
        return files.stream()
                .map(
                        json ->
                                DynamicTest.dynamicTest(
                                        json.toString(),
                                        () ->
                                                assertThat(tableBeside(json))
                                                        .hasContent(
                                                                BenchReport.read(json)
                                                                        .toMarkdown())));
    }

    private static Path tableBeside(Path json) {
        return Path.of(json.toString().replaceFirst("json$", "md"));
    }
}
