package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class BenchCaseTest {
    @TempDir private Path folder;

    private static BenchCase of(int topK, int ep, int tokens, int... counts) {
        return new BenchCase(
                0, "custom", 64, 32, counts.length, topK, ep, tokens, "file", counts, Map.of());
    }

    @Test
    void shouldReadEveryCaseWithItsExactCountsAndPeers() throws IOException {
        var cases = CaseFile.read(Path.of("bench/cases.json"));
        assertThat(cases).hasSize(10);
        BenchCase fifth = cases.get(3);
        assertThat(fifth.number()).isEqualTo(5);
        assertThat(fifth.model()).isEqualTo("qwen3-30b-a3b");
        assertThat(fifth.rows()).isEqualTo(693);
        assertThat(fifth.hitExperts()).isEqualTo(16);
        assertThat(fifth.allTokens()).isEqualTo(1024);
        assertThat(fifth.peersUs().get("ch")).containsEntry("c_tri16", 65.4);
    }

    @Test
    void shouldDealIdsThatGiveExactlyTheCounts() throws IOException {
        for (BenchCase benchCase : CaseFile.read(Path.of("bench/cases.json"))) {
            int width = Math.min(benchCase.topK(), benchCase.counts().length);
            int[] ids = benchCase.deal(width);
            assertThat(RoutingPattern.counts(ids, 0, benchCase.counts().length))
                    .as("case %d", benchCase.number())
                    .isEqualTo(benchCase.counts());
            for (int token = 0; token < benchCase.allTokens(); token++) {
                int[] valid =
                        Arrays.stream(ids, token * width, (token + 1) * width)
                                .filter(id -> id >= 0)
                                .toArray();
                assertThat(Arrays.stream(valid).distinct().count()).isEqualTo(valid.length);
            }
        }
    }

    @Test
    void shouldExpectTheRowsOfTheWholeGroup() throws IOException {
        assertThat(CaseFile.read(Path.of("bench/cases.json")))
                .extracting(BenchCase::expectedRows)
                .containsExactly(1, 2, 4, 64, 8, 32, 256, 1, 8, 32);
    }

    @Test
    void shouldDealTheFullestStepThereIs() {
        BenchCase full = of(2, 1, 3, 3, 3);
        assertThat(RoutingPattern.counts(full.deal(2), 0, 2)).containsExactly(3, 3);
    }

    @Test
    void shouldRefuseCountsThatNoStepCanHave() {
        assertThatThrownBy(() -> of(2, 1, 4, 5, 0)).hasMessageContaining("5 rows");
        assertThatThrownBy(() -> of(1, 1, 4, 4, 1)).hasMessageContaining("more rows");
        assertThatThrownBy(() -> of(1, 1, 0, 0)).hasMessageContaining("positive");
    }

    @Test
    void shouldSayWhatIsWrongWithACaseFile() throws IOException {
        Path file = folder.resolve("cases.json");
        Files.writeString(file, "{");
        assertThatThrownBy(() -> CaseFile.read(file)).hasMessageContaining("is not JSON");
        Files.writeString(file, "{}");
        assertThatThrownBy(() -> CaseFile.read(file)).hasMessageContaining("has no cases");
        Files.writeString(file, "{\"cases\":[{\"case\":1,\"local_experts\":2}]}");
        assertThatThrownBy(() -> CaseFile.read(file)).hasMessageContaining("0 counts");
        Files.writeString(
                file, "{\"cases\":[{\"case\":1,\"local_experts\":1,\"expert_counts\":[1]}]}");
        assertThatThrownBy(() -> CaseFile.read(file)).hasMessageContaining("no number hidden");
    }
}
