package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import com.sun.management.ThreadMXBean;
import io.moe4j.BoundStep;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.cuda.nvtx.Ranges;
import io.moe4j.observe.Recorded;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import jdk.jfr.Recording;
import jdk.jfr.consumer.RecordedEvent;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/**
 * Events and ranges of a CUDA layer, without a GPU: what is told, and that a step pays for it with
 * no driver call and no object.
 */
class ObserveRecordingTest {
    private static final ThreadMXBean THREADS = (ThreadMXBean) ManagementFactory.getThreadMXBean();
    private static final int WARM_UP = 20_000;
    private static final int MEASURED = 5_000;
    private static final int ROUNDS = 5;

    /** Who looks while steps run. */
    enum Watched {
        BY_NOBODY,
        BY_JFR,
        BY_RANGES
    }

    /** Ranges that are only counted. */
    private static final class CountedRanges implements Ranges {
        final List<String> names = new ArrayList<>();
        final List<String> pushed = new ArrayList<>();
        boolean keep;
        int depth;

        @Override
        public long name(String text) {
            names.add(text);
            return names.size() - 1;
        }

        @Override
        public void push(long name) {
            depth++;
            if (keep) {
                pushed.add(names.get((int) name));
            }
        }

        @Override
        public void pop() {
            depth--;
        }
    }

    private final RecordingDriver recording = new RecordingDriver();

    @BeforeEach
    void needsKernels() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    private CudaLayer open() {
        return RecordedLayer.open(recording, 2);
    }

    @ParameterizedTest
    @EnumSource(Watched.class)
    void shouldMakeNoObjectAndNoOtherCallInAStep(Watched watched) {
        CountedRanges ranges = new CountedRanges();
        try (Recording jfr = watched == Watched.BY_JFR ? Recorded.start("10 ms") : null) {
            CudaLayer inner = open();
            try (MoeLayer layer =
                    watched == Watched.BY_RANGES
                            ? new RangedLayer(inner, ranges, inner.number())
                            : inner) {
                layer.prepare();
                BoundStep step = layer.bind(RecordedLayer.tensors(recording, inner));
                long stream = recording.foreignStream();
                try (MoeGraph graph = layer.capture(stream, step)) {
                    recording.beginQuiet();
                    Runnable enqueue =
                            () -> layer.enqueue(stream, step, Phase.ROUTE, Phase.COMBINE_RECV);
                    Runnable replay = () -> graph.launch(stream);
                    long forEnqueue = allocatedBy(enqueue);
                    long forReplay = allocatedBy(replay);
                    Map<Call, Long> calls = recording.endQuiet();
                    assertThat(forEnqueue).as("bytes of %d steps", MEASURED).isZero();
                    assertThat(forReplay).as("bytes of %d replays", MEASURED).isZero();
                    long times = WARM_UP + (long) ROUNDS * MEASURED;
                    assertThat(calls)
                            .containsOnlyKeys(
                                    Call.CTX_PUSH_CURRENT,
                                    Call.CTX_POP_CURRENT,
                                    Call.LAUNCH_KERNEL,
                                    Call.LAUNCH_KERNEL_EX,
                                    Call.GRAPH_LAUNCH)
                            .containsEntry(Call.GRAPH_LAUNCH, times);
                    assertThat(calls.get(Call.LAUNCH_KERNEL) + calls.get(Call.LAUNCH_KERNEL_EX))
                            .isEqualTo(times * 9);
                    assertThat(ranges.depth).isZero();
                }
            }
            if (jfr != null) {
                List<RecordedEvent> replays = Recorded.of(Recorded.stop(jfr), "Replays");
                assertThat(replays).hasSizeBetween(1, 1000);
                assertThat(replays.stream().mapToLong(e -> e.getLong("launches")).sum())
                        .as("every replay is told of")
                        .isEqualTo(WARM_UP + (long) ROUNDS * MEASURED);
            }
        }
    }

    /**
     * Bytes the calling thread allocates in {@link #MEASURED} runs, after the compiler is done; the
     * least of some rounds, because the JVM itself may allocate once in a while.
     */
    private static long allocatedBy(Runnable work) {
        long self = Thread.currentThread().getId();
        for (int i = 0; i < WARM_UP; i++) {
            work.run();
        }
        long least = Long.MAX_VALUE;
        for (int round = 0; round < ROUNDS; round++) {
            long before = THREADS.getThreadAllocatedBytes(self);
            for (int i = 0; i < MEASURED; i++) {
                work.run();
            }
            least = Math.min(least, THREADS.getThreadAllocatedBytes(self) - before);
        }
        return least;
    }

    @Test
    void shouldRefuseOtherCallsInAQuietStretch() {
        try (CudaLayer layer = open()) {
            layer.prepare();
            recording.beginQuiet();
            assertThatThrownBy(() -> layer.synchronize(0))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessage("cuStreamSynchronize was called in a quiet stretch");
            recording.endQuiet();
        }
    }

    @Test
    void shouldTellOfManyReplaysInOneEvent() throws Exception {
        List<RecordedEvent> events =
                Recorded.during(
                        "1 h",
                        () -> {
                            try (CudaLayer layer = open()) {
                                layer.prepare();
                                BoundStep step =
                                        layer.bind(RecordedLayer.tensors(recording, layer));
                                long stream = recording.foreignStream();
                                try (MoeGraph graph = layer.capture(stream, step)) {
                                    for (int i = 0; i < 1000; i++) {
                                        graph.launch(stream);
                                    }
                                }
                            }
                        });
        RecordedEvent open = Recorded.of(events, "LayerOpen").get(0);
        assertThat(open.getString("backend")).isEqualTo("cuda");
        assertThat(open.getString("reason")).isEqualTo("test");
        assertThat(Recorded.of(events, "GraphCapture").get(0).getLong("nodes")).isEqualTo(9);
        assertThat(Recorded.of(events, "Replays"))
                .hasSize(1)
                .allSatisfy(
                        event -> {
                            assertThat(event.getLong("launches")).isEqualTo(1000);
                            assertThat(event.getLong("nodes")).isEqualTo(9);
                        });
    }

    @Test
    void shouldTellCountersAndAFaultWithoutASync() throws Exception {
        List<RecordedEvent> events =
                Recorded.during(
                        "10 ms",
                        () -> {
                            try (CudaLayer layer = open()) {
                                layer.prepare();
                                CudaHandle handle = layer.handle(0);
                                for (int rank = 0; rank < 2; rank++) {
                                    counter(handle, rank, "dropped_ids", 3);
                                    counter(handle, rank, "duplicate_ids", 4);
                                    counter(handle, rank, "over_capacity_tokens", 5);
                                    counter(handle, rank, "steps", 6);
                                }
                                fault(handle, 1);
                                recording.clearCalls();
                                Thread.sleep(300);
                                assertThat(recording.calls()).as("driver calls").isEmpty();
                                assertThatThrownBy(layer::check)
                                        .isInstanceOf(MoeFaultException.class)
                                        .hasMessage(
                                                "combine_recv on rank 1 timed out: waited 2000.5 ms"
                                                        + " for rank 0, epoch expected 7, seen 6; the"
                                                        + " last valid epoch is 5");
                            }
                        });
        RecordedEvent counters = Recorded.of(events, "Counters").get(3);
        assertThat(counters.getLong("steps")).isEqualTo(6);
        assertThat(counters.getLong("droppedIds")).isEqualTo(6);
        assertThat(counters.getLong("duplicateIds")).isEqualTo(8);
        assertThat(counters.getLong("overCapacityTokens")).isEqualTo(10);
        assertThat(Recorded.of(events, "Fault")).as("told once").hasSize(1);
        RecordedEvent fault = Recorded.of(events, "Fault").get(0);
        assertThat(fault.getInt("layer")).isEqualTo(counters.getInt("layer"));
        assertThat(fault.getInt("handle")).isZero();
        assertThat(fault.getString("operation")).isEqualTo("combine_recv");
        assertThat(fault.getInt("rank")).isEqualTo(1);
        assertThat(fault.getInt("peer")).isZero();
        assertThat(fault.getString("cause")).isEqualTo("timed out");
        assertThat(fault.getDuration("waited").toNanos()).isEqualTo(2_000_500_000L);
        assertThat(fault.getLong("epochExpected")).isEqualTo(7);
        assertThat(fault.getLong("epochSeen")).isEqualTo(6);
        assertThat(fault.getLong("validEpoch")).isEqualTo(5);
    }

    @Test
    void shouldNameExpertsThatWaitedForTheirOwnProducts() {
        try (CudaLayer layer = open()) {
            layer.prepare();
            CudaHandle handle = layer.handle(0);
            fault(handle, 1);
            ByteBuffer page = handle.reports();
            int at = handle.errorOffset(1);
            page.putInt(at + DeviceStructs.ERROR_RECORD.offset("op"), 3);
            page.putInt(at + DeviceStructs.ERROR_RECORD.offset("code"), 4);
            assertThatThrownBy(layer::check)
                    .isInstanceOf(MoeFaultException.class)
                    .hasMessage(
                            "experts on rank 1 waited for its own gate and up products: after 2000.5"
                                    + " ms 6 of an expert's 7 half tiles were finished; the last"
                                    + " valid epoch is 5");
        }
    }

    private static void counter(CudaHandle handle, int rank, String field, long value) {
        handle.reports()
                .putLong(
                        handle.countersOffset(rank) + DeviceStructs.SOFT_COUNTERS.offset(field),
                        value);
    }

    private static void fault(CudaHandle handle, int rank) {
        ByteBuffer page = handle.reports();
        int at = handle.errorOffset(rank);
        page.putInt(at + DeviceStructs.ERROR_RECORD.offset("op"), 2);
        page.putInt(at + DeviceStructs.ERROR_RECORD.offset("rank"), rank);
        page.putInt(at + DeviceStructs.ERROR_RECORD.offset("peer"), 0);
        page.putLong(at + DeviceStructs.ERROR_RECORD.offset("epoch_expected"), 7);
        page.putLong(at + DeviceStructs.ERROR_RECORD.offset("epoch_seen"), 6);
        page.putLong(at + DeviceStructs.ERROR_RECORD.offset("waited_ns"), 2_000_500_000L);
        page.putLong(at + DeviceStructs.ERROR_RECORD.offset("valid_epoch"), 5);
        page.putLong(at + DeviceStructs.ERROR_RECORD.offset("epoch"), 7);
        page.putInt(at + DeviceStructs.ERROR_RECORD.offset("code"), 1);
    }

    @Test
    void shouldRecordACaptureThatFails() throws Exception {
        List<RecordedEvent> events =
                Recorded.during(
                        "1 h",
                        () -> {
                            try (CudaLayer layer = open()) {
                                layer.prepare();
                                BoundStep step =
                                        layer.bind(RecordedLayer.tensors(recording, layer));
                                recording.failNth(Call.GRAPH_INSTANTIATE, 1, 2);
                                long stream = recording.foreignStream();
                                assertThatThrownBy(() -> layer.capture(stream, step))
                                        .isInstanceOf(CudaException.class);
                            }
                        });
        assertThat(Recorded.of(events, "GraphCapture").get(0).getString("failure"))
                .contains("CudaException");
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldNameTheRangesOfALayer() {
        CountedRanges ranges = new CountedRanges();
        ranges.keep = true;
        CudaLayer inner = open();
        String layerName = ", layer " + inner.number();
        try (RangedLayer layer = new RangedLayer(inner, ranges, inner.number())) {
            layer.prepare();
            BoundStep step = layer.bind(RecordedLayer.tensors(recording, inner));
            assertThat(step.layer()).isSameAs(layer);
            long stream = recording.foreignStream();
            layer.enqueue(stream, step);
            layer.enqueue(stream, step, Phase.ROUTE, Phase.ROUTE);
            layer.enqueue(stream, step, Phase.DISPATCH_SEND, Phase.COMBINE_RECV);
            assertThatThrownBy(() -> layer.enqueue(stream, step, Phase.COMBINE_RECV, Phase.EXPERTS))
                    .isInstanceOf(IllegalArgumentException.class);
            try (MoeGraph graph = layer.capture(stream, step)) {
                graph.launch(stream);
            }
        }
        assertThat(ranges.depth).isZero();
        assertThat(ranges.pushed)
                .containsExactly(
                        "moe4j: prepare" + layerName,
                        "moe4j: step" + layerName,
                        "moe4j: ROUTE" + layerName,
                        "moe4j: DISPATCH_SEND..COMBINE_RECV" + layerName,
                        "moe4j: COMBINE_RECV" + layerName,
                        "moe4j: capture" + layerName,
                        "moe4j: replay" + layerName);
        assertThat(recording.leaks()).isEmpty();
    }
}
