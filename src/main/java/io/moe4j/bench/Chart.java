package io.moe4j.bench;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;

/**
 * What a plot of a report shows, without a library to draw it: {@link ChartWriter} does that.
 * Immutable.
 *
 * @param kind what it shows
 * @param title above it
 * @param xTitle below it
 * @param yTitle beside it
 * @param series what it shows, in the order of the legend
 */
public record Chart(Kind kind, String title, String xTitle, String yTitle, List<Series> series) {
    /** What a plot can show. */
    public enum Kind {
        /** Median over tokens, a line for each model. */
        LATENCY,
        /** Median / floor of each case, bars beside those of peers. */
        FLOOR,
        /**
         * GFLOP/s of the chain over operations per byte, below the roofs of the floor's machine.
         */
        ROOFLINE;

        @Override
        public String toString() {
            return name().toLowerCase(Locale.ROOT);
        }
    }

    /**
     * Points of one colour.
     *
     * @param name in the legend
     * @param labels names on the x axis if it has names; else empty
     * @param x places on the x axis if it has numbers; else empty
     * @param y values; null where there is none
     */
    public record Series(String name, List<String> labels, List<Double> x, List<Double> y) {
        private static Series line(String name, Map<Double, Double> points) {
            return new Series(
                    name, List.of(), List.copyOf(points.keySet()), List.copyOf(points.values()));
        }
    }

    /**
     * {@return the kind that suits a report}
     *
     * @param report the report
     */
    public static Kind kindFor(BenchReport report) {
        boolean cases = report.rows().stream().anyMatch(row -> row.number() > 0);
        return cases && report.rows().stream().anyMatch(r -> r.floorUs() != null)
                ? Kind.FLOOR
                : Kind.LATENCY;
    }

    /**
     * {@return the plot of one kind}
     *
     * @param report the report
     * @param kind which plot
     * @throws IllegalArgumentException if the report has nothing to show in it
     */
    public static Chart of(BenchReport report, Kind kind) {
        Chart chart =
                switch (kind) {
                    case LATENCY -> latency(report);
                    case FLOOR -> floor(report);
                    case ROOFLINE -> roofline(report);
                };
        if (chart.series.isEmpty()) {
            throw new IllegalArgumentException(
                    "the report has no rows for a plot of kind "
                            + kind
                            + ": choose another --kind");
        }
        return chart;
    }

    private static Chart latency(BenchReport report) {
        Map<String, TreeMap<Double, Double>> lines = new LinkedHashMap<>();
        for (BenchRow row : report.rows()) {
            String name = row.model() + " EP" + row.ep() + " " + row.stage();
            if (!row.routing().equals("uniform")) {
                name += " " + row.routing();
            }
            lines.computeIfAbsent(name, n -> new TreeMap<>())
                    .put((double) row.tokens(), row.medianUs());
        }
        List<Series> series = new ArrayList<>();
        lines.forEach((name, points) -> series.add(Series.line(name, points)));
        return new Chart(
                Kind.LATENCY, title(report, "Time of a step"), "tokens of each rank", "µs", series);
    }

    private static Chart floor(BenchReport report) {
        List<BenchRow> rows =
                report.rows().stream()
                        .filter(row -> row.stage().equals(Stage.CHAIN.id()))
                        .filter(row -> row.floorUs() != null)
                        .toList();
        List<Series> series = new ArrayList<>();
        if (!rows.isEmpty()) {
            List<String> labels = rows.stream().map(Chart::caseLabel).toList();
            series.add(bars("moe4j", labels, rows.stream().map(BenchRow::timesFloor).toList()));
            Set<String> names = new LinkedHashSet<>();
            rows.forEach(row -> names.addAll(peers(report, row).keySet()));
            for (String name : names) {
                series.add(
                        bars(
                                name,
                                labels,
                                rows.stream().map(row -> timesFloor(report, row, name)).toList()));
            }
        }
        return new Chart(
                Kind.FLOOR, title(report, "Expert chain: time / floor"), "case", "× floor", series);
    }

    private static Series bars(String name, List<String> labels, List<Double> values) {
        // why not List.copyOf: a peer may lack a case
        return new Series(name, labels, List.of(), new ArrayList<>(values));
    }

    /** Peers of this run if there are any, else those that the case file recorded. */
    private static Map<String, Double> peers(BenchReport report, BenchRow row) {
        Map<String, Double> peers = report.peers() == null ? row.peersUs() : row.runPeersUs();
        Map<String, Double> shown = new LinkedHashMap<>(peers == null ? Map.of() : peers);
        // why: cuBLAS over the padded worst case would flatten all other bars
        shown.keySet().removeIf(name -> name.contains("bmm") || name.contains("loop"));
        return shown;
    }

    private static Double timesFloor(BenchReport report, BenchRow row, String peer) {
        Double us = peers(report, row).get(peer);
        return us == null ? null : us / row.floorUs();
    }

    private static String caseLabel(BenchRow row) {
        return row.number() == 0
                ? row.model() + " EP" + row.ep() + " T" + row.tokens()
                : "" + row.number();
    }

    private static Chart roofline(BenchReport report) {
        Map<String, TreeMap<Double, Double>> points = new LinkedHashMap<>();
        for (BenchRow row : report.rows()) {
            if (row.floorUs() == null || !row.stage().equals(Stage.CHAIN.id())) {
                continue;
            }
            Cost cost =
                    Cost.experts(
                            Stage.CHAIN,
                            row.hidden(),
                            row.intermediate(),
                            row.rows(),
                            row.hitExperts());
            points.computeIfAbsent(row.model(), n -> new TreeMap<>())
                    .put(cost.flops() / cost.bytes(), row.tflops() * 1e3);
        }
        List<Series> series = new ArrayList<>();
        if (!points.isEmpty()) {
            double ridge = Cost.FLOOR_FLOPS_PER_S / Cost.FLOOR_BYTES_PER_S;
            TreeMap<Double, Double> roof = new TreeMap<>();
            for (double x : new double[] {1, 10, 100, ridge, 4 * ridge}) {
                double flops = Math.min(x * Cost.FLOOR_BYTES_PER_S, Cost.FLOOR_FLOPS_PER_S);
                roof.put(x, flops / 1e9);
            }
            series.add(Series.line("floor: 4.3 TB/s, 790 TFLOP/s", roof));
            points.forEach((name, xy) -> series.add(Series.line(name, xy)));
        }
        return new Chart(
                Kind.ROOFLINE,
                title(report, "Expert chain: rate over intensity"),
                "operations per byte",
                "GFLOP/s",
                series);
    }

    private static String title(BenchReport report, String what) {
        String gpu = report.environment() == null ? null : report.environment().get("gpu");
        return gpu == null ? what : what + ", " + gpu;
    }

    /** {@return all figures, one line per point, as an SVG carries them: name, place, value} */
    public String data() {
        StringBuilder text = new StringBuilder(title).append('\n');
        for (Series one : series) {
            for (int i = 0; i < one.y.size(); i++) {
                if (one.y.get(i) != null) {
                    Object at = one.labels.isEmpty() ? number(one.x.get(i)) : one.labels.get(i);
                    text.append(one.name).append(" | ").append(at);
                    text.append(" | ").append(number(one.y.get(i))).append('\n');
                }
            }
        }
        return text.toString();
    }

    private static String number(double value) {
        return String.format(Locale.ROOT, "%.4g", value);
    }
}
