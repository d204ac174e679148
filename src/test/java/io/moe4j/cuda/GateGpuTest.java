package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.KernelModule;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;

/**
 * Nobody in the step waits for the device: with the stream held shut by a kernel that spins on a
 * host word, enqueue and graph launch return; T and routing change on the device behind the gate;
 * then the gate opens and the result is right. The mutant, a planted host read, must fail.
 */
@EnabledIfCuda
class GateGpuTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    @Test
    void shouldReturnFromEnqueueAndGraphLaunchWhileTheStreamIsShut() throws Exception {
        for (boolean graph : new boolean[] {false, true}) {
            try (Rig rig = new Rig()) {
                float[][] want = rig.harness.run(List.of(rig.late, Batch.empty()))[0];
                rig.harness.write(List.of(rig.early, Batch.empty()));
                try (MoeGraph captured =
                        rig.harness.layer.capture(gpu.stream(), rig.harness.step())) {
                    rig.shutGate();
                    rig.replaceInputsOnTheDevice();
                    CompletableFuture<Void> call =
                            CompletableFuture.runAsync(
                                    () -> {
                                        if (graph) {
                                            captured.launch(gpu.stream());
                                        } else {
                                            rig.harness.layer.enqueue(
                                                    gpu.stream(), rig.harness.step());
                                        }
                                    });
                    call.get(2, TimeUnit.SECONDS);
                    assertThat(rig.streamIsBusy()).as("the gate is still shut").isTrue();
                    rig.openGate();
                    rig.harness.layer.synchronize(gpu.stream());
                    float[][] got = rig.harness.outputs()[0];
                    for (int t = 0; t < rig.late.tokens(); t++) {
                        assertThat(got[t]).as("graph %s token %d", graph, t).isEqualTo(want[t]);
                    }
                }
            }
        }
    }

    @Test
    void shouldCatchAPlantedHostRead() throws Exception {
        try (Rig rig = new Rig()) {
            rig.harness.run(List.of(rig.early, Batch.empty()));
            rig.shutGate();
            CompletableFuture<Void> call =
                    CompletableFuture.runAsync(
                            () -> {
                                rig.harness.layer.enqueue(gpu.stream(), rig.harness.step());
                                rig.harness.layer.readRouting(0, new int[96], new float[96]);
                            });
            boolean hung = false;
            try {
                call.get(500, TimeUnit.MILLISECONDS);
            } catch (TimeoutException e) {
                hung = true;
            }
            rig.openGate();
            call.get(20, TimeUnit.SECONDS);
            assertThat(hung).as("a host read behind the gate must hang").isTrue();
        }
    }

    private static final class Rig implements AutoCloseable {
        final Batch early = Harness.random(SHAPE, 3, 1);
        final Batch late = Harness.random(SHAPE, 17, 2);
        final Harness harness;
        private final Harness staging;
        private final PinnedBuffer word = new PinnedBuffer(gpu.context, 64);
        private final KernelModule module;
        private final long gate;

        Rig() {
            MoeConfig config =
                    MoeConfig.builder()
                            .weights(RandomWeights.of(SHAPE, 5))
                            .backend("cuda")
                            .hiddenDType(DType.F32)
                            .maxTokensPerRank(24)
                            .ranks(2)
                            .build();
            harness = new Harness(config, false, gpu.stream());
            staging = new Harness(config, false, gpu.stream());
            staging.write(List.of(late, Batch.empty()));
            KernelCatalog catalog = KernelCatalog.choose(gpu.driver, 0);
            module = new KernelModule(gpu.context, "gate", catalog.imageBytes());
            gate = module.function("moe_gate");
        }

        void shutGate() {
            word.bytes().putInt(0, 0);
            KernelParams params = gpu.params(DeviceStructs.GATE_PARAMS.size());
            DeviceStructs.GATE_PARAMS
                    .writer(params.bytes(0))
                    .put("word", word.deviceAddress())
                    .put("timeout_ns", 10_000_000_000L);
            try (Scope scope = gpu.context.enter()) {
                gpu.driver.launchKernel(gate, 1, 1, 1, 32, 1, 1, 0, gpu.stream(), params);
            }
        }

        /** Behind the gate: new T, routing and rows come from device memory. */
        void replaceInputsOnTheDevice() {
            StepTensors from = staging.tensors().get(0);
            StepTensors to = harness.tensors().get(0);
            try (Scope scope = gpu.context.enter()) {
                copy(to.tokenCount().address(), from.tokenCount().address(), 4);
                copy(to.hidden().address(), from.hidden().address(), to.hidden().bytes());
                copy(to.topkIds().address(), from.topkIds().address(), to.topkIds().bytes());
                copy(
                        to.topkWeights().address(),
                        from.topkWeights().address(),
                        to.topkWeights().bytes());
            }
        }

        private static void copy(long to, long from, long bytes) {
            gpu.driver.memcpyDtoDAsync(to, from, bytes, gpu.stream());
        }

        boolean streamIsBusy() {
            try (Scope scope = gpu.context.enter()) {
                return !gpu.driver.streamQuery(gpu.stream());
            }
        }

        void openGate() {
            word.bytes().putInt(0, 1);
        }

        @Override
        public void close() {
            openGate();
            harness.close();
            staging.close();
            module.close();
            word.close();
        }
    }
}
