package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.catchThrowableOfType;

import io.moe4j.cuda.EnabledIfCuda;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/** Conformance of the driver calls in use on a real device; the kernel is a few lines of PTX. */
@EnabledIfCuda
class NativeDriverGpuTest {
    /** add(unsigned long address, unsigned value): word[thread] += value, one block. */
    private static final String PTX =
            """
            .version 7.0
            .target sm_80
            .address_size 64
            .visible .entry add(.param .u64 address, .param .u32 value)
            {
                .reg .b32 %r<5>;
                .reg .b64 %rd<5>;
                ld.param.u64 %rd1, [address];
                ld.param.u32 %r1, [value];
                cvta.to.global.u64 %rd2, %rd1;
                mov.u32 %r2, %tid.x;
                mul.wide.u32 %rd3, %r2, 4;
                add.s64 %rd4, %rd2, %rd3;
                ld.global.u32 %r3, [%rd4];
                add.u32 %r4, %r3, %r1;
                st.global.u32 [%rd4], %r4;
                ret;
            }
            """;

    /** The same, waiting for the kernel before: what a PDL launch has to do. */
    private static final String PTX_WAITING =
            PTX.replace(".version 7.0", ".version 7.8")
                    .replace(".target sm_80", ".target sm_90")
                    .replace("ld.param.u64", "griddepcontrol.wait;\n    ld.param.u64");

    private final Driver driver = Drivers.open();
    private Context context;
    private Scope scope;
    private long found;

    @BeforeEach
    void enter() {
        found = driver.contextCurrent();
        context = new Context(driver, 0);
        scope = context.enter();
    }

    @AfterEach
    void leave() {
        scope.close();
        context.close();
        assertThat(driver.contextCurrent()).as("the context that is current").isEqualTo(found);
    }

    @Test
    void shouldDescribeTheDevice() {
        assertThat(driver.version()).isGreaterThanOrEqualTo(12_000);
        assertThat(driver.deviceName(0)).isNotBlank();
        assertThat(driver.devicePciBusId(0)).matches("[0-9A-Fa-f:.]+");
        assertThat(context.attribute(DeviceAttribute.MULTIPROCESSOR_COUNT)).isPositive();
        assertThat(context.attribute(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN))
                .isGreaterThan(48 << 10);
        assertThat(driver.deviceTotalMemory(0)).isGreaterThan(1L << 30);
        assertThat(driver.pdlSupport().reason()).isNotBlank();
    }

    @Test
    void shouldCopyAndFill() {
        try (DeviceBuffer a = new DeviceBuffer(context, 4096);
                DeviceBuffer b = new DeviceBuffer(context, 4096);
                PinnedBuffer pinned = new PinnedBuffer(context, 4096);
                Stream stream = new Stream(context)) {
            driver.memsetD32Async(a.address(), 0x01020304, 1024, stream.handle());
            driver.memsetD8Async(a.address() + 4, (byte) 9, 4, stream.handle());
            driver.memcpyDtoDAsync(b.address(), a.address(), 4096, stream.handle());
            driver.memcpyDtoHAsync(pinned.memory(), 0, b.address(), 4096, stream.handle());
            stream.synchronize();
            assertThat(driver.streamQuery(stream.handle())).isTrue();
            assertThat(pinned.bytes().getInt(0)).isEqualTo(0x01020304);
            assertThat(pinned.bytes().getInt(4)).isEqualTo(0x09090909);
            assertThat(pinned.bytes().getInt(4092)).isEqualTo(0x01020304);

            ByteBuffer direct = ByteBuffer.allocateDirect(16).order(ByteOrder.LITTLE_ENDIAN);
            direct.putInt(4, 77).position(4).limit(8);
            driver.memcpyHtoD(b.address() + 8, direct);
            direct.clear();
            driver.memcpyDtoH(direct, b.address());
            assertThat(direct.getInt(8)).isEqualTo(77);
        }
    }

    @Test
    void shouldLaunchCaptureAndReplay() {
        try (KernelModule module =
                        new KernelModule(context, "add", PTX.getBytes(StandardCharsets.US_ASCII));
                ParamArena arena = new ParamArena(context);
                DeviceBuffer words = new DeviceBuffer(context, 128);
                Stream stream = new Stream(context)) {
            long add = module.function("add");
            assertThat(driver.funcGetAttribute(add, FuncAttribute.LOCAL_BYTES)).isZero();
            assertThat(driver.occupancyMaxActiveBlocks(add, 32, 0)).isPositive();
            driver.memsetD32Async(words.address(), 0, 32, stream.handle());
            KernelParams one = arena.params(8, 4).putLong(0, words.address()).putInt(1, 1);
            KernelParams ten = arena.params(8, 4).putLong(0, words.address()).putInt(1, 10);
            long on = stream.handle();
            driver.launchKernel(add, 1, 1, 1, 32, 1, 1, 0, on, one);
            one.putInt(1, 100);
            Runnable step =
                    () -> {
                        driver.launchKernel(add, 1, 1, 1, 32, 1, 1, 0, on, one);
                        driver.launchKernel(add, 1, 1, 1, 32, 1, 1, 0, on, ten);
                    };
            try (GraphExec graph = GraphExec.capture(context, on, step)) {
                assertThat(graph.nodeCount()).isEqualTo(2);
                one.putInt(1, 9999);
                for (int i = 0; i < 100; i++) {
                    graph.launch(on);
                }
            }
            ByteBuffer result = ByteBuffer.allocateDirect(128).order(ByteOrder.LITTLE_ENDIAN);
            stream.synchronize();
            driver.memcpyDtoH(result, words.address());
            for (int i = 0; i < 32; i++) {
                assertThat(result.getInt(4 * i)).isEqualTo(1 + 100 * 110);
            }
        }
    }

    @Test
    @EnabledIfCuda(computeCapability = 90)
    void shouldChainPdlLaunchesEagerlyAndInAGraph() {
        assertThat(driver.pdlSupport().usable()).as(driver.pdlSupport().reason()).isTrue();
        try (KernelModule module =
                        new KernelModule(
                                context, "add", PTX_WAITING.getBytes(StandardCharsets.US_ASCII));
                ParamArena arena = new ParamArena(context);
                DeviceBuffer words = new DeviceBuffer(context, 128);
                Stream stream = new Stream(context)) {
            long add = module.function("add");
            KernelParams five = arena.params(8, 4).putLong(0, words.address()).putInt(1, 5);
            long on = stream.handle();
            Runnable step =
                    () -> {
                        driver.launchKernel(add, 1, 1, 1, 32, 1, 1, 0, on, five);
                        driver.launchKernelPdl(add, 1, 1, 1, 32, 1, 1, 0, on, five);
                        driver.launchKernelPdl(add, 1, 1, 1, 32, 1, 1, 0, on, five);
                    };
            driver.memsetD32Async(words.address(), 0, 32, on);
            step.run();
            try (GraphExec graph = GraphExec.capture(context, on, step)) {
                assertThat(graph.nodeCount()).isEqualTo(3);
                for (int i = 0; i < 100; i++) {
                    graph.launch(on);
                }
                stream.synchronize();
            }
            ByteBuffer result = ByteBuffer.allocateDirect(128).order(ByteOrder.LITTLE_ENDIAN);
            driver.memcpyDtoH(result, words.address());
            for (int i = 0; i < 32; i++) {
                assertThat(result.getInt(4 * i)).isEqualTo(15 + 100 * 15);
            }
        }
    }

    @Test
    void shouldTimeWithEvents() {
        try (Event start = new Event(context, true);
                Event end = new Event(context, true);
                DeviceBuffer buffer = new DeviceBuffer(context, 1 << 20);
                Stream stream = new Stream(context)) {
            start.record(stream.handle());
            driver.memsetD8Async(buffer.address(), (byte) 1, 1 << 20, stream.handle());
            end.record(stream.handle());
            end.synchronize();
            assertThat(end.elapsedMsSince(start)).isPositive().isLessThan(1000f);
        }
    }

    @Test
    void shouldRefuseToAllocateInACapture() {
        try (Stream stream = new Stream(context)) {
            CudaException e =
                    catchThrowableOfType(
                            CudaException.class,
                            () ->
                                    GraphExec.capture(
                                            context,
                                            stream.handle(),
                                            () -> driver.memAlloc(1 << 20)));
            assertThat(e.code()).isBetween(900, 908);
            assertThat(driver.streamIsCapturing(stream.handle())).isFalse();
            stream.synchronize();
        }
    }

    @Test
    void shouldNameErrors() {
        assertThatThrownBy(() -> driver.memAlloc(1L << 50))
                .isInstanceOf(CudaException.class)
                .hasMessageContaining("CUDA_ERROR_OUT_OF_MEMORY")
                .hasMessageContaining("free");
        assertThatThrownBy(() -> new KernelModule(context, "bad", "nonsense".getBytes()))
                .isInstanceOf(CudaException.class);
        assertThatThrownBy(() -> driver.deviceName(99)).hasMessageContaining("device 99");
    }
}
