package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.cuda.driver.CheckedDriver.Mode;
import io.moe4j.cuda.driver.CheckedDriver.Zone;
import java.lang.reflect.Method;
import java.lang.reflect.Proxy;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import org.junit.jupiter.api.Test;

class CheckedDriverTest {
    private final RecordingDriver recording = new RecordingDriver();
    private final CheckedDriver throwing = new CheckedDriver(recording, Mode.THROW);
    private final CheckedDriver noting = new CheckedDriver(recording, Mode.RECORD);

    @Test
    void shouldPassEverythingOutsideOfAZone() {
        try (Context context = new Context(throwing, 0);
                Stream stream = new Stream(context)) {
            stream.synchronize();
        }
        assertThat(throwing.violations()).isEmpty();
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldRefuseAWaitAndSayWhereItCameFrom() {
        try (Context context = new Context(throwing, 0);
                Stream stream = new Stream(context)) {
            recording.clearCalls();
            try (Zone zone = throwing.noSyncZone("enqueue")) {
                assertThatThrownBy(() -> throwing.streamSynchronize(stream.handle()))
                        .isInstanceOf(IllegalStateException.class)
                        .hasMessageContaining("cuStreamSynchronize may wait for the device")
                        .hasMessageContaining("in no-sync zone enqueue")
                        .hasMessageContaining("CheckedDriverTest");
                assertThatThrownBy(() -> new DeviceBuffer(context, 16))
                        .hasMessageContaining("cuMemAlloc")
                        .hasMessageContaining("CheckedDriverTest");
            }
            assertThat(recording.calls(Call.STREAM_SYNCHRONIZE, Call.MEM_ALLOC))
                    .as("refused before the driver saw it")
                    .isEmpty();
            stream.synchronize();
        }
    }

    @Test
    void shouldNoteAndGoOn() {
        try (Context context = new Context(noting, 0);
                DeviceBuffer buffer = new DeviceBuffer(context, 64);
                Stream stream = new Stream(context);
                Scope scope = context.enter()) {
            try (Zone outer = noting.noSyncZone("step");
                    Zone inner = noting.noSyncZone("dispatch")) {
                noting.memsetD8Async(buffer.address(), (byte) 0, 64, stream.handle());
                noting.memcpyDtoH(ByteBuffer.allocateDirect(4), buffer.address());
            }
            assertThat(noting.violations()).hasSize(1);
            CheckedDriver.Violation violation = noting.violations().get(0);
            assertThat(violation.call()).isEqualTo(Call.MEMCPY_D_TO_H);
            assertThat(violation.zone()).isEqualTo("dispatch");
            assertThat(violation.from()).contains("shouldNoteAndGoOn");
            assertThat(violation).hasToString(violation.toString()).asString().contains("pageable");
        }
    }

    @Test
    void shouldWatchOnlyTheThreadOfTheZone() {
        try (Context context = new Context(throwing, 0);
                Zone zone = throwing.noSyncZone("enqueue")) {
            CompletableFuture.runAsync(() -> new DeviceBuffer(context, 16).close()).join();
        } catch (IllegalStateException e) {
            assertThat(e).as("closing the context waits").hasMessageContaining("Release");
        }
        assertThat(recording.calls(Call.MEM_FREE)).hasSize(1);
    }

    /** Every method of the interface reaches the driver once, and unlawful ones are refused. */
    @Test
    void shouldGuardEveryMethod() throws Exception {
        List<String> reached = new ArrayList<>();
        Driver target =
                (Driver)
                        Proxy.newProxyInstance(
                                Driver.class.getClassLoader(),
                                new Class<?>[] {Driver.class},
                                (proxy, method, args) -> {
                                    reached.add(method.getName());
                                    return zero(method.getReturnType());
                                });
        CheckedDriver checked = new CheckedDriver(target, Mode.RECORD);
        try (Zone zone = checked.noSyncZone("all")) {
            for (Method method : Driver.class.getMethods()) {
                reached.clear();
                int before = checked.violations().size();
                Object[] args =
                        Arrays.stream(method.getParameterTypes())
                                .map(CheckedDriverTest::zero)
                                .toArray();
                method.invoke(checked, args);
                assertThat(reached).containsExactly(method.getName());
                boolean noted = checked.violations().size() > before;
                assertThat(noted).as(method.getName()).isEqualTo(!LEGAL.contains(method.getName()));
            }
        }
    }

    private static final List<String> LEGAL =
            List.of(
                    "version",
                    "deviceCount",
                    "deviceName",
                    "deviceAttribute",
                    "deviceTotalMemory",
                    "devicePciBusId",
                    "deviceCanAccessPeer",
                    "contextCurrent",
                    "contextDevice",
                    "contextPush",
                    "contextPop",
                    "enter",
                    "pointer",
                    "memGetInfo",
                    "memsetD8Async",
                    "memsetD32Async",
                    "memcpyHtoDAsync",
                    "memcpyDtoHAsync",
                    "memcpyDtoDAsync",
                    "streamQuery",
                    "streamWaitEvent",
                    "streamIsCapturing",
                    "streamBeginCapture",
                    "streamEndCapture",
                    "relaxCapture",
                    "graphLaunch",
                    "graphNodeCount",
                    "eventRecord",
                    "eventQuery",
                    "eventElapsedMs",
                    "funcGetAttribute",
                    "occupancyMaxActiveBlocks",
                    "launchKernel",
                    "launchKernelPdl",
                    "pdlSupport",
                    "ipcGetMemHandle");

    private static Object zero(Class<?> type) {
        if (type == int.class) {
            return 0;
        }
        if (type == long.class) {
            return 0L;
        }
        if (type == byte.class) {
            return (byte) 0;
        }
        if (type == float.class) {
            return 0f;
        }
        return type == boolean.class ? Boolean.FALSE : null;
    }
}
