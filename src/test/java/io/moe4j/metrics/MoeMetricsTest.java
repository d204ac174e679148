package io.moe4j.metrics;

import static org.assertj.core.api.Assertions.assertThat;

import io.micrometer.core.instrument.Tag;
import io.micrometer.core.instrument.simple.SimpleMeterRegistry;
import io.moe4j.HandlePool;
import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeLayer;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.lang.reflect.Proxy;
import java.util.List;
import org.junit.jupiter.api.Test;

/** Meters give what the layer counts, when a registry is read. */
class MoeMetricsTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 32, 8, 2);
    private final SimpleMeterRegistry registry = new SimpleMeterRegistry();

    private static MoeConfig config() {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 7))
                .backend("cpu")
                .maxTokensPerRank(4)
                .handles(2)
                .threads(2)
                .build();
    }

    private double count(String name) {
        return registry.get(name).tag("layer", "decoder.0").functionCounter().count();
    }

    private double gauge(String name, String... tags) {
        return registry.get(name).tags(tags).gauge().value();
    }

    @Test
    void shouldCountWhatTheLayerCounts() {
        Batch batch = Harness.random(SHAPE, 3, 7);
        batch.ids()[0][0] = 99;
        batch.ids()[1][1] = batch.ids()[1][0];
        Harness harness = new Harness(config());
        try (MoeMetrics metrics =
                new MoeMetrics(harness.layer, "decoder.0", List.of(Tag.of("model", "test")))) {
            metrics.bindTo(registry);
            assertThat(count("moe4j.steps")).isZero();
            harness.run(List.of(batch));
            harness.run(List.of(batch));
            harness.tokenCount(0, 9);
            harness.layer.enqueue(0, harness.step());
            assertThat(count("moe4j.steps")).isEqualTo(3);
            assertThat(count("moe4j.ids.dropped")).isEqualTo(3 + 2);
            assertThat(count("moe4j.ids.duplicate")).isEqualTo(3);
            assertThat(count("moe4j.tokens.over.capacity")).isEqualTo(5);
            assertThat(gauge("moe4j.epoch.valid", "handle", "0")).isEqualTo(3);
            assertThat(gauge("moe4j.epoch.valid", "handle", "1")).isZero();
            assertThat(gauge("moe4j.handles.free")).isEqualTo(2);
            try (HandlePool.Handle claimed = harness.layer.handles().claim()) {
                assertThat(gauge("moe4j.handles.free")).isEqualTo(1);
            }
            assertThat(gauge("moe4j.memory.planned", "backend", "cpu", "model", "test"))
                    .isEqualTo(Moe.plan(config()).totalBytes());
            assertThat(gauge("moe4j.faulted")).isZero();

            harness.layer.close();
            assertThat(count("moe4j.steps")).as("the last count").isEqualTo(3);
            assertThat(gauge("moe4j.epoch.valid", "handle", "0")).isNaN();
            assertThat(gauge("moe4j.faulted")).isNaN();
        }
        assertThat(registry.getMeters()).as("close takes them away").isEmpty();
    }

    @Test
    void shouldWorkBeforeTheLayerIsPrepared() {
        try (MoeLayer layer = Moe.open(config());
                MoeMetrics metrics = new MoeMetrics(layer, "decoder.0")) {
            metrics.bindTo(registry);
            assertThat(count("moe4j.steps")).isZero();
            assertThat(gauge("moe4j.epoch.valid", "handle", "0")).isNaN();
            layer.prepare();
            assertThat(gauge("moe4j.epoch.valid", "handle", "0")).isZero();
        }
    }

    @Test
    void shouldShowAFault() {
        try (MoeLayer layer = Moe.open(config())) {
            layer.prepare();
            MoeLayer faulted =
                    (MoeLayer)
                            Proxy.newProxyInstance(
                                    getClass().getClassLoader(),
                                    new Class<?>[] {MoeLayer.class},
                                    (proxy, method, args) -> {
                                        if (method.getName().equals("check")) {
                                            throw new MoeFaultException("dispatch_recv timed out");
                                        }
                                        return method.invoke(layer, args);
                                    });
            new MoeMetrics(faulted, "decoder.0").bindTo(registry);
            assertThat(gauge("moe4j.faulted")).isEqualTo(1);
        }
    }
}
