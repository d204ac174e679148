package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.moe4j.bench.BenchCase;
import io.moe4j.bench.BenchReport;
import io.moe4j.bench.Plots;
import io.moe4j.bench.Prefill;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import org.junit.jupiter.api.Test;

/**
 * Figures and plots of the documentation are those of bench/results. With the property benchDocs
 * set to write, as {@code make bench-docs} does, the tests write them instead.
 */
class BenchDocsTest {
    private static final boolean WRITE = "write".equals(System.getProperty("benchDocs"));

    @Test
    void shouldPrintEveryTableFromItsJson() throws IOException {
        for (Path json : BenchDocs.reports()) {
            check(
                    Path.of(json.toString().replaceFirst("json$", "md")),
                    BenchReport.read(json).toMarkdown());
        }
    }

    @Test
    void shouldShowFiguresOfTheNewestResults() throws IOException {
        for (var page : new BenchDocs().regions().entrySet()) {
            String text = Files.readString(page.getKey());
            for (Map.Entry<String, String> region : page.getValue().entrySet()) {
                String begin = "<!-- bench: begin " + region.getKey() + " -->\n";
                String end = "<!-- bench: end " + region.getKey() + " -->";
                int from = text.indexOf(begin) + begin.length();
                int to = text.indexOf(end);
                assertThat(text).as(page.getKey().toString()).contains(begin).contains(end);
                text = text.substring(0, from) + region.getValue() + text.substring(to);
            }
            check(page.getKey(), text);
        }
    }

    /** Letters and curves depend on the fonts of a machine, the figures an SVG carries do not. */
    @Test
    void shouldPlotTheFiguresOfTheNewestResults() throws IOException {
        for (var plot : new BenchDocs().plots().entrySet()) {
            Path file = BenchDocs.IMAGES.resolve(plot.getKey());
            if (WRITE) {
                Files.createDirectories(BenchDocs.IMAGES);
                Plots.write(plot.getValue(), file);
            }
            assertThat(Files.readString(file))
                    .as("%s is old: run make bench-docs", file)
                    .contains("<desc>" + plot.getValue().data() + "</desc>");
        }
    }

    @Test
    void shouldKeepPrefillCasesForPeers() throws IOException {
        ObjectMapper mapper = new ObjectMapper();
        ObjectNode root = mapper.createObjectNode();
        ArrayNode cases = root.putArray("cases");
        for (BenchCase one : Prefill.cases(1)) {
            ObjectNode node = cases.addObject();
            node.put("case", one.number()).put("model", one.model());
            node.put("hidden", one.hidden()).put("intermediate", one.intermediate());
            node.put("experts", one.experts()).put("topk", one.topK()).put("ep", one.ep());
            node.put("tokens_per_rank", one.tokens()).put("routing", one.routing());
            node.put("local_experts", one.counts().length).put("rows", one.rows());
            node.set("expert_counts", mapper.valueToTree(one.counts()));
        }
        check(Path.of("bench/prefill.json"), root.toPrettyString() + "\n");
    }

    private static void check(Path file, String wanted) throws IOException {
        if (WRITE) {
            Files.writeString(file, wanted);
        }
        assertThat(Files.readString(file))
                .as("%s is old: run make bench-docs", file)
                .isEqualTo(wanted);
    }
}
