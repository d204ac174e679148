package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.HostMemory;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.examples.OwnCaptureExample;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.List;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/** The step in a capture of the engine's own, as docs/graphs.md shows it, without a GPU. */
class OwnCaptureRecordingTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    private static final int NODES = 3; // kernels of a step that is given ids, no shared expert
    private final RecordingDriver driver = new RecordingDriver();

    @BeforeEach
    void needsKernels() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    @Test
    void shouldBecomePartOfACaptureThatTheEngineBegan() {
        long context = driver.primaryContextRetain(0);
        try (Scope scope = driver.enter(context);
                CudaLayer layer = open()) {
            layer.prepare();
            Tensor count = device(DType.I32, 1);
            BoundStep step = layer.bind(List.of(tensors(count)));
            HostMemory pinned = driver.hostAlloc(64);
            long stream = driver.foreignStream();
            driver.clearCalls();
            long graph = OwnCaptureExample.capture(driver, stream, count, pinned, step);
            assertThat(driver.calls().stream().filter(c -> c.inCapture()))
                    .extracting(RecordingDriver.Recorded::call)
                    .isSubsetOf(
                            Call.MEMCPY_H_TO_D_ASYNC,
                            Call.CTX_PUSH_CURRENT,
                            Call.CTX_POP_CURRENT,
                            Call.LAUNCH_KERNEL,
                            Call.LAUNCH_KERNEL_EX,
                            Call.STREAM_BEGIN_CAPTURE,
                            Call.STREAM_END_CAPTURE);
            assertThat(driver.launches()).hasSize(NODES);
            driver.clearCalls();
            for (int tokens : new int[] {1, 16, 0, 3}) {
                OwnCaptureExample.replay(driver, stream, graph, pinned, tokens);
            }
            assertThat(driver.calls())
                    .extracting(RecordingDriver.Recorded::call)
                    .containsOnly(Call.GRAPH_LAUNCH)
                    .hasSize(4);

            // MoeLayer.capture is for streams that do not capture yet
            driver.streamBeginCapture(stream);
            assertThatThrownBy(() -> layer.capture(stream, step))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("the stream is capturing already");
            driver.graphDestroy(driver.streamEndCapture(stream));
        }
    }

    @Test
    void shouldFreeTheLayerAlthoughTheEngineStillHasItsGraph() {
        long context = driver.primaryContextRetain(0);
        try (Scope scope = driver.enter(context)) {
            CudaLayer layer = open();
            layer.prepare();
            Tensor count = device(DType.I32, 1);
            BoundStep step = layer.bind(List.of(tensors(count)));
            HostMemory pinned = driver.hostAlloc(64);
            OwnCaptureExample.capture(driver, driver.foreignStream(), count, pinned, step);
            layer.close();
            assertThat(driver.allocatedBytes())
                    .as("the layer knows nothing of the engine's graph: its own word is left")
                    .isEqualTo(pinned.size());
        }
    }

    private CudaLayer open() {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 1))
                        .maxTokensPerRank(16)
                        .threads(2)
                        .build();
        return CudaBackendProvider.open(driver, KernelCatalog.choose(driver, 0), config, "test");
    }

    private StepTensors tensors(Tensor count) {
        return StepTensors.topk(
                device(DType.F32, 16, 64),
                device(DType.BF16, 16, 64),
                device(DType.I32, 16, 4),
                device(DType.F32, 16, 4),
                count);
    }

    private Tensor device(DType dtype, long... shape) {
        return Tensor.device(driver.foreignMemory(1 << 16), dtype, shape);
    }
}
