package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.CheckedDriver;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.engines.EngineContract;
import io.moe4j.engines.EngineCuda;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/** The engine's contract without a GPU: everything but results. Needs the built kernels. */
class EngineRecordingTest extends EngineContract {
    private final RecordingDriver driver = new RecordingDriver();

    @BeforeEach
    void needsKernels() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    @AfterEach
    void leavesNothingBehind() {
        assertThat(driver.leaks()).isEmpty();
    }

    @Override
    protected EngineCuda engine() {
        return new RecordedEngine(driver);
    }

    @Override
    protected MoeLayer open(MoeConfig config) {
        return CudaBackendProvider.open(driver, KernelCatalog.choose(driver, 0), config, "test");
    }

    @Override
    protected boolean computes() {
        return false;
    }

    @Test
    void shouldNameMemoryThatIsTooSmallOrOnAnotherDevice() {
        RecordingDriver two = new RecordingDriver(2, 1L << 34);
        try (CudaLayer layer =
                CudaBackendProvider.open(
                        two, KernelCatalog.choose(two, 0), config().build(), "test")) {
            layer.prepare();
            StepTensors good = tensors(two.foreignMemory(1 << 16));
            layer.bind(List.of(good));
            assertThatThrownBy(() -> layer.bind(List.of(tensors(two.foreignMemory(4000)))))
                    .hasMessageContaining("F32[16, 64] device, is not in device memory at 0x")
                    .hasMessageContaining("smaller than the tensor");
            long elsewhere = two.foreignMemory(1 << 16, two.foreignContext(1));
            assertThatThrownBy(() -> layer.bind(List.of(tensors(elsewhere))))
                    .hasMessageContaining(
                            "is memory of device 1 but the layer runs on device 0: allocate it"
                                    + " there, or set moe4j.cuda.device");
        }
    }

    private static StepTensors tensors(long address) {
        return StepTensors.topk(
                Tensor.device(address, DType.F32, M, SHAPE.hidden()),
                Tensor.device(address, DType.F32, M, SHAPE.hidden()),
                Tensor.device(address, DType.I32, M, SHAPE.topK()),
                Tensor.device(address, DType.F32, M, SHAPE.topK()),
                Tensor.device(address, DType.I32, 1));
    }

    @Test
    void shouldKeepTheContextInACopyOfTheConfiguration() {
        MoeConfig config = config().cudaContext(77).build();
        assertThat(config.toBuilder().build()).isEqualTo(config);
        assertThat(config().build().cudaContext()).isZero();
    }

    @Test
    void shouldNameAContextThatDoesNotLive() {
        assertThatThrownBy(() -> open(config().cudaContext(0x77).build()))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessage(
                        "cudaContext=0x77 is no context that lives: pass the CUcontext of the"
                                + " engine, or 0 for the primary context of the device");
    }

    @Test
    void shouldNameAStreamThatWasDestroyed() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build())) {
            layer.prepare();
            BoundStep step = layer.bind(List.of(tensors(driver.foreignMemory(1 << 16))));
            long stream = driver.foreignStream(cuda.context());
            driver.destroyForeignStream(stream);
            assertThatThrownBy(() -> layer.enqueue(stream, step))
                    .hasMessageContaining("is no stream of the layer's context")
                    .hasMessageContaining("it was destroyed");
            layer.enqueue(cuda.stream(), step);
        }
    }

    @Test
    void shouldNameFreedMemoryAtTheNextStepOfACheckedLayer() {
        MoeConfig config = config().cudaContext(cuda.context()).build();
        try (CheckedCudaLayer layer =
                CudaBackendProvider.openChecked(
                        driver,
                        CheckedDriver.Mode.THROW,
                        KernelCatalog.choose(driver, 0),
                        config,
                        "test")) {
            layer.prepare();
            long memory = driver.foreignMemory(1 << 16, cuda.context());
            BoundStep step = layer.bind(List.of(tensors(memory)));
            layer.enqueue(cuda.stream(), step);
            driver.freeForeignMemory(memory);
            assertThatThrownBy(() -> layer.enqueue(cuda.stream(), step))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("bound memory is gone, rank 0: hidden=0x");
        }
    }

    @Test
    void shouldRefuseASecondThread() throws Exception {
        CountDownLatch inside = new CountDownLatch(1);
        CountDownLatch goOn = new CountDownLatch(1);
        Driver slow =
                (Driver)
                        Proxy.newProxyInstance(
                                Driver.class.getClassLoader(),
                                new Class<?>[] {Driver.class},
                                (proxy, method, args) -> {
                                    if (method.getName().startsWith("launchKernel")
                                            && Thread.currentThread().getName().equals("first")) {
                                        inside.countDown();
                                        goOn.await();
                                    }
                                    try {
                                        return method.invoke(driver, args);
                                    } catch (InvocationTargetException e) {
                                        throw e.getCause();
                                    }
                                });
        MoeConfig config = config().cudaContext(cuda.context()).build();
        try (CudaLayer layer =
                CudaBackendProvider.open(slow, KernelCatalog.choose(slow, 0), config, "test")) {
            layer.prepare();
            BoundStep step = layer.bind(List.of(tensors(driver.foreignMemory(1 << 16))));
            CompletableFuture<Void> first = new CompletableFuture<>();
            Thread thread =
                    new Thread(
                            () -> {
                                try {
                                    layer.enqueue(cuda.stream(), step);
                                    first.complete(null);
                                } catch (RuntimeException e) {
                                    first.completeExceptionally(e);
                                }
                            },
                            "first");
            thread.start();
            inside.await();
            assertThatThrownBy(() -> layer.enqueue(cuda.stream(), step))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessage("another thread is enqueueing on this layer: one step at a time");
            goOn.countDown();
            first.get();
            thread.join();
            layer.enqueue(cuda.stream(), step);
        }
    }

    /** An engine whose driver is the recording one. */
    private static final class RecordedEngine implements EngineCuda {
        private final RecordingDriver driver;
        private final long context;
        private final long stream;
        private final List<Long> memory = new ArrayList<>();

        RecordedEngine(RecordingDriver driver) {
            this.driver = driver;
            this.context = driver.foreignContext(0);
            this.stream = driver.foreignStream(context);
            makeCurrent(context);
        }

        @Override
        public long context() {
            return context;
        }

        @Override
        public long stream() {
            return stream;
        }

        @Override
        public long current() {
            return driver.contextCurrent();
        }

        @Override
        public void makeCurrent(long other) {
            if (driver.contextCurrent() != 0) {
                driver.contextPop();
            }
            if (other != 0) {
                driver.contextPush(other);
            }
        }

        @Override
        public long allocate(long bytes) {
            long address = driver.foreignMemory(bytes, context);
            memory.add(address);
            return address;
        }

        @Override
        public void free(long address) {
            memory.remove(address);
            driver.freeForeignMemory(address);
        }

        @Override
        public void write(long to, ByteBuffer from) {
            driver.memcpyHtoD(to, from);
        }

        @Override
        public void read(ByteBuffer to, long from) {
            driver.memcpyDtoH(to, from);
        }

        @Override
        public void beginCapture() {
            driver.streamBeginCapture(stream);
        }

        @Override
        public long endCapture() {
            long graph = driver.streamEndCapture(stream);
            long executable = driver.graphInstantiate(graph);
            driver.graphDestroy(graph);
            return executable;
        }

        @Override
        public void launch(long graph) {
            driver.graphLaunch(graph, stream);
        }

        @Override
        public void destroyGraph(long graph) {
            driver.graphExecDestroy(graph);
        }

        @Override
        public void synchronize() {
            try (Scope scope = driver.enter(context)) {
                driver.streamSynchronize(stream);
            }
        }

        @Override
        public void close() {
            memory.forEach(driver::freeForeignMemory);
            driver.destroyForeignStream(stream);
            if (driver.contextCurrent() == context) {
                driver.contextPop();
            }
        }
    }
}
