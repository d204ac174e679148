package io.moe4j.bench;

import com.fasterxml.jackson.annotation.JsonInclude;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.function.ToDoubleFunction;
import java.util.stream.Collectors;

/**
 * How a report stands against its floors and its peers: of each row the fastest one counts, whether
 * it was measured in the same run or is recorded in the case file.
 *
 * @param stages per stage, without prefill
 * @param slower rows slower than the fastest peer
 * @param opportunities rows of the chain where the fastest peer needs more than {@link
 *     #FAR_FROM_FLOOR} of the floor
 * @param prefill rows of prefill beside the dense product: ours by cuBLAS, else that of the peers
 */
public record Summary(
        List<StageMeans> stages,
        List<Standing> slower,
        List<Standing> opportunities,
        List<DenseShare> prefill) {
    /** A peer above this multiple of the floor left something to gain. */
    public static final double FAR_FROM_FLOOR = 1.3;

    /**
     * Geometric means of one stage.
     *
     * @param stage its id
     * @param rows how many
     * @param timesFloor of median / floor
     * @param timesPeer of median / fastest peer; null without peers
     */
    @JsonInclude(JsonInclude.Include.NON_NULL)
    public record StageMeans(String stage, int rows, double timesFloor, Double timesPeer) {}

    /**
     * One row beside the fastest peer.
     *
     * @param label case, model, ranks, tokens
     * @param stage its id
     * @param us our median
     * @param peer name of the fastest peer
     * @param peerUs its median
     * @param gain peer / ours: above 1 we are faster
     * @param peerTimesFloor peer / floor
     */
    public record Standing(
            String label,
            String stage,
            double us,
            String peer,
            double peerUs,
            double gain,
            double peerTimesFloor) {
        private static Standing of(BenchRow row) {
            return new Standing(
                    row.label(),
                    row.stage(),
                    row.medianUs(),
                    row.fastestPeer(),
                    row.fastestPeerUs(),
                    row.fastestPeerUs() / row.medianUs(),
                    row.fastestPeerUs() / row.floorUs());
        }
    }

    /**
     * A row of prefill beside the dense 8192³ product.
     *
     * @param label case, model, ranks, tokens
     * @param stage its id
     * @param tflops ours
     * @param ofDense ours / dense; null if the dense product was not measured
     */
    @JsonInclude(JsonInclude.Include.NON_NULL)
    public record DenseShare(String label, String stage, double tflops, Double ofDense) {}

    /** Whether there is something to compare a report with: peers or a dense product of its run. */
    static boolean fits(BenchReport report) {
        return report.peers() != null || denseTflops(report) != null;
    }

    private static Double denseTflops(BenchReport report) {
        return denseTflops(report, report.rows());
    }

    /** Of the first dense product among the rows, else of that of the peers. */
    private static Double denseTflops(BenchReport report, List<BenchRow> rows) {
        return rows.stream()
                .filter(row -> row.stage().equals(Stage.DENSE.id()))
                .findFirst()
                .map(BenchRow::tflops)
                .orElse(report.peers() == null ? null : report.peers().denseTflops());
    }

    /** Prefill is judged by the dense product that follows it. */
    private static List<DenseShare> prefill(BenchReport report) {
        List<DenseShare> shares = new ArrayList<>();
        List<BenchRow> rows = report.rows();
        for (int i = 0; i < rows.size(); i++) {
            if (rows.get(i).floorUs() != null && rows.get(i).isPrefill()) {
                shares.add(dense(rows.get(i), denseTflops(report, rows.subList(i, rows.size()))));
            }
        }
        return shares;
    }

    /**
     * {@return the summary of a report whose rows have floors}
     *
     * @param report the report
     */
    public static Summary of(BenchReport report) {
        List<BenchRow> rows = report.rows().stream().filter(r -> r.floorUs() != null).toList();
        List<BenchRow> beside = rows.stream().filter(r -> r.fastestPeer() != null).toList();
        List<StageMeans> means = new ArrayList<>();
        for (Stage stage : List.of(Stage.CHAIN, Stage.G1, Stage.G2)) {
            List<BenchRow> mine =
                    rows.stream()
                            .filter(r -> r.stage().equals(stage.id()) && !r.isPrefill())
                            .toList();
            if (!mine.isEmpty()) {
                means.add(means(stage, mine));
            }
        }
        return new Summary(
                means,
                beside.stream()
                        .filter(row -> row.fastestPeerUs() < row.medianUs())
                        .map(Standing::of)
                        .toList(),
                beside.stream()
                        .filter(row -> row.stage().equals(Stage.CHAIN.id()))
                        .filter(row -> row.fastestPeerUs() > FAR_FROM_FLOOR * row.floorUs())
                        .map(Standing::of)
                        .toList(),
                prefill(report));
    }

    private static StageMeans means(Stage stage, List<BenchRow> rows) {
        List<BenchRow> beside = rows.stream().filter(row -> row.fastestPeer() != null).toList();
        return new StageMeans(
                stage.id(),
                rows.size(),
                geometric(rows, BenchRow::timesFloor),
                beside.isEmpty() ? null : geometric(beside, r -> r.medianUs() / r.fastestPeerUs()));
    }

    private static DenseShare dense(BenchRow row, Double dense) {
        return new DenseShare(
                row.label(),
                row.stage(),
                row.tflops(),
                dense == null ? null : row.tflops() / dense);
    }

    static double geometric(List<BenchRow> rows, ToDoubleFunction<BenchRow> value) {
        return Math.exp(
                rows.stream()
                        .mapToDouble(r -> Math.log(value.applyAsDouble(r)))
                        .average()
                        .orElse(0));
    }

    /** {@return the summary for people, one Markdown list item a line} */
    public List<String> lines() {
        List<String> lines = new ArrayList<>();
        for (StageMeans mean : stages) {
            lines.add(
                    text(
                                    "- %s, %d rows: geometric mean %.2f × floor",
                                    mean.stage, mean.rows, mean.timesFloor)
                            + (mean.timesPeer == null
                                    ? ""
                                    : text(", %.2f × the fastest peer", mean.timesPeer)));
        }
        if (stages.stream().anyMatch(mean -> mean.timesPeer != null)
                || !slower.isEmpty()
                || !opportunities.isEmpty()) {
            addPeers(lines);
        }
        for (DenseShare share : prefill) {
            lines.add(
                    text("- %s %s: %.0f TFLOP/s", share.label, share.stage, share.tflops)
                            + (share.ofDense == null
                                    ? ""
                                    : text(
                                            ", %.0f %% of a dense 8192³ product",
                                            100 * share.ofDense)));
        }
        return lines;
    }

    private void addPeers(List<String> lines) {
        lines.add(
                "- slower than the fastest peer: "
                        + listed(
                                slower,
                                s ->
                                        text(
                                                "%s %s %.0f µs, %s %.0f µs (%.2f)",
                                                s.label, s.stage, s.us, s.peer, s.peerUs, s.gain)));
        lines.add(
                text("- fastest peer above %.1f × floor: ", FAR_FROM_FLOOR)
                        + listed(
                                opportunities,
                                s ->
                                        text(
                                                "%s %s at %.2f × floor, ours %.2f times as fast",
                                                s.label, s.peer, s.peerTimesFloor, s.gain)));
    }

    private static String listed(
            List<Standing> standings, java.util.function.Function<Standing, String> text) {
        return standings.isEmpty()
                ? "none"
                : standings.stream().map(text).collect(Collectors.joining("; "));
    }

    private static String text(String format, Object... values) {
        return String.format(Locale.ROOT, format, values);
    }
}
