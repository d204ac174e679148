package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class RoutingPatternTest {
    private static final int TOKENS = 1000;
    private static final int EXPERTS = 64;
    private static final int K = 8;

    @TempDir private Path folder;

    @ParameterizedTest
    @ValueSource(strings = {"uniform", "zipf:1.2", "zipf:0", "hot1"})
    void shouldChooseDifferentExpertsAndDependOnTheSeedAlone(String text) throws IOException {
        RoutingPattern pattern = RoutingPattern.parse(text);
        int[] ids = pattern.ids(TOKENS, EXPERTS, K, 5);
        assertThat(ids).isEqualTo(RoutingPattern.parse(text).ids(TOKENS, EXPERTS, K, 5));
        assertThat(ids).isNotEqualTo(pattern.ids(TOKENS, EXPERTS, K, 6));
        for (int token = 0; token < TOKENS; token++) {
            int[] row = Arrays.copyOfRange(ids, token * K, (token + 1) * K);
            assertThat(Arrays.stream(row).distinct().count()).isEqualTo(K);
            assertThat(Arrays.stream(row).allMatch(id -> id >= 0 && id < EXPERTS)).isTrue();
        }
        assertThat(Arrays.stream(RoutingPattern.counts(ids, 0, EXPERTS)).sum())
                .isEqualTo(TOKENS * K);
    }

    @Test
    void shouldSpreadUniformly() throws IOException {
        assertThat(sortedCounts("uniform")[0]).isGreaterThan(TOKENS * K / EXPERTS / 2);
    }

    @Test
    void shouldFallOffWithTheRankUnderZipf() throws IOException {
        int[] counts = sortedCounts("zipf:1.2");
        assertThat(counts[EXPERTS - 1]).isGreaterThan(TOKENS * 8 / 10);
        assertThat(counts[0]).isLessThan(TOKENS * K / EXPERTS / 2);
        double middle = counts[EXPERTS - 16];
        assertThat(counts[EXPERTS - 4] / middle).isGreaterThan(2);
    }

    @Test
    void shouldSendEveryTokenToTheHotExpert() throws IOException {
        int[] counts = sortedCounts("hot1");
        assertThat(counts[EXPERTS - 1]).isEqualTo(TOKENS);
        assertThat(counts[EXPERTS - 2]).isLessThan(TOKENS / 4);
    }

    @Test
    void shouldReadIdsFromAFileAndUseThemAgain() throws IOException {
        Path file = folder.resolve("ids.txt");
        Files.writeString(file, "# two tokens\n1 2\n[3, 0]\n");
        RoutingPattern pattern = RoutingPattern.parse("file:" + file);
        assertThat(pattern.ids(3, 4, 2, 1)).containsExactly(1, 2, 3, 0, 1, 2);
        assertThat(pattern.isUniform()).isFalse();
        assertThatThrownBy(() -> pattern.ids(1, 4, 3, 1)).hasMessageContaining("not 3 different");
        assertThatThrownBy(() -> pattern.ids(2, 3, 2, 1)).hasMessageContaining("below 3");
        Files.writeString(file, "1 x\n");
        assertThatThrownBy(() -> RoutingPattern.parse("file:" + file))
                .hasMessageContaining("line 1");
        Files.writeString(file, "\n");
        assertThatThrownBy(() -> RoutingPattern.parse("file:" + file))
                .hasMessageContaining("has no ids");
    }

    @ParameterizedTest
    @ValueSource(strings = {"", "zipf", "zipf:", "zipf:-1", "zipf:x", "hot2", "file:", "UNIFORM"})
    void shouldRefuseUnknownPatterns(String text) {
        assertThatThrownBy(() -> RoutingPattern.parse(text))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("zipf:S");
    }

    @Test
    void shouldCountOnlyTheExpertsAskedFor() {
        assertThat(RoutingPattern.counts(new int[] {0, 2, 3, 3, -1, 5}, 2, 5))
                .containsExactly(1, 2, 0);
    }

    private static int[] sortedCounts(String text) throws IOException {
        int[] ids = RoutingPattern.parse(text).ids(TOKENS, EXPERTS, K, 3);
        int[] counts = RoutingPattern.counts(ids, 0, EXPERTS);
        Arrays.sort(counts);
        return counts;
    }
}
