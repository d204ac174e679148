package io.moe4j.metrics;

import io.micrometer.core.instrument.FunctionCounter;
import io.micrometer.core.instrument.Gauge;
import io.micrometer.core.instrument.Meter;
import io.micrometer.core.instrument.MeterRegistry;
import io.micrometer.core.instrument.Tag;
import io.micrometer.core.instrument.Tags;
import io.micrometer.core.instrument.binder.MeterBinder;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeLayer;
import io.moe4j.SoftCounters;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.function.ToDoubleFunction;

/**
 * The counters of one layer as meters of Micrometer. They are read when a registry is read, from
 * host memory and on the thread that reads it: no step does anything for them, and none is waited
 * for. The layer stays the caller's. Close this before or after the layer; until then the meters of
 * a closed layer keep the last counts, and its gauges are NaN. Any thread.
 */
public final class MoeMetrics implements MeterBinder, AutoCloseable {
    private final MoeLayer layer;
    private final Tags tags;
    private final List<Map.Entry<MeterRegistry, Meter>> meters = new ArrayList<>();
    private volatile SoftCounters last = new SoftCounters(0, 0, 0, 0, 0);

    /**
     * Meters with the tags {@code layer=name} and {@code backend}.
     *
     * @param layer whose counters are read
     * @param name value of the tag {@code layer}; each layer of a registry needs its own
     */
    public MoeMetrics(MoeLayer layer, String name) {
        this(layer, name, List.of());
    }

    /**
     * Meters with more tags of your own.
     *
     * @param layer whose counters are read
     * @param name value of the tag {@code layer}; each layer of a registry needs its own
     * @param tags further tags
     */
    public MoeMetrics(MoeLayer layer, String name, Iterable<Tag> tags) {
        this.layer = layer;
        this.tags = Tags.of("layer", name, "backend", layer.backend()).and(tags);
    }

    @Override
    public synchronized void bindTo(MeterRegistry registry) {
        counter(registry, "moe4j.steps", "steps", "Steps completed", counters -> counters.steps());
        counter(
                registry,
                "moe4j.ids.dropped",
                "ids",
                "Expert ids outside -1..E-1, which were skipped",
                counters -> counters.droppedIds());
        counter(
                registry,
                "moe4j.ids.duplicate",
                "ids",
                "Repeats of an expert within a token",
                counters -> counters.duplicateIds());
        counter(
                registry,
                "moe4j.tokens.over.capacity",
                "tokens",
                "Tokens above the maximum, which were not processed",
                counters -> counters.overCapacityTokens());
        for (int h = 0; h < layer.config().handles(); h++) {
            int handle = h;
            gauge(
                    registry,
                    "moe4j.epoch.valid",
                    "steps",
                    "Number of the last step of a handle whose output is complete",
                    Tags.of("handle", Integer.toString(handle)),
                    l -> l.validEpoch(handle));
        }
        gauge(
                registry,
                "moe4j.handles.free",
                "handles",
                "Handles that nobody has claimed",
                Tags.empty(),
                l -> l.handles().free());
        gauge(
                registry,
                "moe4j.memory.planned",
                "bytes",
                "What prepare allocates",
                Tags.empty(),
                l -> l.plan().totalBytes());
        gauge(
                registry,
                "moe4j.faulted",
                null,
                "1 after a step has failed",
                Tags.empty(),
                MoeMetrics::faulted);
    }

    private void counter(
            MeterRegistry registry,
            String name,
            String unit,
            String description,
            ToDoubleFunction<SoftCounters> value) {
        // why this: a registry holds what it reads weakly, but the function for good
        FunctionCounter counter =
                FunctionCounter.builder(name, layer, l -> value.applyAsDouble(counters()))
                        .tags(tags)
                        .baseUnit(unit)
                        .description(description)
                        .register(registry);
        meters.add(Map.entry(registry, counter));
    }

    private SoftCounters counters() {
        try {
            last = layer.counters();
        } catch (IllegalStateException notPreparedOrClosed) {
            return last;
        }
        return last;
    }

    private void gauge(
            MeterRegistry registry,
            String name,
            String unit,
            String description,
            Tags more,
            ToDoubleFunction<MoeLayer> value) {
        Gauge gauge =
                Gauge.builder(name, layer, l -> orNaN(l, value))
                        .strongReference(true)
                        .tags(tags.and(more))
                        .baseUnit(unit)
                        .description(description)
                        .register(registry);
        meters.add(Map.entry(registry, gauge));
    }

    private static double orNaN(MoeLayer layer, ToDoubleFunction<MoeLayer> value) {
        try {
            return value.applyAsDouble(layer);
        } catch (IllegalStateException notPreparedOrClosed) {
            return Double.NaN;
        }
    }

    private static double faulted(MoeLayer layer) {
        try {
            layer.check();
            return 0;
        } catch (MoeFaultException e) {
            return 1;
        }
    }

    /** Removes the meters from their registries. Idempotent. */
    @Override
    public synchronized void close() {
        meters.forEach(entry -> entry.getKey().remove(entry.getValue()));
        meters.clear();
    }
}
