package io.moe4j.cli;

import io.moe4j.bench.BenchReport;
import io.moe4j.bench.Chart;
import io.moe4j.bench.Plots;
import java.io.IOException;
import java.nio.file.Path;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;
import picocli.CommandLine.Parameters;

/** {@code moe4j plot}: a report of {@code moe4j bench} as a picture. */
@Command(
        name = "plot",
        description = {
            "Draws a JSON report of moe4j bench: time / floor of each case beside peers, time over"
                    + " tokens, or rate over intensity. Needs XChart and java.desktop."
        })
final class PlotCommand extends BaseCommand {
    @Parameters(paramLabel = "REPORT.json", description = "The report.")
    private Path report;

    @Option(
            names = {"-o", "--out"},
            paramLabel = "FILE",
            required = true,
            description = "What to write; it ends with .svg or .png.")
    private Path file;

    @Option(
            names = "--kind",
            paramLabel = "KIND",
            description = {
                "One of ${COMPLETION-CANDIDATES}; without it, floor for reports of cases, else"
                        + " latency."
            })
    private Chart.Kind kind;

    @Override
    public Integer call() throws IOException {
        Plots.isSvg(file);
        BenchReport read = BenchReport.read(report);
        Chart chart = Chart.of(read, kind == null ? Chart.kindFor(read) : kind);
        Plots.write(chart, file);
        out().println(file);
        out().flush();
        return ExitCodes.OK;
    }
}
