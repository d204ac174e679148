package io.moe4j.cpu;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.observe.Recorded;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import jdk.jfr.consumer.RecordedEvent;
import jdk.jfr.consumer.RecordingStream;
import org.junit.jupiter.api.Test;

/** The events of the Flight Recorder on the CPU backend, as they are recorded. */
class CpuEventsTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 32, 8, 2);

    private static MoeConfig config() {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 7))
                .backend("cpu")
                .maxTokensPerRank(4)
                .ranks(2)
                .threads(2)
                .build();
    }

    @Test
    void shouldRecordALayersLifeOnTheCpu() throws Exception {
        Batch batch = Harness.random(SHAPE, 3, 7);
        batch.ids()[0][0] = 99; // dropped
        batch.ids()[1][1] = batch.ids()[1][0]; // a duplicate
        MoeConfig config = config();
        List<RecordedEvent> events =
                Recorded.during(
                        "1 h",
                        () -> {
                            try (Harness harness = new Harness(config)) {
                                harness.run(List.of(batch, batch));
                                harness.tokenCount(1, 9);
                                try (MoeGraph graph = harness.layer.capture(0, harness.step())) {
                                    graph.launch(0);
                                    graph.launch(0);
                                }
                            }
                        });
        assertThat(events)
                .extracting(event -> event.getEventType().getName())
                .containsSubsequence(
                        "moe4j.LayerOpen",
                        "moe4j.LayerPrepare",
                        "moe4j.GraphCapture",
                        "moe4j.Replays",
                        "moe4j.Counters");
        RecordedEvent open = Recorded.of(events, "LayerOpen").get(0);
        assertThat(open.getString("backend")).isEqualTo("cpu");
        assertThat(open.getString("reason")).contains("cpu backend");
        assertThat(open.getInt("hidden")).isEqualTo(64);
        assertThat(open.getInt("intermediate")).isEqualTo(32);
        assertThat(open.getInt("experts")).isEqualTo(8);
        assertThat(open.getInt("topK")).isEqualTo(2);
        assertThat(open.getInt("ranks")).isEqualTo(2);
        assertThat(open.getInt("maxTokensPerRank")).isEqualTo(4);
        assertThat(open.getInt("handles")).isEqualTo(1);
        long planned = io.moe4j.Moe.plan(config).totalBytes();
        assertThat(open.getLong("plannedBytes")).isEqualTo(planned);
        int layer = open.getInt("layer");
        RecordedEvent prepare = Recorded.of(events, "LayerPrepare").get(0);
        assertThat(prepare.getInt("layer")).isEqualTo(layer);
        assertThat(prepare.getLong("plannedBytes")).isEqualTo(planned);
        assertThat(prepare.getString("failure")).isNull();
        assertThat(prepare.getDuration()).isPositive();
        RecordedEvent capture = Recorded.of(events, "GraphCapture").get(0);
        assertThat(capture.getInt("layer")).isEqualTo(layer);
        assertThat(capture.getInt("layers")).isEqualTo(1);
        assertThat(capture.getInt("parts")).isEqualTo(1);
        assertThat(capture.getLong("nodes")).isEqualTo(6);
        RecordedEvent replays = Recorded.of(events, "Replays").get(0);
        assertThat(replays.getInt("graph")).isEqualTo(capture.getInt("graph"));
        assertThat(replays.getLong("launches")).isEqualTo(2);
        assertThat(replays.getLong("total")).isEqualTo(2);
        List<RecordedEvent> counters = Recorded.of(events, "Counters");
        RecordedEvent last = counters.get(counters.size() - 1);
        assertThat(last.getInt("layer")).isEqualTo(layer);
        assertThat(last.getLong("enqueues")).isEqualTo(3);
        assertThat(last.getLong("steps")).isEqualTo(3);
        // rank 1 of the replays: M = 4 tokens of 9, the fourth with K poisoned ids
        assertThat(last.getLong("droppedIds")).isEqualTo(3 * 2 + 2 * 2);
        assertThat(last.getLong("duplicateIds")).isEqualTo(3 * 2);
        assertThat(last.getLong("overCapacityTokens")).isEqualTo(2 * 5);
    }

    @Test
    void shouldStreamReplaysInBatchesWhileALayerRuns() throws Exception {
        Batch batch = Harness.random(SHAPE, 1, 8);
        BlockingQueue<Long> launches = new LinkedBlockingQueue<>();
        BlockingQueue<Long> steps = new LinkedBlockingQueue<>();
        try (Harness harness = new Harness(config());
                MoeGraph graph = harness.layer.capture(0, harness.step());
                RecordingStream stream = new RecordingStream()) {
            harness.write(List.of(batch, batch));
            stream.enable("moe4j.Replays").with("period", "20 ms");
            stream.enable("moe4j.Counters").with("period", "20 ms");
            stream.onEvent("moe4j.Replays", event -> launches.add(event.getLong("launches")));
            stream.onEvent("moe4j.Counters", event -> steps.add(event.getLong("steps")));
            stream.startAsync();
            for (int i = 0; i < 500; i++) {
                graph.launch(0);
            }
            long told = 0;
            int events = 0;
            while (told < 500) {
                Long more = launches.poll(20, TimeUnit.SECONDS);
                assertThat(more).as("events that tell of %d replays", 500 - told).isNotNull();
                told += more;
                events++;
            }
            assertThat(told).isEqualTo(500);
            assertThat(events).as("far fewer events than replays").isLessThan(250);
            assertThat(steps.poll(20, TimeUnit.SECONDS)).isNotNull();
        }
    }

    @Test
    void shouldRecordWhyALayerCouldNotBePrepared() throws Exception {
        RandomWeights good = RandomWeights.of(SHAPE, 7);
        io.moe4j.model.LayerWeights broken =
                (io.moe4j.model.LayerWeights)
                        java.lang.reflect.Proxy.newProxyInstance(
                                getClass().getClassLoader(),
                                new Class<?>[] {io.moe4j.model.LayerWeights.class},
                                (proxy, method, args) -> {
                                    if (method.getName().equals("expert")) {
                                        throw new IllegalStateException("the file is gone");
                                    }
                                    return method.invoke(good, args);
                                });
        List<RecordedEvent> events =
                Recorded.during(
                        "1 h",
                        () -> {
                            MoeConfig config = config().toBuilder().weights(broken).build();
                            try (var layer = io.moe4j.Moe.open(config)) {
                                assertThatThrownBy(layer::prepare)
                                        .hasMessageContaining("the file is gone");
                            }
                        });
        assertThat(Recorded.of(events, "LayerPrepare").get(0).getString("failure"))
                .contains("the file is gone");
        assertThat(Recorded.of(events, "Counters")).as("nothing was prepared").isEmpty();
    }

    @Test
    void shouldRecordAFlagThatIsMissing() throws Exception {
        Batch batch = Harness.random(SHAPE, 3, 9);
        List<RecordedEvent> events =
                Recorded.during(
                        "1 h",
                        () -> {
                            try (Harness h = new Harness(config())) {
                                h.run(List.of(batch, batch));
                                h.layer.enqueue(0L, h.step(), Phase.ROUTE, Phase.DISPATCH_SEND);
                                ((CpuLayer) h.layer).rank(1).dispatchFlags[0]--;
                                assertThatThrownBy(
                                                () ->
                                                        h.layer.enqueue(
                                                                0L,
                                                                h.step(),
                                                                Phase.DISPATCH_RECV,
                                                                Phase.COMBINE_RECV))
                                        .isInstanceOf(MoeFaultException.class);
                            }
                        });
        RecordedEvent fault = Recorded.of(events, "Fault").get(0);
        assertThat(fault.getString("operation")).isEqualTo("dispatch_recv");
        assertThat(fault.getInt("rank")).isEqualTo(1);
        assertThat(fault.getInt("peer")).isZero();
        assertThat(fault.getLong("epochExpected")).isEqualTo(2);
        assertThat(fault.getLong("epochSeen")).isEqualTo(1);
        assertThat(fault.getLong("validEpoch")).isEqualTo(1);
    }
}
