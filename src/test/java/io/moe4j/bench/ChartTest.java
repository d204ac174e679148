package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

class ChartTest {
    private static final Path SAMPLES = Path.of("src/test/resources/bench");

    @TempDir private Path folder;

    private static BenchReport report() throws IOException {
        BenchReport report = BenchReport.read(SAMPLES.resolve("report.json"));
        return PeersFile.read(SAMPLES.resolve("peers.json")).merge(report);
    }

    @Test
    void shouldShowRatiosToTheFloorBesidePeers() throws IOException {
        Chart chart = Chart.of(report(), Chart.Kind.FLOOR);
        assertThat(Chart.kindFor(report())).isEqualTo(Chart.Kind.FLOOR);
        assertThat(chart.series())
                .extracting(Chart.Series::name)
                .containsExactly("moe4j", "torch_grouped_mm", "triton_masked");
        assertThat(chart.series().get(0).labels()).containsExactly("1", "10", "101");
        assertThat(chart.series().get(2).y().get(1)).as("failed").isNull();
        BenchReport alone = BenchReport.read(SAMPLES.resolve("report.json"));
        assertThat(Chart.of(alone, Chart.Kind.FLOOR).series())
                .extracting(Chart.Series::name)
                .contains("moe4j", "c_dg16", "c_pt16", "c_tri16");
    }

    @Test
    void shouldKeepRatesBelowTheRoof() throws IOException {
        Chart chart = Chart.of(report(), Chart.Kind.ROOFLINE);
        List<Double> roof = chart.series().get(0).y();
        assertThat(roof.get(roof.size() - 1)).isEqualTo(790e3);
        assertThat(chart.series()).extracting(Chart.Series::name).contains("qwen3-30b-a3b");
        BenchRow row = report().rows().get(2);
        Chart.Series chain =
                chart.series().stream()
                        .filter(s -> s.name().equals("qwen3-30b-a3b"))
                        .findFirst()
                        .orElseThrow();
        assertThat(chain.y().get(0)).isEqualTo(row.tflops() * 1e3);
        assertThat(chain.y().get(0)).isLessThan(chain.x().get(0) * 4.3e12 / 1e9);
    }

    @ParameterizedTest
    @EnumSource
    void shouldWriteAnSvgThatNamesItsSeriesAndFigures(Chart.Kind kind) throws IOException {
        Chart chart = Chart.of(report(), kind);
        Path file = folder.resolve("plot.svg");
        Plots.write(chart, file);
        String svg = Files.readString(file);
        assertThat(svg).contains("<svg").endsWith("</svg>\n").contains(chart.data());
        chart.series().forEach(series -> assertThat(svg).contains(series.name() + " | "));
    }

    @Test
    void shouldWriteAPng() throws IOException {
        Path file = folder.resolve("plot.png");
        Plots.write(Chart.of(report(), Chart.Kind.LATENCY), file);
        assertThat(Files.readAllBytes(file)).startsWith(0x89, 'P', 'N', 'G');
    }

    @Test
    void shouldRefuseWhatItCannotShow() throws IOException {
        BenchReport empty = new BenchReport(null, "", 1, List.of());
        assertThatThrownBy(() -> Chart.of(empty, Chart.Kind.ROOFLINE))
                .hasMessageContaining("no rows for a plot of kind roofline");
        assertThatThrownBy(
                        () -> Plots.write(Chart.of(report(), Chart.Kind.FLOOR), Path.of("x.pdf")))
                .hasMessageContaining("ends with neither .svg nor .png");
    }
}
