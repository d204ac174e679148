package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.BoundStep;
import io.moe4j.LanePart;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLanes;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.driver.RecordingDriver.Recorded;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.overlap.TwoBatchOverlap;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/**
 * The launches and events of two overlapped batches, without a GPU. Which launch ends before which
 * begins is worked out from streams and events alone, as the device would; every event wait that is
 * dropped shows.
 */
class OverlapRecordingTest {
    private static final int LAYERS = 3;

    private final RecordingDriver driver = new RecordingDriver();
    private final List<CudaLayer> layers = new ArrayList<>();
    private final List<BoundStep> first = new ArrayList<>();
    private final List<BoundStep> second = new ArrayList<>();

    /** Which batch and layer a launch belongs to, by its arguments. */
    private final Map<String, String> names = new HashMap<>();

    private Scope scope;
    private long stream;

    @BeforeEach
    void open() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
        scope = driver.enter(driver.primaryContextRetain(0));
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(new MoeShape(64, 48, 12, 4, 32), 1))
                        .maxTokensPerRank(16)
                        .ranks(2)
                        .handles(2)
                        .threads(2)
                        .build();
        stream = driver.foreignStream();
        for (int l = 0; l < LAYERS; l++) {
            CudaLayer layer =
                    CudaBackendProvider.open(
                            driver, KernelCatalog.choose(driver, 0), config, "test");
            layer.prepare();
            layers.add(layer);
            first.add(layer.bind(RecordedLayer.tensors(driver, layer), 0));
            second.add(layer.bind(RecordedLayer.tensors(driver, layer), 1));
            names.put(arguments(first.get(l)), "A" + l);
            names.put(arguments(second.get(l)), "B" + l);
        }
        driver.clearCalls();
    }

    @AfterEach
    void close() {
        if (scope != null) {
            layers.forEach(CudaLayer::close);
            scope.close();
        }
    }

    private String arguments(BoundStep step) {
        driver.clearCalls();
        step.layer().enqueue(stream, step);
        return java.util.Arrays.toString(driver.launches().get(0).params());
    }

    /** One launch with everything that has ended when it begins. */
    private record Node(String kernel, String owner, long stream, Set<Integer> before) {
        @Override
        public String toString() {
            return kernel + " of " + owner;
        }
    }

    /** What the streams and events of the calls so far order. */
    private List<Node> nodes() {
        List<Node> nodes = new ArrayList<>();
        Map<Long, Set<Integer>> streams = new HashMap<>();
        Map<Long, Set<Integer>> events = new HashMap<>();
        int launch = 0;
        for (Recorded call : driver.calls()) {
            switch (call.call()) {
                case LAUNCH_KERNEL, LAUNCH_KERNEL_EX -> {
                    RecordingDriver.Launch made = driver.launches().get(launch++);
                    Set<Integer> before =
                            streams.computeIfAbsent(made.stream(), s -> new HashSet<>());
                    nodes.add(
                            new Node(
                                    made.kernel(),
                                    names.get(java.util.Arrays.toString(made.params())),
                                    made.stream(),
                                    Set.copyOf(before)));
                    before.add(nodes.size() - 1);
                }
                case EVENT_RECORD ->
                        events.put(
                                call.longAt(0),
                                Set.copyOf(streams.getOrDefault(call.longAt(1), Set.of())));
                case STREAM_WAIT_EVENT ->
                        streams.computeIfAbsent(call.longAt(0), s -> new HashSet<>())
                                .addAll(events.getOrDefault(call.longAt(1), Set.of()));
                default -> {}
            }
        }
        return nodes;
    }

    /**
     * What must be ordered and is not: the launches of a step, steps of a batch, and experts of any
     * two steps, which would wait for each other's blocks.
     */
    private static List<String> races(List<Node> nodes) {
        List<String> races = new ArrayList<>();
        for (int i = 0; i < nodes.size(); i++) {
            for (int j = 0; j < i; j++) {
                Node early = nodes.get(j);
                Node late = nodes.get(i);
                boolean sameBatch = early.owner().charAt(0) == late.owner().charAt(0);
                boolean bothExperts = isExperts(early) && isExperts(late);
                if ((sameBatch || bothExperts) && !late.before().contains(j)) {
                    races.add(late + " does not wait for " + early);
                }
            }
        }
        return races;
    }

    private static boolean isExperts(Node node) {
        return node.kernel().startsWith("moe_experts")
                || node.kernel().startsWith("moe_gate_up")
                || node.kernel().startsWith("moe_down");
    }

    private static int find(List<Node> nodes, String kernel, String owner) {
        for (int i = 0; i < nodes.size(); i++) {
            Node node = nodes.get(i);
            if (node.kernel().startsWith(kernel) && node.owner().equals(owner)) {
                return i;
            }
        }
        throw new AssertionError("no " + kernel + " of " + owner + " among " + nodes);
    }

    private static boolean apart(List<Node> nodes, int a, int b) {
        return !nodes.get(a).before().contains(b) && !nodes.get(b).before().contains(a);
    }

    @Test
    void shouldOrderEveryStepAndLeaveRowsFreeToTravelBesideExperts() {
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(first, second)) {
            driver.clearCalls();
            overlap.enqueue(stream);
            List<Node> nodes = nodes();
            assertThat(races(nodes)).isEmpty();
            assertThat(nodes.stream().map(Node::stream).distinct()).hasSize(2).contains(stream);
            for (int l = 0; l < LAYERS; l++) {
                int experts = find(nodes, isWgmma(nodes) ? "moe_experts" : "moe_gate_up", "A" + l);
                int other = find(nodes, isWgmma(nodes) ? "moe_experts" : "moe_gate_up", "B" + l);
                assertThat(nodes.get(experts).stream()).as("experts").isEqualTo(stream);
                assertThat(apart(nodes, other, find(nodes, "moe_combine_send", "A" + l)))
                        .as("A's results travel beside B's experts, layer %d", l)
                        .isTrue();
                assertThat(apart(nodes, other, find(nodes, "moe_combine_recv", "A" + l))).isTrue();
                if (l + 1 < LAYERS) {
                    int next = find(nodes, "moe_dispatch_send", "A" + (l + 1));
                    assertThat(apart(nodes, other, next))
                            .as("A's next rows travel beside B's experts, layer %d", l)
                            .isTrue();
                }
                if (l == 0) {
                    assertThat(apart(nodes, experts, find(nodes, "moe_dispatch_send", "B0")))
                            .isTrue();
                }
            }
        }
    }

    @Test
    void shouldBeginBehindTheCallersStreamAndEndBeforeWhatComesNext() {
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(first.get(0), second.get(0))) {
            driver.clearCalls();
            layers.get(2).enqueue(stream, first.get(2));
            overlap.enqueue(stream);
            layers.get(2).enqueue(stream, first.get(2));
            List<Node> nodes = nodes();
            List<Integer> others = new ArrayList<>();
            List<Integer> own = new ArrayList<>();
            for (int i = 0; i < nodes.size(); i++) {
                (nodes.get(i).owner().equals("A2") ? others : own).add(i);
            }
            int half = others.size() / 2;
            for (int i : own) {
                assertThat(nodes.get(i).before()).containsAll(others.subList(0, half));
            }
            assertThat(nodes.get(others.get(half)).before()).containsAll(own);
        }
    }

    private static boolean isWgmma(List<Node> nodes) {
        return nodes.stream().anyMatch(node -> node.kernel().startsWith("moe_experts"));
    }

    @Test
    void shouldMakeTheCallsOfOneLayerInThisOrder() {
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(first.get(0), second.get(0))) {
            driver.clearCalls();
            overlap.enqueue(stream);
            Map<Long, String> known = new HashMap<>(Map.of(stream, "caller"));
            List<String> made = new ArrayList<>();
            int launch = 0;
            for (Recorded call : driver.calls()) {
                switch (call.call()) {
                    case EVENT_RECORD ->
                            made.add(
                                    name(known, "record e", call.longAt(0))
                                            + " on "
                                            + known.getOrDefault(call.longAt(1), "own"));
                    case STREAM_WAIT_EVENT ->
                            made.add(
                                    known.getOrDefault(call.longAt(0), "own")
                                            + " waits for "
                                            + name(known, "record e", call.longAt(1))
                                                    .substring("record ".length()));
                    case LAUNCH_KERNEL, LAUNCH_KERNEL_EX -> {
                        RecordingDriver.Launch one = driver.launches().get(launch++);
                        String phase =
                                names.get(java.util.Arrays.toString(one.params())).charAt(0)
                                        + " "
                                        + phase(one.kernel())
                                        + " on "
                                        + known.getOrDefault(one.stream(), "own");
                        if (!made.get(made.size() - 1).equals(phase)) {
                            made.add(phase);
                        }
                    }
                    default -> {}
                }
            }
            assertThat(made)
                    .containsExactly(
                            "record e1 on caller",
                            "own waits for e1",
                            "A route on own",
                            "A dispatch_send on own",
                            "record e2 on own",
                            "B route on own",
                            "B dispatch_send on own",
                            "record e3 on own",
                            "caller waits for e2",
                            "A dispatch_recv on caller",
                            "A experts on caller",
                            "record e4 on caller",
                            "caller waits for e3",
                            "B dispatch_recv on caller",
                            "B experts on caller",
                            "record e5 on caller",
                            "own waits for e4",
                            "A combine_send on own",
                            "A combine_recv on own",
                            "own waits for e5",
                            "B combine_send on own",
                            "B combine_recv on own",
                            "record e6 on own",
                            "caller waits for e6");
            assertThat(driver.calls().stream().map(Recorded::call))
                    .as("nothing that waits or allocates")
                    .containsOnly(
                            Call.CTX_PUSH_CURRENT,
                            Call.CTX_POP_CURRENT,
                            Call.LAUNCH_KERNEL,
                            Call.LAUNCH_KERNEL_EX,
                            Call.EVENT_RECORD,
                            Call.STREAM_WAIT_EVENT);
        }
    }

    private static String name(Map<Long, String> known, String prefix, long event) {
        return known.computeIfAbsent(
                event,
                e ->
                        prefix
                                + (1
                                        + known.values().stream()
                                                .filter(n -> n.startsWith(prefix))
                                                .count()));
    }

    private static String phase(String kernel) {
        if (kernel.startsWith("moe_route")) {
            return "route";
        }
        if (kernel.equals("moe_dispatch_index")) {
            return "dispatch_recv";
        }
        return kernel.matches("moe_(shared|gate|down|experts).*")
                ? "experts"
                : kernel.substring("moe_".length()).replace("_lines", "");
    }

    @Test
    void shouldNoticeEveryEventWaitThatIsDropped() {
        List<LanePart> schedule = TwoBatchOverlap.schedule(first, second);
        int dropped = 0;
        for (int i = 0; i < schedule.size(); i++) {
            if (schedule.get(i).after().isEmpty()) {
                continue;
            }
            List<LanePart> mutant = new ArrayList<>(schedule);
            mutant.set(i, new LanePart(schedule.get(i).part(), schedule.get(i).lane(), List.of()));
            try (MoeLanes lanes = layers.get(0).lanes(mutant)) {
                driver.clearCalls();
                lanes.enqueue(stream);
                assertThat(races(nodes())).as("without the wait of part %d", i).isNotEmpty();
            }
            dropped++;
        }
        assertThat(dropped).isEqualTo(4 * LAYERS);
    }

    @Test
    void shouldBecomeOneGraphThatOutlivesTheScheduleAndPinsTheLayers() {
        long kernels = kernelsOfTwoSteps() * LAYERS;
        TwoBatchOverlap overlap = TwoBatchOverlap.of(first, second);
        MoeGraph graph = overlap.capture(stream);
        overlap.close();
        overlap.close();
        driver.clearCalls();
        graph.launch(stream);
        assertThat(driver.calls().stream().map(Recorded::call))
                .containsOnlyOnce(Call.GRAPH_LAUNCH)
                .doesNotContain(Call.EVENT_RECORD, Call.LAUNCH_KERNEL);
        assertThat(graph.nodeCount()).isGreaterThanOrEqualTo(kernels);
        long held = driver.allocatedBytes();
        layers.forEach(CudaLayer::close);
        assertThat(driver.allocatedBytes()).as("pinned by the graph").isEqualTo(held);
        graph.close();
        assertThat(driver.allocatedBytes()).isZero();
        assertThatThrownBy(() -> overlap.enqueue(stream))
                .isInstanceOf(IllegalStateException.class)
                .hasMessage("the schedule is closed: make a new one");
    }

    private int kernelsOfTwoSteps() {
        driver.clearCalls();
        layers.get(0).enqueue(stream, first.get(0));
        layers.get(0).enqueue(stream, second.get(0));
        return driver.launches().size();
    }

    @Test
    void shouldBecomeBranchesOfACaptureThatTheEngineBegan() {
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(first, second)) {
            driver.streamBeginCapture(stream);
            overlap.enqueue(stream);
            long graph = driver.streamEndCapture(stream);
            assertThat(driver.graphNodeCount(graph)).isPositive();
            driver.graphDestroy(graph);
        }
    }

    @Test
    void shouldFreeStreamsAndEventsAndKeepTheLayersUntilThen() {
        driver.clearCalls();
        TwoBatchOverlap overlap = TwoBatchOverlap.of(first, second);
        layers.forEach(CudaLayer::close);
        assertThat(driver.allocatedBytes()).isPositive();
        assertThatThrownBy(() -> overlap.enqueue(stream))
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("the layer is closed");
        overlap.close();
        assertThat(driver.allocatedBytes()).isZero();
        assertThat(made(Call.EVENT_DESTROY)).isPositive().isEqualTo(made(Call.EVENT_CREATE));
        assertThat(made(Call.STREAM_DESTROY)).isEqualTo(made(Call.STREAM_CREATE)).isOne();
    }

    private long made(Call call) {
        return driver.calls().stream().filter(recorded -> recorded.call() == call).count();
    }

    @Test
    void shouldExplainWhatDoesNotFit() {
        assertThatThrownBy(() -> TwoBatchOverlap.of(first.get(0), first.get(0)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessage(
                        "layer 0: both steps use handle 0: open the layer with handles(2) and bind"
                                + " the second with another");
        assertThatThrownBy(() -> TwoBatchOverlap.of(first.get(0), second.get(1)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("the steps belong to different layers");
        assertThatThrownBy(() -> TwoBatchOverlap.of(first, second.subList(0, 1)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("got 3 steps of the first batch and 1 of the second");
        assertThatThrownBy(() -> TwoBatchOverlap.of(List.of(), List.of()))
                .isInstanceOf(IllegalArgumentException.class);
        LanePart own = TwoBatchOverlap.schedule(first, second).get(0);
        assertThatThrownBy(
                        () -> layers.get(0).lanes(List.of(new LanePart(own.part(), 1, List.of(0)))))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessage("part 0 waits for part 0, which does not come before it");
        assertThatThrownBy(() -> new LanePart(own.part(), LanePart.MOST_LANES, List.of()))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessage("lane=8 is outside 0..7");
        assertThatThrownBy(() -> layers.get(0).lanes(List.of()))
                .isInstanceOf(IllegalArgumentException.class);
    }
}
