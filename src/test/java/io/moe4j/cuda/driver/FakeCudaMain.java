package io.moe4j.cuda.driver;

import io.moe4j.BackendProvider.Availability;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import jcuda.driver.JCudaDriver;

/**
 * Runs in a child JVM against the fake libcuda: every driver call once, with its result checked.
 */
public final class FakeCudaMain {
    private FakeCudaMain() {}

    /** Prints OK at the end, or throws. */
    public static void main(String[] args) {
        String tmpdir = System.getProperty("java.io.tmpdir");
        Availability availability = Drivers.availability();
        System.out.println(availability);
        if (!availability.usable()) {
            return;
        }
        same(tmpdir, System.getProperty("java.io.tmpdir"), "java.io.tmpdir is restored");
        Driver driver = Drivers.open();
        same(driver, Drivers.open(), "one driver");
        runAll(driver);
        JCudaDriver.setExceptionsEnabled(true);
        runAll(driver);
        System.out.println("OK");
    }

    private static void runAll(Driver driver) {
        same(13_000, driver.version(), "version");
        same(2, driver.deviceCount(), "count");
        same("Fake GPU 1", driver.deviceName(1), "name");
        same("0000:1c:00.0", driver.devicePciBusId(1), "bus id");
        same(132, driver.deviceAttribute(0, DeviceAttribute.MULTIPROCESSOR_COUNT), "SM count");
        same(1L << 37, driver.deviceTotalMemory(0), "memory");
        same(true, driver.deviceCanAccessPeer(0, 1), "peer");
        fails(101, () -> driver.deviceName(7));

        same(0L, driver.contextCurrent(), "no context");
        try (Context context = new Context(driver, 1)) {
            try (Scope scope = context.enter()) {
                same(context.handle(), driver.contextCurrent(), "current");
                same(1, driver.contextDevice(), "device of the context");
                driver.contextEnablePeerAccess(0xc000);
                driver.contextSynchronize();
                memory(driver);
                streams(driver);
                kernels(driver, context);
            }
        }
        same(0L, driver.contextCurrent(), "restored");
        fails(201, driver::contextPop);
    }

    private static void memory(Driver driver) {
        long a = driver.memAlloc(64);
        long b = driver.memAlloc(64);
        same(
                new Driver.PointerInfo(0xc001, 1, false),
                driver.pointer(a).orElseThrow(),
                "what an address belongs to");
        same(true, driver.pointer(4096).isEmpty(), "unknown memory");
        HostMemory host = driver.hostAlloc(64);
        ByteBuffer direct = ByteBuffer.allocateDirect(64).order(ByteOrder.LITTLE_ENDIAN);
        driver.memsetD32(a, 0x01020304, 16);
        driver.memcpyDtoD(b, a, 64);
        driver.memcpyDtoH(direct, b);
        same(0x01020304, direct.getInt(60), "memset, copies");

        direct.putInt(8, 42).position(8).limit(12);
        driver.memcpyHtoD(a + 4, direct);
        same(8, direct.position(), "the position stays");
        driver.memcpyDtoHAsync(host, 16, a, 32, 0);
        same(42, host.bytes().getInt(20), "offset copies");
        host.bytes().putInt(40, 77);
        driver.memcpyHtoDAsync(a, host, 40, 4, 0);
        driver.memcpyDtoDAsync(b, a, 4, 0);
        driver.memsetD8Async(b + 1, (byte) 1, 1, 0);
        driver.memsetD32Async(b + 4, 5, 1, 0);
        driver.memsetD8(b + 8, (byte) 9, 4);
        direct.clear();
        driver.memcpyDtoH(direct, b);
        same(77 + 256, direct.getInt(0), "async copy, memsetD8Async");
        same(5, direct.getInt(4), "memsetD32Async");
        same(0x09090909, direct.getInt(8), "memsetD8");
        same(new Driver.MemInfo(1000, 2000), driver.memGetInfo(), "info");

        CudaException oom = fails(2, () -> driver.memAlloc(1L << 40));
        same(
                true,
                oom.getMessage().contains("1099511627776 bytes, 1000 of 2000 free"),
                oom.getMessage());
        try {
            driver.memcpyHtoD(a, ByteBuffer.allocate(8));
            throw new AssertionError("a heap buffer was accepted");
        } catch (IllegalArgumentException expected) {
            same(true, expected.getMessage().contains("direct"), expected.getMessage());
        }
        byte[] ipc = driver.ipcGetMemHandle(a);
        same(a, driver.ipcOpenMemHandle(ipc), "ipc");
        driver.ipcCloseMemHandle(a);
        driver.hostFree(host);
        driver.memFree(a);
        driver.memFree(b);
        driver.memFree(0);
    }

    private static void streams(Driver driver) {
        long stream = driver.streamCreate();
        same(0x57000L, stream, "stream");
        long event = driver.eventCreate(true);
        long quick = driver.eventCreate(false);
        same(event + 2, quick, "timing flag");
        driver.eventRecord(event, stream);
        driver.streamWaitEvent(stream, event);
        driver.eventSynchronize(event);
        same(true, driver.eventQuery(event), "event done");
        same(1.5f, driver.eventElapsedMs(event, event), "elapsed");
        same(true, driver.streamQuery(stream), "stream done");
        same(false, driver.streamQuery(0xb0), "stream busy");
        driver.streamSynchronize(stream);
        CudaException lost = fails(719, () -> driver.streamSynchronize(0xdead));
        same(true, lost.poisonsContext(), "719 poisons");
        try (Scope relaxed = driver.relaxCapture();
                Scope again = driver.relaxCapture()) {
            driver.streamSynchronize(stream);
        }
        driver.eventDestroy(event);
        driver.eventDestroy(quick);
        driver.streamDestroy(stream);
    }

    private static void kernels(Driver driver, Context context) {
        fails(222, () -> driver.moduleLoad("// other".getBytes()));
        try (Stream stream = new Stream(context);
                ParamArena arena = new ParamArena(context, 256);
                DeviceBuffer values = new DeviceBuffer(context, 16);
                KernelModule module = new KernelModule(context, "test", "// ptx".getBytes())) {
            fails(500, () -> module.function("missing"));
            long add = module.function("add", 200 << 10);
            same(104, driver.funcGetAttribute(add, FuncAttribute.REGISTERS), "registers");
            same(16, driver.occupancyMaxActiveBlocks(add, 128, 0), "occupancy");
            driver.memsetD32(values.address(), 10, 4);
            KernelParams params = arena.params(8, 4, 8).putLong(0, values.address()).putInt(1, 4);
            params.bytes(2).putFloat(0, 2f).putInt(4, 5);
            KernelParams second = arena.params(8, 4, 8);
            same(3, second.count(), "count");
            long third = arena.params(200, 200).tableAddress();
            same(true, third != 0, "a new chunk");

            driver.launchKernel(add, 3, 2, 1, 128, 1, 1, 4096, stream.handle(), params);
            same("[25, 25, 25, 25]", ints(driver, values.address()), "launch");
            same(true, driver.pdlSupport().usable(), driver.pdlSupport().reason());
            GraphExec graph =
                    GraphExec.capture(
                            context,
                            stream.handle(),
                            () -> {
                                same(true, driver.streamIsCapturing(stream.handle()), "capturing");
                                params.bytes(2).putFloat(0, 1f).putInt(4, 1);
                                driver.launchKernelPdl(
                                        add, 3, 2, 1, 128, 1, 1, 4096, stream.handle(), params);
                            });
            try (graph) {
                same(1L, graph.nodeCount(), "nodes");
                graph.launch(stream.handle());
            }
            same("[26, 26, 26, 26]", ints(driver, values.address()), "PDL launch");
            CudaException shape =
                    fails(
                            1,
                            () ->
                                    driver.launchKernel(
                                            add, 9, 9, 9, 1, 1, 1, 0, stream.handle(), params));
            same(true, shape.getMessage().contains("grid 9×9×9"), shape.getMessage());
        }
    }

    private static String ints(Driver driver, long address) {
        ByteBuffer direct = ByteBuffer.allocateDirect(16).order(ByteOrder.LITTLE_ENDIAN);
        driver.memcpyDtoH(direct, address);
        int[] values = new int[4];
        direct.asIntBuffer().get(values);
        return Arrays.toString(values);
    }

    private static CudaException fails(int code, Runnable call) {
        try {
            call.run();
        } catch (CudaException e) {
            same(code, e.code(), e.getMessage());
            return e;
        }
        throw new AssertionError("no error " + code);
    }

    private static void same(Object expected, Object actual, String what) {
        if (!expected.equals(actual)) {
            throw new AssertionError(what + ": expected " + expected + ", got " + actual);
        }
    }
}
