package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.catchThrowableOfType;

import java.nio.ByteBuffer;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

class RecordingDriverTest {
    private final RecordingDriver driver = new RecordingDriver(2, 1 << 20);
    private Context context;
    private Scope scope;

    @BeforeEach
    void enter() {
        context = new Context(driver, 0);
        scope = context.enter();
    }

    @AfterEach
    void leave() {
        scope.close();
        assertThat(driver.contextCurrent()).isZero();
    }

    @Test
    void shouldRecordCallsInOrderWithArgumentsAndResults() {
        driver.clearCalls();
        long stream = driver.streamCreate();
        long address = driver.memAlloc(1024);
        driver.memsetD32Async(address, 7, 256, stream);
        driver.streamSynchronize(stream);
        assertThat(driver.calls())
                .extracting(RecordingDriver.Recorded::call)
                .containsExactly(
                        Call.STREAM_CREATE,
                        Call.MEM_ALLOC,
                        Call.MEMSET_D32_ASYNC,
                        Call.STREAM_SYNCHRONIZE);
        assertThat(driver.calls(Call.MEM_ALLOC).get(0).longAt(0)).isEqualTo(1024);
        assertThat(driver.calls(Call.MEM_ALLOC).get(0).toString())
                .isEqualTo("cuMemAlloc(1024) = 0x" + Long.toHexString(address));
    }

    @Test
    void shouldDecodeLaunches() {
        try (ParamArena arena = new ParamArena(context);
                KernelModule module = new KernelModule(context, "m", new byte[] {1})) {
            long function = module.function("moe_swiglu", 100 << 10);
            KernelParams params =
                    arena.params(8, 4, 12).putLong(0, 0x1234_5678_9abcL).putInt(1, -5);
            params.bytes(2).putFloat(8, 1.5f);
            driver.launchKernelPdl(function, 132, 1, 1, 384, 1, 1, 100 << 10, 0, params);
            params.putInt(1, 6);
            RecordingDriver.Launch launch = driver.launches().get(0);
            assertThat(launch.kernel()).isEqualTo("moe_swiglu");
            assertThat(launch.gridX()).isEqualTo(132);
            assertThat(launch.pdl()).isTrue();
            assertThat(launch.params()).hasSize(24);
            assertThat(launch.paramBytes().getLong(0)).isEqualTo(0x1234_5678_9abcL);
            assertThat(launch.paramBytes().getInt(8)).as("copied at launch").isEqualTo(-5);
            assertThat(launch.paramBytes().getFloat(20)).isEqualTo(1.5f);
            assertThatThrownBy(() -> params.putInt(0, 1)).hasMessageContaining("has 8 bytes");
            assertThat(code(() -> launch(function, 2000, 0, params))).isEqualTo(1);
            assertThat(code(() -> launch(function, 32, 101 << 10, params))).isEqualTo(1);
        }
    }

    @Test
    void shouldRefuseArgumentsThatWereFreed() {
        try (KernelModule module = new KernelModule(context, "m", new byte[] {1})) {
            ParamArena arena = new ParamArena(context);
            KernelParams params = arena.params(4);
            arena.close();
            arena.close();
            long function = module.function("k");
            assertThatThrownBy(() -> launch(function, 32, 0, params))
                    .hasMessageContaining("its arguments were freed");
            assertThatThrownBy(() -> arena.params(4)).isInstanceOf(IllegalStateException.class);
        }
    }

    @Test
    void shouldNeedAContext() {
        scope.close();
        assertThat(code(() -> driver.memAlloc(1))).isEqualTo(CudaErrors.INVALID_CONTEXT);
        assertThat(code(driver::contextPop)).isEqualTo(CudaErrors.INVALID_CONTEXT);
        scope = context.enter();
        int elsewhere = CompletableFuture.supplyAsync(() -> code(() -> driver.memAlloc(1))).join();
        assertThat(elsewhere).as("contexts belong to threads").isEqualTo(201);
    }

    @Test
    void shouldRestoreNestedContexts() {
        try (Context other = new Context(driver, 1);
                Scope inner = other.enter()) {
            assertThat(driver.contextCurrent()).isEqualTo(other.handle());
        }
        assertThat(driver.contextCurrent()).isEqualTo(context.handle());
    }

    @Test
    void shouldAccountForMemoryAndNameLeaks() {
        long address = driver.memAlloc(1000);
        HostMemory host = driver.hostAlloc(24);
        assertThat(driver.allocatedBytes()).isEqualTo(1024);
        assertThat(driver.memGetInfo().free()).isEqualTo((1 << 20) - 1024);
        assertThat(driver.leaks()).hasSize(3).anyMatch(line -> line.contains("1000 B"));
        driver.memFree(address);
        driver.hostFree(host);
        assertThatThrownBy(() -> driver.memFree(address)).hasMessageContaining("freed before");
        assertThatThrownBy(() -> driver.hostFree(host)).hasMessageContaining("freed before");
        assertThat(driver.allocatedBytes()).isZero();
        assertThat(driver.peakBytes()).isEqualTo(1024);
        CudaException oom =
                catchThrowableOfType(CudaException.class, () -> driver.memAlloc(2 << 20));
        assertThat(oom.code()).isEqualTo(2);
        assertThat(oom).hasMessageContaining("2097152 bytes, 1048576 of 1048576 free");
        assertThat(driver.leaks()).containsExactly("primary context of device 0, 1×");
    }

    @Test
    void shouldFindAccessOutsideOfAnAllocation() {
        long stream = driver.streamCreate();
        long address = driver.memAlloc(100);
        long foreign = driver.foreignMemory(50);
        driver.memsetD8Async(address + 10, (byte) 0, 90, stream);
        driver.memcpyDtoDAsync(foreign, address, 50, stream);
        assertThatThrownBy(() -> driver.memsetD8Async(address + 10, (byte) 0, 91, stream))
                .hasMessageContaining("not inside one allocation");
        assertThatThrownBy(() -> driver.memcpyDtoDAsync(foreign, address, 51, stream))
                .hasMessageContaining("not inside one allocation");
        HostMemory host = driver.hostAlloc(16);
        assertThatThrownBy(() -> driver.memcpyHtoDAsync(address, host, 8, 9, stream))
                .isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> driver.memcpyHtoD(address, ByteBuffer.allocate(4)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("direct");
    }

    @Test
    void shouldCaptureAndReplay() {
        try (Stream stream = new Stream(context);
                DeviceBuffer buffer = new DeviceBuffer(context, 64)) {
            GraphExec graph =
                    GraphExec.capture(
                            context,
                            stream.handle(),
                            () -> {
                                assertThat(driver.streamIsCapturing(stream.handle())).isTrue();
                                driver.memsetD32Async(buffer.address(), 1, 16, stream.handle());
                                driver.memsetD32Async(buffer.address(), 2, 16, stream.handle());
                            });
            assertThat(graph.nodeCount()).isEqualTo(2);
            graph.launch(stream.handle());
            graph.close();
            graph.close();
            assertThatThrownBy(() -> graph.launch(stream.handle()))
                    .isInstanceOf(IllegalStateException.class);
        }
        assertThat(driver.leaks()).containsExactly("primary context of device 0, 1×");
    }

    @Test
    void shouldBreakTheCaptureAtAForbiddenCall() {
        try (Stream stream = new Stream(context)) {
            for (Runnable forbidden :
                    List.<Runnable>of(
                            () -> driver.memAlloc(16),
                            () -> driver.streamSynchronize(stream.handle()),
                            driver::contextSynchronize,
                            () -> driver.hostAlloc(16),
                            () -> driver.moduleLoad(new byte[] {1}))) {
                CudaException e =
                        catchThrowableOfType(
                                CudaException.class,
                                () -> GraphExec.capture(context, stream.handle(), forbidden));
                assertThat(e.code()).isEqualTo(900);
                assertThat(e.getSuppressed()[0]).hasMessageContaining("901");
                assertThat(driver.streamIsCapturing(stream.handle())).isFalse();
            }
        }
    }

    @Test
    void shouldLetOtherThreadsAllocateDuringACapture() {
        long stream = driver.streamCreate();
        driver.streamBeginCapture(stream);
        CompletableFuture.runAsync(
                        () -> {
                            try (DeviceBuffer buffer = new DeviceBuffer(context, 16)) {
                                assertThat(buffer.address()).isNotZero();
                            }
                        })
                .join();
        int wrongThread =
                CompletableFuture.supplyAsync(
                                () -> {
                                    try (Scope other = context.enter()) {
                                        return code(() -> driver.streamEndCapture(stream));
                                    }
                                })
                        .join();
        assertThat(wrongThread).isEqualTo(908);
        driver.graphDestroy(driver.streamEndCapture(stream));
    }

    @Test
    void shouldWantForkedStreamsJoined() {
        long main = driver.streamCreate();
        long side = driver.foreignStream();
        long fork = driver.eventCreate(false);
        long join = driver.eventCreate(false);
        long address = driver.memAlloc(16);
        for (boolean joined : new boolean[] {true, false}) {
            driver.streamBeginCapture(main);
            driver.eventRecord(fork, main);
            driver.streamWaitEvent(side, fork);
            assertThat(driver.streamIsCapturing(side)).isTrue();
            driver.memsetD8Async(address, (byte) 1, 16, side);
            driver.eventRecord(join, side);
            if (joined) {
                driver.streamWaitEvent(main, join);
                long graph = driver.streamEndCapture(main);
                assertThat(driver.graphNodeCount(graph)).isEqualTo(1);
            } else {
                assertThat(code(() -> driver.streamEndCapture(main))).isEqualTo(904);
            }
            assertThat(driver.streamIsCapturing(side)).isFalse();
        }
    }

    @Test
    void shouldFailWhereTold() {
        driver.failNth(Call.MEM_ALLOC, 2, 2);
        long first = driver.memAlloc(16);
        assertThat(code(() -> driver.memAlloc(16))).isEqualTo(2);
        driver.memAlloc(16);
        driver.memFree(first);
        driver.poison(719);
        CudaException lost = catchThrowableOfType(CudaException.class, () -> driver.memAlloc(16));
        assertThat(lost.poisonsContext()).isTrue();
    }

    @Test
    void shouldCloseQuietlyInALostContext() {
        DeviceBuffer buffer = new DeviceBuffer(context, 16);
        Stream stream = new Stream(context);
        driver.poison(700);
        buffer.close();
        stream.close();
    }

    @Test
    void shouldRefuseUseAfterClose() {
        DeviceBuffer buffer = new DeviceBuffer(context, 16);
        buffer.close();
        buffer.close();
        assertThatThrownBy(buffer::address).isInstanceOf(IllegalStateException.class);
        Context other = new Context(driver, 1);
        other.close();
        other.close();
        assertThatThrownBy(other::enter).hasMessageContaining("device 1 is closed");
        assertThat(code(() -> driver.contextPush(other.handle()))).isEqualTo(201);
    }

    private void launch(long function, int threads, int shared, KernelParams params) {
        driver.launchKernel(function, 1, 1, 1, threads, 1, 1, shared, 0, params);
    }

    private static int code(Runnable call) {
        CudaException e = catchThrowableOfType(CudaException.class, call::run);
        return e == null ? 0 : e.code();
    }
}
