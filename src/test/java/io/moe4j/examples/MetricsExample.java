package io.moe4j.examples;

import io.micrometer.core.instrument.MeterRegistry;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.metrics.MoeMetrics;
import java.util.function.Consumer;

/** The program shown in docs/observability.md. */
final class MetricsExample {
    private MetricsExample() {}

    // docs: begin metrics
    static void serve(MoeConfig config, MeterRegistry registry, Consumer<MoeLayer> engine) {
        try (MoeLayer layer = Moe.open(config);
                MoeMetrics metrics = new MoeMetrics(layer, "decoder.3")) {
            layer.prepare();
            metrics.bindTo(registry); // Prometheus, OTLP, JMX: whatever the program has
            engine.accept(layer);
        }
    }
    // docs: end metrics
}
