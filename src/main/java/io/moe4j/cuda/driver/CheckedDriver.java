package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Optional;
import java.util.Set;

/**
 * The host-sync checker: a driver that refuses or records every call that could wait for the
 * device, allocate, or copy pageable memory while a <i>no-sync zone</i> is open on the calling
 * thread. Put around the driver only when checking is wanted, so production carries no trace of it.
 *
 * <pre>
 *   try (var zone = checked.noSyncZone("enqueue")) {
 *       layer.enqueue(stream, step);
 *   }
 * </pre>
 */
public final class CheckedDriver implements Driver {
    /** What happens at a violation. */
    public enum Mode {
        /**
         * The call is refused with an {@link IllegalStateException}; nothing reaches the driver.
         */
        THROW,
        /** The call is noted in {@link #violations} and made. */
        RECORD
    }

    /**
     * A call that a step must not make.
     *
     * @param call the call
     * @param zone name of the zone it was made in
     * @param from where: class, method and line
     */
    public record Violation(Call call, String zone, String from) {
        @Override
        public String toString() {
            List<String> why = new ArrayList<>();
            if (call.has(Call.Effect.WAITS)) {
                why.add("may wait for the device");
            }
            if (call.has(Call.Effect.ALLOCATES)) {
                why.add("may allocate or free");
            }
            if (call.has(Call.Effect.COPIES_PAGEABLE)) {
                why.add("copies pageable memory");
            }
            return call.symbol()
                    + " "
                    + String.join(" and ", why)
                    + ", in no-sync zone "
                    + zone
                    + ", called from "
                    + from;
        }
    }

    /** A no-sync zone of one thread; zones nest. */
    @FunctionalInterface
    public interface Zone extends AutoCloseable {
        /** Ends the zone. */
        @Override
        void close();
    }

    private static final Set<String> OWN_CLASSES =
            Set.of(
                    CheckedDriver.class.getName(),
                    Driver.class.getName(),
                    Context.class.getName(),
                    DeviceBuffer.class.getName(),
                    PinnedBuffer.class.getName(),
                    ParamArena.class.getName(),
                    Stream.class.getName(),
                    Event.class.getName(),
                    GraphExec.class.getName(),
                    KernelModule.class.getName());

    private final Driver driver;
    private final Mode mode;
    private final ThreadLocal<List<String>> zones = ThreadLocal.withInitial(ArrayList::new);
    private final List<Violation> violations = Collections.synchronizedList(new ArrayList<>());

    /**
     * Checks the calls made to {@code driver}.
     *
     * @param driver gets the calls
     * @param mode what to do with a violation
     */
    public CheckedDriver(Driver driver, Mode mode) {
        this.driver = driver;
        this.mode = mode;
    }

    /**
     * Opens a zone on this thread; close it on the same thread.
     *
     * @param name name of the zone in violations
     * @return ends the zone when it is closed, on the same thread
     */
    public Zone noSyncZone(String name) {
        List<String> open = zones.get();
        int depth = open.size();
        open.add(name);
        return () -> {
            List<String> now = zones.get();
            while (now.size() > depth) {
                now.remove(now.size() - 1);
            }
        };
    }

    /** {@return the violations so far, of all threads, in order} */
    public List<Violation> violations() {
        synchronized (violations) {
            return List.copyOf(violations);
        }
    }

    /** {@return the driver that is checked} */
    public Driver unchecked() {
        return driver;
    }

    private void guard(Call call) {
        if (call.legalInStep()) {
            return;
        }
        List<String> open = zones.get();
        if (open.isEmpty()) {
            return;
        }
        Violation violation = new Violation(call, open.get(open.size() - 1), caller());
        violations.add(violation);
        if (mode == Mode.THROW) {
            throw new IllegalStateException(violation.toString());
        }
    }

    private static String caller() {
        return StackWalker.getInstance()
                .walk(
                        frames ->
                                frames.filter(
                                                frame ->
                                                        !OWN_CLASSES.contains(
                                                                outermost(frame.getClassName())))
                                        .findFirst()
                                        .map(frame -> frame.toStackTraceElement().toString())
                                        .orElse("unknown"));
    }

    private static String outermost(String className) {
        int nested = className.indexOf('$');
        return nested < 0 ? className : className.substring(0, nested);
    }

    // ------------------------------------------------------------------ the calls

    @Override
    public int version() {
        guard(Call.DRIVER_GET_VERSION);
        return driver.version();
    }

    @Override
    public int deviceCount() {
        guard(Call.DEVICE_GET_COUNT);
        return driver.deviceCount();
    }

    @Override
    public String deviceName(int device) {
        guard(Call.DEVICE_GET_NAME);
        return driver.deviceName(device);
    }

    @Override
    public int deviceAttribute(int device, DeviceAttribute attribute) {
        guard(Call.DEVICE_GET_ATTRIBUTE);
        return driver.deviceAttribute(device, attribute);
    }

    @Override
    public long deviceTotalMemory(int device) {
        guard(Call.DEVICE_TOTAL_MEM);
        return driver.deviceTotalMemory(device);
    }

    @Override
    public String devicePciBusId(int device) {
        guard(Call.DEVICE_GET_PCI_BUS_ID);
        return driver.devicePciBusId(device);
    }

    @Override
    public boolean deviceCanAccessPeer(int device, int peer) {
        guard(Call.DEVICE_CAN_ACCESS_PEER);
        return driver.deviceCanAccessPeer(device, peer);
    }

    @Override
    public long primaryContextRetain(int device) {
        guard(Call.PRIMARY_CTX_RETAIN);
        return driver.primaryContextRetain(device);
    }

    @Override
    public void primaryContextRelease(int device) {
        guard(Call.PRIMARY_CTX_RELEASE);
        driver.primaryContextRelease(device);
    }

    @Override
    public long contextCurrent() {
        guard(Call.CTX_GET_CURRENT);
        return driver.contextCurrent();
    }

    @Override
    public int contextDevice() {
        guard(Call.CTX_GET_DEVICE);
        return driver.contextDevice();
    }

    @Override
    public void contextPush(long context) {
        guard(Call.CTX_PUSH_CURRENT);
        driver.contextPush(context);
    }

    @Override
    public long contextPop() {
        guard(Call.CTX_POP_CURRENT);
        return driver.contextPop();
    }

    @Override
    public Scope enter(long context) {
        guard(Call.CTX_PUSH_CURRENT);
        return driver.enter(context);
    }

    @Override
    public void contextSynchronize() {
        guard(Call.CTX_SYNCHRONIZE);
        driver.contextSynchronize();
    }

    @Override
    public void contextEnablePeerAccess(long peerContext) {
        guard(Call.CTX_ENABLE_PEER_ACCESS);
        driver.contextEnablePeerAccess(peerContext);
    }

    @Override
    public long memAlloc(long bytes) {
        guard(Call.MEM_ALLOC);
        return driver.memAlloc(bytes);
    }

    @Override
    public void memFree(long address) {
        guard(Call.MEM_FREE);
        driver.memFree(address);
    }

    @Override
    public Optional<PointerInfo> pointer(long address) {
        guard(Call.POINTER_GET_ATTRIBUTE);
        return driver.pointer(address);
    }

    @Override
    public MemInfo memGetInfo() {
        guard(Call.MEM_GET_INFO);
        return driver.memGetInfo();
    }

    @Override
    public HostMemory hostAlloc(long bytes) {
        guard(Call.MEM_HOST_ALLOC);
        return driver.hostAlloc(bytes);
    }

    @Override
    public void hostFree(HostMemory memory) {
        guard(Call.MEM_FREE_HOST);
        driver.hostFree(memory);
    }

    @Override
    public void memsetD8(long address, byte value, long count) {
        guard(Call.MEMSET_D8);
        driver.memsetD8(address, value, count);
    }

    @Override
    public void memsetD32(long address, int value, long count) {
        guard(Call.MEMSET_D32);
        driver.memsetD32(address, value, count);
    }

    @Override
    public void memsetD8Async(long address, byte value, long count, long stream) {
        guard(Call.MEMSET_D8_ASYNC);
        driver.memsetD8Async(address, value, count, stream);
    }

    @Override
    public void memsetD32Async(long address, int value, long count, long stream) {
        guard(Call.MEMSET_D32_ASYNC);
        driver.memsetD32Async(address, value, count, stream);
    }

    @Override
    public void memcpyHtoD(long to, ByteBuffer from) {
        guard(Call.MEMCPY_H_TO_D);
        driver.memcpyHtoD(to, from);
    }

    @Override
    public void memcpyDtoH(ByteBuffer to, long from) {
        guard(Call.MEMCPY_D_TO_H);
        driver.memcpyDtoH(to, from);
    }

    @Override
    public void memcpyDtoD(long to, long from, long bytes) {
        guard(Call.MEMCPY_D_TO_D);
        driver.memcpyDtoD(to, from, bytes);
    }

    @Override
    public void memcpyHtoDAsync(
            long to, HostMemory from, long fromOffset, long bytes, long stream) {
        guard(Call.MEMCPY_H_TO_D_ASYNC);
        driver.memcpyHtoDAsync(to, from, fromOffset, bytes, stream);
    }

    @Override
    public void memcpyDtoHAsync(HostMemory to, long toOffset, long from, long bytes, long stream) {
        guard(Call.MEMCPY_D_TO_H_ASYNC);
        driver.memcpyDtoHAsync(to, toOffset, from, bytes, stream);
    }

    @Override
    public void memcpyDtoDAsync(long to, long from, long bytes, long stream) {
        guard(Call.MEMCPY_D_TO_D_ASYNC);
        driver.memcpyDtoDAsync(to, from, bytes, stream);
    }

    @Override
    public long streamCreate() {
        guard(Call.STREAM_CREATE);
        return driver.streamCreate();
    }

    @Override
    public void streamDestroy(long stream) {
        guard(Call.STREAM_DESTROY);
        driver.streamDestroy(stream);
    }

    @Override
    public void streamSynchronize(long stream) {
        guard(Call.STREAM_SYNCHRONIZE);
        driver.streamSynchronize(stream);
    }

    @Override
    public boolean streamQuery(long stream) {
        guard(Call.STREAM_QUERY);
        return driver.streamQuery(stream);
    }

    @Override
    public void streamWaitEvent(long stream, long event) {
        guard(Call.STREAM_WAIT_EVENT);
        driver.streamWaitEvent(stream, event);
    }

    @Override
    public boolean streamIsCapturing(long stream) {
        guard(Call.STREAM_IS_CAPTURING);
        return driver.streamIsCapturing(stream);
    }

    @Override
    public void streamBeginCapture(long stream) {
        guard(Call.STREAM_BEGIN_CAPTURE);
        driver.streamBeginCapture(stream);
    }

    @Override
    public long streamEndCapture(long stream) {
        guard(Call.STREAM_END_CAPTURE);
        return driver.streamEndCapture(stream);
    }

    @Override
    public Scope relaxCapture() {
        guard(Call.THREAD_EXCHANGE_CAPTURE_MODE);
        return driver.relaxCapture();
    }

    @Override
    public long graphInstantiate(long graph) {
        guard(Call.GRAPH_INSTANTIATE);
        return driver.graphInstantiate(graph);
    }

    @Override
    public void graphUpload(long graphExec, long stream) {
        guard(Call.GRAPH_UPLOAD);
        driver.graphUpload(graphExec, stream);
    }

    @Override
    public void graphLaunch(long graphExec, long stream) {
        guard(Call.GRAPH_LAUNCH);
        driver.graphLaunch(graphExec, stream);
    }

    @Override
    public long graphNodeCount(long graph) {
        guard(Call.GRAPH_GET_NODES);
        return driver.graphNodeCount(graph);
    }

    @Override
    public void graphDestroy(long graph) {
        guard(Call.GRAPH_DESTROY);
        driver.graphDestroy(graph);
    }

    @Override
    public void graphExecDestroy(long graphExec) {
        guard(Call.GRAPH_EXEC_DESTROY);
        driver.graphExecDestroy(graphExec);
    }

    @Override
    public long eventCreate(boolean timing) {
        guard(Call.EVENT_CREATE);
        return driver.eventCreate(timing);
    }

    @Override
    public void eventDestroy(long event) {
        guard(Call.EVENT_DESTROY);
        driver.eventDestroy(event);
    }

    @Override
    public void eventRecord(long event, long stream) {
        guard(Call.EVENT_RECORD);
        driver.eventRecord(event, stream);
    }

    @Override
    public boolean eventQuery(long event) {
        guard(Call.EVENT_QUERY);
        return driver.eventQuery(event);
    }

    @Override
    public void eventSynchronize(long event) {
        guard(Call.EVENT_SYNCHRONIZE);
        driver.eventSynchronize(event);
    }

    @Override
    public float eventElapsedMs(long start, long end) {
        guard(Call.EVENT_ELAPSED_TIME);
        return driver.eventElapsedMs(start, end);
    }

    @Override
    public long moduleLoad(byte[] image) {
        guard(Call.MODULE_LOAD_DATA);
        return driver.moduleLoad(image);
    }

    @Override
    public void moduleUnload(long module) {
        guard(Call.MODULE_UNLOAD);
        driver.moduleUnload(module);
    }

    @Override
    public long moduleGetFunction(long module, String name) {
        guard(Call.MODULE_GET_FUNCTION);
        return driver.moduleGetFunction(module, name);
    }

    @Override
    public int funcGetAttribute(long function, FuncAttribute attribute) {
        guard(Call.FUNC_GET_ATTRIBUTE);
        return driver.funcGetAttribute(function, attribute);
    }

    @Override
    public void funcSetAttribute(long function, FuncAttribute attribute, int value) {
        guard(Call.FUNC_SET_ATTRIBUTE);
        driver.funcSetAttribute(function, attribute, value);
    }

    @Override
    public int occupancyMaxActiveBlocks(long function, int blockThreads, long dynamicSharedBytes) {
        guard(Call.OCCUPANCY);
        return driver.occupancyMaxActiveBlocks(function, blockThreads, dynamicSharedBytes);
    }

    @Override
    public void launchKernel(
            long function,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            KernelParams params) {
        guard(Call.LAUNCH_KERNEL);
        driver.launchKernel(
                function,
                gridX,
                gridY,
                gridZ,
                blockX,
                blockY,
                blockZ,
                dynamicSharedBytes,
                stream,
                params);
    }

    @Override
    public PdlSupport pdlSupport() {
        return driver.pdlSupport();
    }

    @Override
    public void launchKernelPdl(
            long function,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            KernelParams params) {
        guard(Call.LAUNCH_KERNEL_EX);
        driver.launchKernelPdl(
                function,
                gridX,
                gridY,
                gridZ,
                blockX,
                blockY,
                blockZ,
                dynamicSharedBytes,
                stream,
                params);
    }

    @Override
    public byte[] ipcGetMemHandle(long address) {
        guard(Call.IPC_GET_MEM_HANDLE);
        return driver.ipcGetMemHandle(address);
    }

    @Override
    public long ipcOpenMemHandle(byte[] handle) {
        guard(Call.IPC_OPEN_MEM_HANDLE);
        return driver.ipcOpenMemHandle(handle);
    }

    @Override
    public void ipcCloseMemHandle(long address) {
        guard(Call.IPC_CLOSE_MEM_HANDLE);
        driver.ipcCloseMemHandle(address);
    }
}
