package io.moe4j.examples;

import static org.assertj.core.api.Assertions.assertThat;

import io.micrometer.core.instrument.Meter;
import io.micrometer.core.instrument.simple.SimpleMeterRegistry;
import io.moe4j.MoeConfig;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import org.junit.jupiter.api.Test;

/** The program of docs/observability.md runs, and the page lists the meters it makes. */
class MetricsExampleTest {
    @Test
    void shouldShowMetersWhileTheEngineRuns() {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(MoeShape.of(64, 32, 8, 2), 7))
                        .backend("cpu")
                        .maxTokensPerRank(4)
                        .build();
        SimpleMeterRegistry registry = new SimpleMeterRegistry();
        MetricsExample.serve(
                config,
                registry,
                layer ->
                        assertThat(registry.getMeters())
                                .extracting(Meter::getId)
                                .extracting(Meter.Id::getName)
                                .contains("moe4j.steps", "moe4j.faulted"));
        assertThat(registry.getMeters()).isEmpty();
    }
}
