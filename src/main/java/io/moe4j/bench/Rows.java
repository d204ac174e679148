package io.moe4j.bench;

import java.util.LinkedHashMap;
import java.util.Map;

/** Makes rows of a report: rates, ratios and peers from what was measured. Stateless. */
final class Rows {
    private Rows() {}

    static BenchRow row(
            String bench,
            BenchCase of,
            Stage stage,
            BenchOptions options,
            int weightSets,
            Sample sample,
            Cost cost,
            String baseline,
            Double baselineUs,
            Double error) {
        double us = sample.medianUs();
        boolean onGpu = cost != null && options.backend().equals("cuda");
        Map<String, Double> peers = onGpu ? bf16Peers(of, stage) : Map.of();
        Map.Entry<String, Double> best =
                peers.entrySet().stream().min(Map.Entry.comparingByValue()).orElse(null);
        return new BenchRow(
                bench,
                of.number(),
                of.model(),
                of.hidden(),
                of.intermediate(),
                of.experts(),
                of.topK(),
                of.ep(),
                of.tokens(),
                of.routing(),
                stage.id(),
                options.backend(),
                options.mode(),
                options.cache(),
                weightSets,
                of.rows(),
                of.hitExperts(),
                us,
                sample.p20Us(),
                sample.p80Us(),
                sample.samples(),
                cost == null ? null : cost.flops() / us / 1e6,
                cost == null ? null : cost.weightBytes() / us / 1e3,
                onGpu ? cost.floorUs() : null,
                onGpu ? us / cost.floorUs() : null,
                baselineUs == null ? null : baseline,
                baselineUs,
                baselineUs == null ? null : baselineUs / us,
                best == null ? null : best.getKey(),
                best == null ? null : best.getValue(),
                best == null ? null : best.getValue() / us,
                peers.isEmpty() ? null : peers,
                error,
                null,
                null,
                null,
                null,
                null,
                null);
    }

    /** Peers of the same stage that compute in bfloat16: their names hold a 16. */
    private static Map<String, Double> bf16Peers(BenchCase of, Stage stage) {
        Map<String, Double> peers = new LinkedHashMap<>();
        of.peersUs()
                .getOrDefault(stage.id(), Map.of())
                .forEach(
                        (name, us) -> {
                            if (name.contains("16")) {
                                peers.put(name, us);
                            }
                        });
        return peers;
    }
}
