package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.within;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The cases of dispatch and combine, and how a row of them stands beside others. */
class EpCaseTest {
    @TempDir private Path folder;

    private static BenchRow pair(int number, double us, String mode, EpCase of) {
        BenchCase ran =
                new BenchCase(
                        number,
                        "custom",
                        of.hidden(),
                        64,
                        of.experts(),
                        of.topK(),
                        of.ranks(),
                        of.tokens(),
                        "uniform",
                        new int[] {1},
                        Map.of());
        BenchOptions options = new BenchOptions("cuda", 1, true, true, null, 5, (at, of1) -> {});
        return Rows.row(
                        "ep",
                        ran,
                        Stage.PAIR,
                        options,
                        1,
                        Sample.of(new double[] {us}, 1),
                        null,
                        null,
                        null,
                        1e-3)
                .of(mode, 3.2, of.peersUs(), of.aimUs());
    }

    @Test
    void shouldKnowTheAimAndThePeersOfEveryCase() throws IOException {
        List<EpCase> cases = EpCase.read(Path.of("bench/ep.json"));
        assertThat(cases).hasSize(14);
        assertThat(cases)
                .allSatisfy(
                        one -> {
                            assertThat(one.aimUs()).isBetween(8.0, 40.0);
                            assertThat(one.peersUs()).containsKeys("deepep_ll", "nccl_a2a");
                            assertThat(one.peersUs().values()).allMatch(us -> us > one.aimUs());
                        });
        assertThat(cases).filteredOn(one -> one.fits(2, 7168, 256, 8, 32)).hasSize(1);
    }

    @Test
    void shouldCompareAPairWithItsFastestPeerAndItsAim() throws IOException {
        EpCase one = EpCase.read(Path.of("bench/ep.json")).get(0);
        BenchRow row = pair(one.number(), 10, "graph", one);
        assertThat(row.peer()).isEqualTo("nccl_ag_rs");
        assertThat(row.fasterThanPeer()).isCloseTo(1.29, within(1e-9));
        assertThat(row.timesFloor()).isCloseTo(10 / 3.2, within(1e-9));
        BenchReport report = new BenchReport(Map.of(), "moe4j", 1, List.of(row));
        assertThat(report.toMarkdown()).contains("| aim µs |").contains("| 1.29 | 8.0 |");
        assertThat(report.toCsv()).contains(",aim_us,");
        Path file = folder.resolve("report.json");
        Files.writeString(file, report.toJson());
        assertThat(BenchReport.read(file).rows().get(0).aimUs()).isEqualTo(8);
    }

    @Test
    void shouldPutCollectivesOfTheRunBesidePairsThatNobodyDelayed() throws IOException {
        EpCase one = EpCase.read(Path.of("bench/ep.json")).get(0);
        Path file = folder.resolve("nccl.json");
        Files.writeString(
                file,
                "{\"gpu\":\"G\",\"nccl\":\"2.28.9\",\"cases\":["
                        + "{\"case\":1,\"stage\":\"pair\",\"peer\":\"nccl_a2a\",\"median_us\":15.5},"
                        + "{\"case\":1,\"stage\":\"pair\",\"peer\":\"nccl_ag_rs\",\"error\":\"x\"}]}");
        BenchReport report =
                new BenchReport(
                        Map.of("gpu", "G"),
                        "moe4j",
                        1,
                        List.of(
                                pair(1, 10, "graph", one),
                                pair(2, 10, "graph", one),
                                pair(1, 12, "graph, 50 µs apart", one)));
        PeersFile peers = PeersFile.read(file);
        BenchReport merged = peers.merge(report);
        assertThat(merged.rows())
                .extracting(BenchRow::runPeer)
                .containsExactly("nccl_a2a", null, null);
        assertThat(merged.toMarkdown()).contains("- peers of this run: NCCL 2.28.9, G\n");
        assertThat(peers.doubts(report)).singleElement().asString().contains("nccl_ag_rs: x");
    }

    @Test
    void shouldNameTheFileAndTheFieldOfABadCase() throws IOException {
        Path file = folder.resolve("ep.json");
        Files.writeString(file, "{\"cases\":[{\"case\":1,\"ep\":0}]}");
        assertThatThrownBy(() -> EpCase.read(file))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining(file + ": a case has no positive ep: 1");
        Files.writeString(file, "{}");
        assertThatThrownBy(() -> EpCase.read(file)).hasMessageContaining("has no cases");
    }
}
