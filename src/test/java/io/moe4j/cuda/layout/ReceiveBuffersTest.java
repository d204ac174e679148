package io.moe4j.cuda.layout;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.Test;

/** What a rank keeps ready for its peers, beside a layout with a zone for each expert. */
class ReceiveBuffersTest {
    private static final int[][] SHAPES = {{7168, 256}, {2048, 128}};

    private static MoeConfig config(int gpus, int hidden, int experts, int tokens) {
        return MoeConfig.builder()
                .shape(MoeShape.of(hidden, 64, experts, 8))
                .maxTokensPerRank(tokens)
                .group(Group.inProcess(gpus).get(0))
                .build();
    }

    /**
     * Zones of R · M rows for each local expert on the way there, of M rows for each expert back.
     */
    private static long perExpert(int hidden, int experts, int tokens) {
        return 2L * experts * tokens * hidden * 2;
    }

    private static String row(int gpus, int hidden, int experts, int tokens) {
        MoeConfig config = config(gpus, hidden, experts, tokens);
        Region region = new DeviceLayout(config).symmetric();
        long rows = region.field("recv_rows").bytes() + region.field("combine_rows").bytes();
        long lines = 0;
        if (DeviceLayout.usesLines(config)) {
            lines = region.field("dispatch_lines").bytes() + region.field("combine_lines").bytes();
        }
        long ours = new DeviceLayout(config).symmetricBytes();
        long theirs = perExpert(hidden, experts, tokens);
        return String.format(
                "| %d | %d | %d | %d | %s | %s | %s | %s | %.1f |",
                gpus,
                hidden,
                experts,
                tokens,
                MemoryPlan.human(rows),
                lines == 0 ? "–" : MemoryPlan.human(lines),
                MemoryPlan.human(ours),
                MemoryPlan.human(theirs),
                (double) theirs / ours);
    }

    @Test
    void shouldCompareReceiveBuffersWithAZoneForEachExpert() throws IOException {
        List<String> table = new ArrayList<>();
        for (int[] shape : SHAPES) {
            for (int gpus : new int[] {2, 4, 8}) {
                for (int tokens : new int[] {32, 128}) {
                    table.add(row(gpus, shape[0], shape[1], tokens));
                }
            }
        }
        assertThat(Files.readString(Path.of("docs/memory.md")))
                .contains(String.join("\n", table) + "\n");
    }

    @Test
    void shouldPlanTheRegionOfOneRankWithWhatPadsItToWholePages() {
        MoeConfig config = config(2, 7168, 256, 128);
        DeviceLayout layout = new DeviceLayout(config);
        long planned =
                layout.plan().entries().stream()
                        .filter(
                                entry ->
                                        layout.symmetric().fields().stream()
                                                        .anyMatch(
                                                                f -> f.name().equals(entry.name()))
                                                || entry.name().contains("self"))
                        .mapToLong(MemoryPlan.Entry::bytes)
                        .sum();
        assertThat(layout.symmetricBytes() - planned)
                .as("each buffer is rounded up to 256 bytes")
                .isBetween(0L, 255L * layout.symmetric().fields().size());
    }
}
