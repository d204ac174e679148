package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.CheckedDriver;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.EnumSource;

/**
 * What a layer asks of the driver, without a GPU: the order of launches, and that between prepare
 * and the end of enqueue nothing waits, allocates or copies pageable memory.
 */
class CudaLayerRecordingTest {
    private static final MoeShape SHAPE = new MoeShape(64, 48, 12, 4, 32);
    private final RecordingDriver recording = new RecordingDriver();
    private final CheckedDriver driver = new CheckedDriver(recording, CheckedDriver.Mode.THROW);

    @BeforeEach
    void needsKernels() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    @AfterEach
    void leavesNoContext() {
        assertThat(driver.contextCurrent()).as("no context is left current").isZero();
    }

    private CudaLayer open(RoutingInput input, int ranks) {
        return open(input, ranks, 16);
    }

    private CudaLayer open(RoutingInput input, int ranks, int maxTokens) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 1))
                        .rule(RoutingRule.softmaxTopK(true))
                        .routingInput(input)
                        .maxTokensPerRank(maxTokens)
                        .ranks(ranks)
                        .threads(2)
                        .handles(2)
                        .build();
        return CudaBackendProvider.open(driver, KernelCatalog.choose(driver, 0), config, "test");
    }

    private List<StepTensors> tensors(CudaLayer layer) {
        List<StepTensors> all = new ArrayList<>();
        MoeConfig config = layer.config();
        for (int rank = 0; rank < config.ranks(); rank++) {
            Tensor out = device(DType.F32, 16, 64);
            Tensor hidden = device(DType.BF16, 16, 64);
            Tensor count = device(DType.I32, 1);
            all.add(
                    switch (config.routingInput()) {
                        case TOPK ->
                                StepTensors.topk(
                                        out,
                                        hidden,
                                        device(DType.I32, 16, 4),
                                        device(DType.F32, 16, 4),
                                        count);
                        case LOGITS ->
                                StepTensors.logits(out, hidden, device(DType.F32, 16, 12), count);
                        case HIDDEN -> StepTensors.hidden(out, hidden, count);
                    });
        }
        return all;
    }

    private Tensor device(DType dtype, long... shape) {
        return Tensor.device(recording.foreignMemory(1 << 16), dtype, shape);
    }

    @ParameterizedTest
    @EnumSource(RoutingInput.class)
    void shouldEnqueueKernelsOnlyInAFixedOrder(RoutingInput input) {
        try (CudaLayer layer = open(input, 2)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(layer));
            long stream = recording.foreignStream();
            recording.clearCalls();
            for (int i = 0; i < 3; i++) {
                try (CheckedDriver.Zone zone = driver.noSyncZone("enqueue")) {
                    layer.enqueue(stream, step);
                }
            }
            List<String> flow = new ArrayList<>();
            if (input == RoutingInput.HIDDEN) {
                flow.add("moe_route_logits");
            }
            flow.addAll(
                    List.of(
                            "moe_route_topk",
                            "moe_dispatch_send",
                            "moe_dispatch_recv",
                            "moe_dispatch_index",
                            "moe_shared_gate_up_wgmma",
                            "moe_shared_down_wgmma",
                            "moe_experts_wgmma",
                            "moe_combine_send",
                            "moe_combine_recv"));
            List<String> thrice = new ArrayList<>(flow);
            thrice.addAll(flow);
            thrice.addAll(flow);
            assertThat(recording.launches())
                    .extracting(RecordingDriver.Launch::kernel)
                    .isEqualTo(thrice);
            assertThat(recording.calls())
                    .extracting(RecordingDriver.Recorded::call)
                    .containsOnly(
                            Call.CTX_PUSH_CURRENT,
                            Call.CTX_POP_CURRENT,
                            Call.LAUNCH_KERNEL,
                            Call.LAUNCH_KERNEL_EX);
            assertThat(recording.launches()).allMatch(l -> l.stream() == stream);
        }
    }

    @ParameterizedTest
    @CsvSource({"1, 64, wgmma", "79, 8192, wgmma", "80, 64, wgmma_prefill"})
    void shouldChooseKernelsByTheRowsThatAreExpected(int rows, int intermediate, String shape) {
        MoeShape sizes = MoeShape.of(64, intermediate, 8, 2);
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(sizes, 3))
                        .maxTokensPerRank(4)
                        .expectedRowsPerExpert(rows)
                        .build();
        KernelCatalog catalog = KernelCatalog.choose(driver, 0);
        try (CudaLayer layer = CudaBackendProvider.open(driver, catalog, config, "test")) {
            layer.prepare();
            assertThat(layer.expertSymbols()).containsExactly("moe_experts_" + shape);
        }
    }

    @ParameterizedTest
    @CsvSource({
        // 16 experts of qwen3-30b-a3b, of qwen3-235b-a22b
        "2048, 768, 16, 79, false",
        "2048, 768, 16, 80, true",
        "4096, 1536, 16, 31, false",
        "4096, 1536, 16, 32, true"
    })
    void shouldPairBlocksFromFewerRowsOnWhereExpertsHaveMoreBytes(
            int hidden, int intermediate, int experts, int rows, boolean pairs) {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(MoeShape.of(hidden, intermediate, experts, 8), 3))
                        .maxTokensPerRank(4)
                        .expectedRowsPerExpert(rows)
                        .build();
        assertThat(LoadedKernels.isForPrefill(config)).isEqualTo(pairs);
    }

    @ParameterizedTest
    @CsvSource({
        "mma, moe_gate_up_mma moe_down_mma",
        "wgmma, moe_experts_wgmma",
        "split, moe_gate_up_wgmma moe_down_wgmma"
    })
    void shouldRunTheKernelsThatThePropertyAsksFor(String gemm, String kernels) {
        System.setProperty("moe4j.cuda.gemm", gemm);
        try (CudaLayer layer = open(RoutingInput.TOPK, 2)) {
            layer.prepare();
            assertThat(String.join(" ", layer.expertSymbols())).endsWith(kernels);
        } finally {
            System.clearProperty("moe4j.cuda.gemm");
        }
    }

    @Test
    void shouldLaunchTheExpertsOfABenchmarkAsAStepDoes() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 2)) {
            layer.prepare();
            CudaStep step = (CudaStep) layer.bind(tensors(layer));
            long stream = recording.foreignStream();
            recording.clearCalls();
            layer.enqueue(stream, step);
            List<String> inStep =
                    recording.launches().stream()
                            .filter(l -> layer.expertSymbols().contains(l.kernel()))
                            .map(CudaLayerRecordingTest::launch)
                            .toList();
            recording.clearCalls();
            layer.launchExperts(stream, step, CudaProbe.Part.CHAIN);
            assertThat(recording.launches())
                    .extracting(CudaLayerRecordingTest::launch)
                    .isEqualTo(inStep);
            assertThat(recording.launches()).allMatch(RecordingDriver.Launch::pdl);
        }
    }

    private static String launch(RecordingDriver.Launch launch) {
        return launch.kernel()
                + " grid "
                + launch.gridX()
                + " x "
                + launch.gridY()
                + (launch.pdl() ? " may start early" : "");
    }

    @Test
    void shouldRunThePrefillKernelInPairsOfBlocksWhereExpertsHaveManyRows() {
        assertThat(prefillLaunches()).containsExactly("moe_experts_wgmma_prefill grid 132");
    }

    @Test
    void shouldSplitThePrefillKernelWhereThePropertyAsksForIt() {
        System.setProperty("moe4j.cuda.gemm", "split");
        try {
            assertThat(prefillLaunches())
                    .containsExactly(
                            "moe_gate_up_wgmma_prefill grid 132",
                            "moe_down_wgmma_prefill grid 132");
        } finally {
            System.clearProperty("moe4j.cuda.gemm");
        }
    }

    private List<String> prefillLaunches() {
        int tokens = 600; // 600 * 4 / 12 = 200 rows of an expert
        try (CudaLayer layer = open(RoutingInput.TOPK, 1, tokens)) {
            layer.prepare();
            long memory = recording.foreignMemory(1 << 18);
            BoundStep step =
                    layer.bind(
                            List.of(
                                    StepTensors.topk(
                                            Tensor.device(memory, DType.F32, tokens, 64),
                                            Tensor.device(memory, DType.BF16, tokens, 64),
                                            Tensor.device(memory, DType.I32, tokens, 4),
                                            Tensor.device(memory, DType.F32, tokens, 4),
                                            Tensor.device(memory, DType.I32, 1))));
            recording.clearCalls();
            layer.enqueue(recording.foreignStream(), step);
            return recording.launches().stream()
                    .filter(l -> l.kernel().endsWith("_prefill"))
                    .map(l -> l.kernel() + " grid " + l.gridX())
                    .toList();
        }
    }

    @Test
    void shouldReadNoCountFromTheHostWhenBatchesChange() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 1)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(layer));
            long stream = recording.foreignStream();
            recording.clearCalls();
            layer.enqueue(stream, step);
            layer.enqueue(stream, step);
            List<RecordingDriver.Launch> all = recording.launches();
            int half = all.size() / 2;
            for (int i = 0; i < half; i++) {
                RecordingDriver.Launch a = all.get(i);
                RecordingDriver.Launch b = all.get(half + i);
                assertThat(b.gridX()).as(a.kernel()).isEqualTo(a.gridX());
                assertThat(b.paramBytes()).as(a.kernel()).isEqualTo(a.paramBytes());
            }
        }
    }

    @Test
    void shouldCaptureWithoutRunningAndReplayWithOneCall() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 2)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(layer));
            long stream = recording.foreignStream();
            recording.clearCalls();
            try (MoeGraph graph = layer.capture(stream, step)) {
                assertThat(graph.nodeCount()).isEqualTo(9);
                recording.clearCalls();
                try (CheckedDriver.Zone zone = driver.noSyncZone("replay")) {
                    graph.launch(stream);
                    graph.launch(stream);
                }
                assertThat(recording.calls(Call.GRAPH_LAUNCH)).hasSize(2);
                assertThat(recording.calls())
                        .extracting(RecordingDriver.Recorded::call)
                        .containsOnly(
                                Call.CTX_PUSH_CURRENT, Call.CTX_POP_CURRENT, Call.GRAPH_LAUNCH);
            }
        }
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldCaptureSinglePhasesForPiecewiseGraphs() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 1)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(layer));
            long stream = recording.foreignStream();
            try (MoeGraph front =
                            layer.capture(
                                    stream,
                                    List.of(
                                            new io.moe4j.GraphPart(
                                                    step, Phase.ROUTE, Phase.DISPATCH_RECV)));
                    MoeGraph back =
                            layer.capture(
                                    stream,
                                    List.of(
                                            new io.moe4j.GraphPart(
                                                    step, Phase.EXPERTS, Phase.COMBINE_RECV)))) {
                assertThat(front.nodeCount()).isEqualTo(1);
                assertThat(back.nodeCount()).isEqualTo(4);
            }
        }
    }

    @Test
    void shouldRefuseToPrepareButBindInsideACapture() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 1);
                CudaLayer prepared = open(RoutingInput.TOPK, 1)) {
            prepared.prepare();
            long stream = recording.foreignStream();
            try (var scope = driver.enter(driver.primaryContextRetain(0))) {
                List<StepTensors> tensors = tensors(prepared);
                driver.streamBeginCapture(stream);
                BoundStep step = prepared.bind(tensors);
                prepared.enqueue(stream, step);
                long graph = driver.streamEndCapture(stream);
                assertThat(driver.graphNodeCount(graph))
                        .as("the kernels of the step and nothing of bind")
                        .isEqualTo(5);
                driver.graphDestroy(graph);

                driver.streamBeginCapture(stream);
                assertThatThrownBy(layer::prepare)
                        .isInstanceOf(IllegalStateException.class)
                        .hasMessageContaining("prepare was called while this thread captures");
                assertThatThrownBy(() -> driver.streamEndCapture(stream))
                        .as("what was refused broke the capture, and the driver says so")
                        .isInstanceOf(CudaException.class);
            }
        }
    }

    @Test
    void shouldAllocateWhatThePlanSaysAndGiveEverythingBack() {
        CudaLayer layer = open(RoutingInput.HIDDEN, 4);
        assertThat(recording.allocatedBytes()).as("open allocates nothing").isZero();
        layer.prepare();
        long planned = layer.plan().totalBytes();
        assertThat(recording.allocatedBytes())
                .isBetween(planned, planned + 256L * 60 * 4 * 2 + (64 << 10));
        layer.close();
        layer.close();
        assertThat(recording.allocatedBytes()).isZero();
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldRollBackWhateverFailsWhilePreparing() {
        int allocations = countAllocations();
        assertThat(allocations).isGreaterThan(8);
        for (int nth = 1; nth <= allocations; nth++) {
            RecordingDriver failing = new RecordingDriver();
            failing.failNth(Call.MEM_ALLOC, nth, 2);
            MoeConfig config = open(RoutingInput.HIDDEN, 2).config();
            CudaLayer layer =
                    CudaBackendProvider.open(
                            failing, KernelCatalog.choose(failing, 0), config, "test");
            assertThatThrownBy(layer::prepare)
                    .as("allocation %d", nth)
                    .isInstanceOf(CudaException.class)
                    .hasMessageContaining("memory");
            assertThat(failing.allocatedBytes()).as("after allocation %d failed", nth).isZero();
            layer.prepare(); // the failure was passing: a second try succeeds
            layer.close();
            assertThat(failing.leaks()).isEmpty();
        }
    }

    private int countAllocations() {
        try (CudaLayer layer = open(RoutingInput.HIDDEN, 2)) {
            recording.clearCalls();
            layer.prepare();
            return recording.calls(Call.MEM_ALLOC).size();
        }
    }

    @Test
    void shouldExplainForeignMisuse() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 1)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(layer));
            assertThatThrownBy(() -> layer.capture(0L, step))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("legacy default stream");
            List<StepTensors> host =
                    List.of(
                            StepTensors.topk(
                                    device(DType.F32, 16, 64),
                                    Tensor.allocateHost(DType.BF16, 16, 64),
                                    device(DType.I32, 16, 4),
                                    device(DType.F32, 16, 4),
                                    device(DType.I32, 1)));
            assertThatThrownBy(() -> layer.bind(host))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("hidden is host memory");
            assertThatThrownBy(() -> layer.bind(tensors(layer), 2))
                    .hasMessageContaining("handle=2");
            try (CudaLayer other = open(RoutingInput.TOPK, 1)) {
                other.prepare();
                assertThatThrownBy(() -> other.enqueue(0L, step))
                        .hasMessageContaining("another layer");
            }
        }
    }

    @Test
    void shouldRefuseEverythingAfterClose() {
        CudaLayer layer = open(RoutingInput.TOPK, 2);
        layer.prepare();
        List<StepTensors> tensors = tensors(layer);
        UseAfterClose.check(layer, tensors, layer.bind(tensors), recording.foreignStream());
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldReadOnlyTheRowsAskedFor() {
        try (CudaLayer layer = open(RoutingInput.TOPK, 2)) {
            layer.prepare();
            recording.clearCalls();
            assertThat(layer.inspect(0, 1).receivedRows(1, 3, 2)).hasSize(2 * 64);
            assertThat(layer.inspect(0, 1).rowSlots(0, 0)).isEmpty();
            assertThat(recording.calls(Call.MEMCPY_D_TO_H)).hasSize(1);
            long base = layer.handle(0).symmetric(1, "recv_rows");
            assertThat(recording.calls(Call.MEMCPY_D_TO_H).get(0).toString())
                    .contains(Long.toHexString(base + (16 + 3) * 64 * 2));
        }
    }

    @Test
    void shouldWatchStepsAndGraphsOfACheckedLayerAndNothingElse() {
        MoeConfig config = open(RoutingInput.TOPK, 2).config();
        KernelCatalog catalog = KernelCatalog.choose(recording, 0);
        try (CheckedCudaLayer layer =
                CudaBackendProvider.openChecked(
                        recording, CheckedDriver.Mode.THROW, catalog, config, "test")) {
            layer.prepare();
            CudaLayer plain = open(RoutingInput.TOPK, 2);
            BoundStep step = layer.bind(tensors(plain));
            assertThat(step.layer()).isSameAs(layer);
            long stream = recording.foreignStream();
            step.layer().enqueue(stream, step);
            layer.enqueue(stream, step, Phase.ROUTE, Phase.ROUTE);
            layer.enqueue(stream, step, Phase.DISPATCH_SEND, Phase.COMBINE_RECV);
            try (MoeGraph graph = layer.capture(stream, step)) {
                graph.launch(stream);
                layer.synchronize(stream);
            }
            layer.inspect(0, 0).tokens();
            assertThat(layer.violations()).isEmpty();
            assertThat(layer.backendReason()).contains("host syncs checked");
        }
    }

    @Test
    void shouldNameAWaitPlantedInAStepWithItsOrigin() {
        MoeConfig config = open(RoutingInput.TOPK, 1).config();
        KernelCatalog catalog = KernelCatalog.choose(recording, 0);
        CheckedDriver checked = new CheckedDriver(recording, CheckedDriver.Mode.RECORD);
        Driver waiting = WaitingDriver.before("launchKernel", checked);
        CudaLayer inner = CudaBackendProvider.open(waiting, catalog, config, "test");
        try (CheckedCudaLayer layer = new CheckedCudaLayer(inner, checked)) {
            layer.prepare();
            BoundStep step = layer.bind(tensors(inner));
            assertThat(layer.violations()).as("waits outside of a step are fine").isEmpty();
            layer.enqueue(recording.foreignStream(), step);
            assertThat(layer.violations()).hasSize(5);
            assertThat(layer.violations().get(0))
                    .contains("cuCtxSynchronize may wait for the device")
                    .contains("no-sync zone enqueue")
                    .contains("WaitingDriver.java");
        }
    }
}
