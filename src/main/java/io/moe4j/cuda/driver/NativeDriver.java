package io.moe4j.cuda.driver;

import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import java.util.Optional;
import jcuda.NativePointerObject;
import jcuda.Pointer;
import jcuda.driver.CUcontext;
import jcuda.driver.CUdevice;
import jcuda.driver.CUdeviceptr;
import jcuda.driver.CUevent;
import jcuda.driver.CUfunction;
import jcuda.driver.CUgraph;
import jcuda.driver.CUgraphExec;
import jcuda.driver.CUipcMemHandle;
import jcuda.driver.CUmodule;
import jcuda.driver.CUstream;
import jcuda.driver.JCudaDriver;

/**
 * The driver of this machine through JCuda. Opened by {@link Drivers}. Stateless but for one set of
 * reusable JCuda objects per thread, so the calls of a step create no Java objects.
 *
 * <p>Return codes are always checked here. JCuda's global switch for exceptions is never touched;
 * if another library turns it on, its exceptions are turned back into codes.
 */
final class NativeDriver implements Driver {
    private static final int HOST_ALLOC_PORTABLE_DEVICEMAP = 0x01 | 0x02;
    private static final int STREAM_NON_BLOCKING = 1;
    private static final int CAPTURE_THREAD_LOCAL = 1;
    private static final int CAPTURE_RELAXED = 2;
    private static final int CAPTURE_STATUS_NONE = 0;
    private static final int EVENT_DISABLE_TIMING = 2;
    private static final int IPC_LAZY_ENABLE_PEER_ACCESS = 1;
    private static final int IPC_HANDLE_BYTES = 64;
    private static final int POINTER_CONTEXT = 1;
    private static final int POINTER_MEMORY_TYPE = 2;
    private static final int POINTER_IS_MANAGED = 8;
    private static final int POINTER_DEVICE_ORDINAL = 9;
    private static final int MEMORY_TYPE_HOST = 1;

    private static final VarHandle NATIVE_POINTER =
            field(NativePointerObject.class, "nativePointer", long.class);

    private final ThreadLocal<Scratch> scratch = ThreadLocal.withInitial(Scratch::new);
    private final Scope popOnClose = this::contextPop;
    private volatile Pdl pdl;

    /** JCuda objects of one thread, set to the raw handles of the call at hand. */
    private static final class Scratch {
        final CUcontext context = new CUcontext();
        final CUstream stream = new CUstream();
        final CUevent event = new CUevent();
        final CUevent event2 = new CUevent();
        final CUfunction function = new CUfunction();
        final CUgraph graph = new CUgraph();
        final CUgraphExec graphExec = new CUgraphExec();
        final CUmodule module = new CUmodule();
        final CUdeviceptr address = new CUdeviceptr();
        final CUdeviceptr address2 = new CUdeviceptr();
        final Pointer host = new Pointer();
        final int[] ints = new int[1];
        final long[] longs = new long[1];
        final long[] longs2 = new long[1];
        final float[] floats = new float[1];
    }

    private record Pdl(PdlLaunch launch, PdlSupport support) {}

    @FunctionalInterface
    private interface NativeCall {
        int run();
    }

    /** {@code cuInit}. */
    void initialize() {
        check(Call.INIT, "", () -> JCudaDriver.cuInit(0));
    }

    // ------------------------------------------------------------------ driver and devices

    @Override
    public int version() {
        int[] out = scratch.get().ints;
        check(Call.DRIVER_GET_VERSION, "", () -> JCudaDriver.cuDriverGetVersion(out));
        return out[0];
    }

    @Override
    public int deviceCount() {
        int[] out = scratch.get().ints;
        check(Call.DEVICE_GET_COUNT, "", () -> JCudaDriver.cuDeviceGetCount(out));
        return out[0];
    }

    @Override
    public String deviceName(int device) {
        byte[] name = new byte[256];
        CUdevice handle = device(device);
        check(
                Call.DEVICE_GET_NAME,
                "device " + device,
                () -> JCudaDriver.cuDeviceGetName(name, name.length, handle));
        int length = 0;
        while (length < name.length && name[length] != 0) {
            length++;
        }
        return new String(name, 0, length, java.nio.charset.StandardCharsets.UTF_8);
    }

    @Override
    public int deviceAttribute(int device, DeviceAttribute attribute) {
        int[] out = scratch.get().ints;
        CUdevice handle = device(device);
        check(
                Call.DEVICE_GET_ATTRIBUTE,
                attribute.name(),
                () -> JCudaDriver.cuDeviceGetAttribute(out, attribute.number(), handle));
        return out[0];
    }

    @Override
    public long deviceTotalMemory(int device) {
        long[] out = scratch.get().longs;
        CUdevice handle = device(device);
        check(Call.DEVICE_TOTAL_MEM, "", () -> JCudaDriver.cuDeviceTotalMem(out, handle));
        return out[0];
    }

    @Override
    public String devicePciBusId(int device) {
        String[] out = new String[1];
        CUdevice handle = device(device);
        check(
                Call.DEVICE_GET_PCI_BUS_ID,
                "",
                () -> JCudaDriver.cuDeviceGetPCIBusId(out, 64, handle));
        return out[0].trim();
    }

    @Override
    public boolean deviceCanAccessPeer(int device, int peer) {
        int[] out = scratch.get().ints;
        CUdevice from = device(device);
        CUdevice to = device(peer);
        check(
                Call.DEVICE_CAN_ACCESS_PEER,
                device + ", " + peer,
                () -> JCudaDriver.cuDeviceCanAccessPeer(out, from, to));
        return out[0] != 0;
    }

    private CUdevice device(int ordinal) {
        CUdevice device = new CUdevice();
        check(Call.DEVICE_GET, "device " + ordinal, () -> JCudaDriver.cuDeviceGet(device, ordinal));
        return device;
    }

    // ------------------------------------------------------------------ contexts

    @Override
    public long primaryContextRetain(int device) {
        CUdevice handle = device(device);
        CUcontext context = new CUcontext();
        check(
                Call.PRIMARY_CTX_RETAIN,
                "device " + device,
                () -> JCudaDriver.cuDevicePrimaryCtxRetain(context, handle));
        return raw(context);
    }

    @Override
    public void primaryContextRelease(int device) {
        CUdevice handle = device(device);
        check(
                Call.PRIMARY_CTX_RELEASE,
                "device " + device,
                () -> JCudaDriver.cuDevicePrimaryCtxRelease(handle));
    }

    @Override
    public long contextCurrent() {
        CUcontext context = scratch.get().context;
        check(Call.CTX_GET_CURRENT, "", () -> JCudaDriver.cuCtxGetCurrent(context));
        return raw(context);
    }

    @Override
    public int contextDevice() {
        CUdevice current = new CUdevice();
        check(Call.CTX_GET_DEVICE, "", () -> JCudaDriver.cuCtxGetDevice(current));
        int count = deviceCount();
        for (int ordinal = 0; ordinal < count; ordinal++) {
            if (raw(device(ordinal)) == raw(current)) {
                return ordinal;
            }
        }
        throw failure(Call.CTX_GET_DEVICE, CudaErrors.INVALID_CONTEXT, "its device is not visible");
    }

    @Override
    public void contextPush(long context) {
        CUcontext handle = set(scratch.get().context, context);
        int code;
        try {
            code = JCudaDriver.cuCtxPushCurrent(handle);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.CTX_PUSH_CURRENT, code, "");
        }
    }

    @Override
    public long contextPop() {
        CUcontext handle = scratch.get().context;
        int code;
        try {
            code = JCudaDriver.cuCtxPopCurrent(handle);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.CTX_POP_CURRENT, code, "");
        }
        return raw(handle);
    }

    @Override
    public Scope enter(long context) {
        contextPush(context);
        return popOnClose;
    }

    @Override
    public void contextSynchronize() {
        check(Call.CTX_SYNCHRONIZE, "", JCudaDriver::cuCtxSynchronize);
    }

    @Override
    public void contextEnablePeerAccess(long peerContext) {
        CUcontext peer = set(new CUcontext(), peerContext);
        int code = run(() -> JCudaDriver.cuCtxEnablePeerAccess(peer, 0));
        if (code != 0 && code != CudaErrors.PEER_ACCESS_ALREADY_ENABLED) {
            throw failure(Call.CTX_ENABLE_PEER_ACCESS, code, "");
        }
    }

    // ------------------------------------------------------------------ memory

    @Override
    public long memAlloc(long bytes) {
        CUdeviceptr address = new CUdeviceptr();
        int code = run(() -> JCudaDriver.cuMemAlloc(address, bytes));
        if (code != 0) {
            throw failure(Call.MEM_ALLOC, code, sizes(code, bytes));
        }
        return raw(address);
    }

    @Override
    public void memFree(long address) {
        if (address == 0) {
            return;
        }
        CUdeviceptr handle = set(new CUdeviceptr(), address);
        check(Call.MEM_FREE, hex(address), () -> JCudaDriver.cuMemFree(handle));
    }

    @Override
    public Optional<PointerInfo> pointer(long address) {
        CUdeviceptr handle = set(new CUdeviceptr(), address);
        ByteBuffer out = ByteBuffer.allocateDirect(8).order(ByteOrder.nativeOrder());
        if (pointerAttribute(out, POINTER_MEMORY_TYPE, handle) != 0) {
            return Optional.empty();
        }
        boolean anywhere = out.getInt(0) == MEMORY_TYPE_HOST;
        // why: memory of a pool has no context, and what has none has no answer
        anywhere |= pointerAttribute(out, POINTER_IS_MANAGED, handle) == 0 && out.getInt(0) != 0;
        long context = pointerAttribute(out, POINTER_CONTEXT, handle) == 0 ? out.getLong(0) : 0L;
        int code = pointerAttribute(out, POINTER_DEVICE_ORDINAL, handle);
        if (code != 0) {
            throw failure(Call.POINTER_GET_ATTRIBUTE, code, hex(address));
        }
        return Optional.of(new PointerInfo(context, out.getInt(0), anywhere));
    }

    private static int pointerAttribute(ByteBuffer out, int attribute, CUdeviceptr address) {
        out.putLong(0, 0L);
        return run(() -> JCudaDriver.cuPointerGetAttribute(Pointer.to(out), attribute, address));
    }

    @Override
    public MemInfo memGetInfo() {
        Scratch s = scratch.get();
        check(Call.MEM_GET_INFO, "", () -> JCudaDriver.cuMemGetInfo(s.longs, s.longs2));
        return new MemInfo(s.longs[0], s.longs2[0]);
    }

    @Override
    public HostMemory hostAlloc(long bytes) {
        if (bytes < 1 || bytes > Integer.MAX_VALUE) {
            throw new IllegalArgumentException(
                    bytes + " bytes of page-locked memory: 1 to 2147483647 are possible");
        }
        Pointer pointer = new Pointer();
        int code =
                run(
                        () ->
                                JCudaDriver.cuMemHostAlloc(
                                        pointer, bytes, HOST_ALLOC_PORTABLE_DEVICEMAP));
        if (code != 0) {
            throw failure(Call.MEM_HOST_ALLOC, code, bytes + " bytes");
        }
        CUdeviceptr mapped = new CUdeviceptr();
        code = run(() -> JCudaDriver.cuMemHostGetDevicePointer(mapped, pointer, 0));
        if (code != 0) {
            run(() -> JCudaDriver.cuMemFreeHost(pointer));
            throw failure(Call.MEM_HOST_GET_DEVICE_POINTER, code, "");
        }
        return new HostMemory(raw(pointer), raw(mapped), pointer.getByteBuffer(0, bytes));
    }

    @Override
    public void hostFree(HostMemory memory) {
        Pointer pointer = set(new Pointer(), memory.address());
        check(
                Call.MEM_FREE_HOST,
                memory.size() + " bytes",
                () -> JCudaDriver.cuMemFreeHost(pointer));
    }

    @Override
    public void memsetD8(long address, byte value, long count) {
        CUdeviceptr to = set(new CUdeviceptr(), address);
        check(Call.MEMSET_D8, "", () -> JCudaDriver.cuMemsetD8(to, value, count));
    }

    @Override
    public void memsetD32(long address, int value, long count) {
        CUdeviceptr to = set(new CUdeviceptr(), address);
        check(Call.MEMSET_D32, "", () -> JCudaDriver.cuMemsetD32(to, value, count));
    }

    @Override
    public void memsetD8Async(long address, byte value, long count, long stream) {
        Scratch s = scratch.get();
        CUdeviceptr to = set(s.address, address);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuMemsetD8Async(to, value, count, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.MEMSET_D8_ASYNC, code, "");
        }
    }

    @Override
    public void memsetD32Async(long address, int value, long count, long stream) {
        Scratch s = scratch.get();
        CUdeviceptr to = set(s.address, address);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuMemsetD32Async(to, value, count, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.MEMSET_D32_ASYNC, code, "");
        }
    }

    @Override
    public void memcpyHtoD(long to, ByteBuffer from) {
        Pointer source = direct(from);
        CUdeviceptr target = set(new CUdeviceptr(), to);
        int bytes = from.remaining();
        check(
                Call.MEMCPY_H_TO_D,
                bytes + " bytes",
                () -> JCudaDriver.cuMemcpyHtoD(target, source, bytes));
    }

    @Override
    public void memcpyDtoH(ByteBuffer to, long from) {
        if (to.isReadOnly()) {
            throw new IllegalArgumentException("the target buffer is read-only");
        }
        Pointer target = direct(to);
        CUdeviceptr source = set(new CUdeviceptr(), from);
        int bytes = to.remaining();
        check(
                Call.MEMCPY_D_TO_H,
                bytes + " bytes",
                () -> JCudaDriver.cuMemcpyDtoH(target, source, bytes));
    }

    @Override
    public void memcpyDtoD(long to, long from, long bytes) {
        CUdeviceptr target = set(new CUdeviceptr(), to);
        CUdeviceptr source = set(new CUdeviceptr(), from);
        check(
                Call.MEMCPY_D_TO_D,
                bytes + " bytes",
                () -> JCudaDriver.cuMemcpyDtoD(target, source, bytes));
    }

    @Override
    public void memcpyHtoDAsync(
            long to, HostMemory from, long fromOffset, long bytes, long stream) {
        from.checkRange(fromOffset, bytes);
        Scratch s = scratch.get();
        CUdeviceptr target = set(s.address, to);
        Pointer source = set(s.host, from.address() + fromOffset);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuMemcpyHtoDAsync(target, source, bytes, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.MEMCPY_H_TO_D_ASYNC, code, bytes + " bytes");
        }
    }

    @Override
    public void memcpyDtoHAsync(HostMemory to, long toOffset, long from, long bytes, long stream) {
        to.checkRange(toOffset, bytes);
        Scratch s = scratch.get();
        Pointer target = set(s.host, to.address() + toOffset);
        CUdeviceptr source = set(s.address, from);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuMemcpyDtoHAsync(target, source, bytes, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.MEMCPY_D_TO_H_ASYNC, code, bytes + " bytes");
        }
    }

    @Override
    public void memcpyDtoDAsync(long to, long from, long bytes, long stream) {
        Scratch s = scratch.get();
        CUdeviceptr target = set(s.address, to);
        CUdeviceptr source = set(s.address2, from);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuMemcpyDtoDAsync(target, source, bytes, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.MEMCPY_D_TO_D_ASYNC, code, bytes + " bytes");
        }
    }

    // ------------------------------------------------------------------ streams

    @Override
    public long streamCreate() {
        CUstream stream = new CUstream();
        check(
                Call.STREAM_CREATE,
                "",
                () -> JCudaDriver.cuStreamCreate(stream, STREAM_NON_BLOCKING));
        return raw(stream);
    }

    @Override
    public void streamDestroy(long stream) {
        CUstream handle = set(new CUstream(), stream);
        check(Call.STREAM_DESTROY, "", () -> JCudaDriver.cuStreamDestroy(handle));
    }

    @Override
    public void streamSynchronize(long stream) {
        CUstream handle = set(scratch.get().stream, stream);
        check(Call.STREAM_SYNCHRONIZE, "", () -> JCudaDriver.cuStreamSynchronize(handle));
    }

    @Override
    public boolean streamQuery(long stream) {
        CUstream handle = set(scratch.get().stream, stream);
        return done(Call.STREAM_QUERY, run(() -> JCudaDriver.cuStreamQuery(handle)));
    }

    @Override
    public void streamWaitEvent(long stream, long event) {
        Scratch s = scratch.get();
        CUstream on = set(s.stream, stream);
        CUevent after = set(s.event, event);
        int code;
        try {
            code = JCudaDriver.cuStreamWaitEvent(on, after, 0);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.STREAM_WAIT_EVENT, code, "");
        }
    }

    @Override
    public boolean streamIsCapturing(long stream) {
        Scratch s = scratch.get();
        CUstream handle = set(s.stream, stream);
        check(Call.STREAM_IS_CAPTURING, "", () -> JCudaDriver.cuStreamIsCapturing(handle, s.ints));
        return s.ints[0] != CAPTURE_STATUS_NONE;
    }

    @Override
    public void streamBeginCapture(long stream) {
        CUstream handle = set(scratch.get().stream, stream);
        check(
                Call.STREAM_BEGIN_CAPTURE,
                "",
                () -> JCudaDriver.cuStreamBeginCapture(handle, CAPTURE_THREAD_LOCAL));
    }

    @Override
    public long streamEndCapture(long stream) {
        CUstream handle = set(scratch.get().stream, stream);
        CUgraph graph = new CUgraph();
        check(Call.STREAM_END_CAPTURE, "", () -> JCudaDriver.cuStreamEndCapture(handle, graph));
        return raw(graph);
    }

    // ------------------------------------------------------------------ graphs

    @Override
    public Scope relaxCapture() {
        int before = exchangeCaptureMode(CAPTURE_RELAXED);
        return () -> exchangeCaptureMode(before);
    }

    private static int exchangeCaptureMode(int mode) {
        int[] inOut = {mode};
        check(
                Call.THREAD_EXCHANGE_CAPTURE_MODE,
                "",
                () -> JCudaDriver.cuThreadExchangeStreamCaptureMode(inOut));
        return inOut[0];
    }

    @Override
    public long graphInstantiate(long graph) {
        CUgraph handle = set(scratch.get().graph, graph);
        CUgraphExec exec = new CUgraphExec();
        check(Call.GRAPH_INSTANTIATE, "", () -> JCudaDriver.cuGraphInstantiate(exec, handle, 0L));
        return raw(exec);
    }

    @Override
    public void graphUpload(long graphExec, long stream) {
        Scratch s = scratch.get();
        CUgraphExec exec = set(s.graphExec, graphExec);
        CUstream on = set(s.stream, stream);
        check(Call.GRAPH_UPLOAD, "", () -> JCudaDriver.cuGraphUpload(exec, on));
    }

    @Override
    public void graphLaunch(long graphExec, long stream) {
        Scratch s = scratch.get();
        CUgraphExec exec = set(s.graphExec, graphExec);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuGraphLaunch(exec, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.GRAPH_LAUNCH, code, "");
        }
    }

    @Override
    public long graphNodeCount(long graph) {
        Scratch s = scratch.get();
        CUgraph handle = set(s.graph, graph);
        check(Call.GRAPH_GET_NODES, "", () -> JCudaDriver.cuGraphGetNodes(handle, null, s.longs));
        return s.longs[0];
    }

    @Override
    public void graphDestroy(long graph) {
        CUgraph handle = set(scratch.get().graph, graph);
        check(Call.GRAPH_DESTROY, "", () -> JCudaDriver.cuGraphDestroy(handle));
    }

    @Override
    public void graphExecDestroy(long graphExec) {
        CUgraphExec handle = set(scratch.get().graphExec, graphExec);
        check(Call.GRAPH_EXEC_DESTROY, "", () -> JCudaDriver.cuGraphExecDestroy(handle));
    }

    // ------------------------------------------------------------------ events

    @Override
    public long eventCreate(boolean timing) {
        CUevent event = new CUevent();
        check(
                Call.EVENT_CREATE,
                "",
                () -> JCudaDriver.cuEventCreate(event, timing ? 0 : EVENT_DISABLE_TIMING));
        return raw(event);
    }

    @Override
    public void eventDestroy(long event) {
        CUevent handle = set(scratch.get().event, event);
        check(Call.EVENT_DESTROY, "", () -> JCudaDriver.cuEventDestroy(handle));
    }

    @Override
    public void eventRecord(long event, long stream) {
        Scratch s = scratch.get();
        CUevent handle = set(s.event, event);
        CUstream on = set(s.stream, stream);
        int code;
        try {
            code = JCudaDriver.cuEventRecord(handle, on);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(Call.EVENT_RECORD, code, "");
        }
    }

    @Override
    public boolean eventQuery(long event) {
        CUevent handle = set(scratch.get().event, event);
        return done(Call.EVENT_QUERY, run(() -> JCudaDriver.cuEventQuery(handle)));
    }

    @Override
    public void eventSynchronize(long event) {
        CUevent handle = set(scratch.get().event, event);
        check(Call.EVENT_SYNCHRONIZE, "", () -> JCudaDriver.cuEventSynchronize(handle));
    }

    @Override
    public float eventElapsedMs(long start, long end) {
        Scratch s = scratch.get();
        CUevent from = set(s.event, start);
        CUevent to = set(s.event2, end);
        check(
                Call.EVENT_ELAPSED_TIME,
                "",
                () -> JCudaDriver.cuEventElapsedTime(s.floats, from, to));
        return s.floats[0];
    }

    // ------------------------------------------------------------------ kernels

    @Override
    public long moduleLoad(byte[] image) {
        // why: a direct buffer, because JCuda holds a heap array in a critical region for as long
        // as the driver compiles PTX, and no other thread can collect garbage meanwhile. The zero
        // byte ends PTX text.
        ByteBuffer direct = ByteBuffer.allocateDirect(image.length + 1);
        direct.put(image).put((byte) 0).clear();
        Pointer source = Pointer.to(direct);
        CUmodule module = new CUmodule();
        check(
                Call.MODULE_LOAD_DATA,
                image.length + " bytes",
                () -> JCudaDriver.cuModuleLoadDataEx(module, source, 0, null, null));
        return raw(module);
    }

    @Override
    public void moduleUnload(long module) {
        CUmodule handle = set(scratch.get().module, module);
        check(Call.MODULE_UNLOAD, "", () -> JCudaDriver.cuModuleUnload(handle));
    }

    @Override
    public long moduleGetFunction(long module, String name) {
        CUmodule handle = set(scratch.get().module, module);
        CUfunction function = new CUfunction();
        check(
                Call.MODULE_GET_FUNCTION,
                name,
                () -> JCudaDriver.cuModuleGetFunction(function, handle, name));
        return raw(function);
    }

    @Override
    public int funcGetAttribute(long function, FuncAttribute attribute) {
        Scratch s = scratch.get();
        CUfunction handle = set(s.function, function);
        check(
                Call.FUNC_GET_ATTRIBUTE,
                attribute.name(),
                () -> JCudaDriver.cuFuncGetAttribute(s.ints, attribute.number(), handle));
        return s.ints[0];
    }

    @Override
    public void funcSetAttribute(long function, FuncAttribute attribute, int value) {
        CUfunction handle = set(scratch.get().function, function);
        check(
                Call.FUNC_SET_ATTRIBUTE,
                attribute + "=" + value,
                () -> JCudaDriver.cuFuncSetAttribute(handle, attribute.number(), value));
    }

    @Override
    public int occupancyMaxActiveBlocks(long function, int blockThreads, long dynamicSharedBytes) {
        Scratch s = scratch.get();
        CUfunction handle = set(s.function, function);
        check(
                Call.OCCUPANCY,
                blockThreads + " threads, " + dynamicSharedBytes + " bytes",
                () ->
                        JCudaDriver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                                s.ints, handle, blockThreads, dynamicSharedBytes));
        return s.ints[0];
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
        Scratch s = scratch.get();
        CUfunction kernel = set(s.function, function);
        CUstream on = set(s.stream, stream);
        // why: JCuda passes a pointer with an address through as it is, so the table of pointers
        // that KernelParams keeps is used without being built anew
        Pointer table = set(s.host, params.tableAddress());
        int code;
        try {
            code =
                    JCudaDriver.cuLaunchKernel(
                            kernel,
                            gridX,
                            gridY,
                            gridZ,
                            blockX,
                            blockY,
                            blockZ,
                            dynamicSharedBytes,
                            on,
                            table,
                            null);
        } catch (jcuda.CudaException e) {
            code = code(e);
        }
        if (code != 0) {
            throw failure(
                    Call.LAUNCH_KERNEL,
                    code,
                    shape(gridX, gridY, gridZ, blockX, blockY, blockZ, dynamicSharedBytes));
        }
    }

    @Override
    public PdlSupport pdlSupport() {
        return pdl().support();
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
        PdlLaunch launch = pdl().launch();
        if (launch == null) {
            launchKernel(
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
            return;
        }
        int code =
                launch.launch(
                        function,
                        gridX,
                        gridY,
                        gridZ,
                        blockX,
                        blockY,
                        blockZ,
                        dynamicSharedBytes,
                        stream,
                        params.tableAddress());
        if (code != 0) {
            throw failure(
                    Call.LAUNCH_KERNEL_EX,
                    code,
                    shape(gridX, gridY, gridZ, blockX, blockY, blockZ, dynamicSharedBytes));
        }
    }

    private Pdl pdl() {
        Pdl known = pdl;
        if (known == null) {
            known = bindPdl();
            pdl = known;
        }
        return known;
    }

    private Pdl bindPdl() {
        if (deviceAttribute(0, DeviceAttribute.COMPUTE_CAPABILITY_MAJOR) < 9) {
            return new Pdl(
                    null,
                    new PdlSupport(
                            false, "ordinary launches: needs compute capability 9.0 or newer"));
        }
        try (PrivateNatives natives = PrivateNatives.create()) {
            PdlLaunch launch = natives.asTemporaryDirectory(PdlLaunch::new);
            return new Pdl(launch, new PdlSupport(true, "cuLaunchKernelEx through JNA"));
        } catch (NoClassDefFoundError e) {
            return new Pdl(
                    null,
                    new PdlSupport(
                            false,
                            "ordinary launches: JNA is not on the class path (add"
                                    + " net.java.dev.jna:jna)"));
        } catch (Exception | LinkageError e) {
            return new Pdl(null, new PdlSupport(false, "ordinary launches: " + e.getMessage()));
        }
    }

    // ------------------------------------------------------------------ other processes

    @Override
    public byte[] ipcGetMemHandle(long address) {
        CUdeviceptr pointer = set(new CUdeviceptr(), address);
        CUipcMemHandle handle = new CUipcMemHandle();
        check(
                Call.IPC_GET_MEM_HANDLE,
                hex(address),
                () -> JCudaDriver.cuIpcGetMemHandle(handle, pointer));
        return ((byte[]) IpcBytes.RESERVED.get(handle)).clone();
    }

    @Override
    public long ipcOpenMemHandle(byte[] handle) {
        if (handle.length != IPC_HANDLE_BYTES) {
            throw new IllegalArgumentException(
                    "an IPC handle has " + IPC_HANDLE_BYTES + " bytes, not " + handle.length);
        }
        CUipcMemHandle jcuda = new CUipcMemHandle();
        IpcBytes.RESERVED.set(jcuda, Arrays.copyOf(handle, IPC_HANDLE_BYTES));
        CUdeviceptr pointer = new CUdeviceptr();
        check(
                Call.IPC_OPEN_MEM_HANDLE,
                "",
                () -> JCudaDriver.cuIpcOpenMemHandle(pointer, jcuda, IPC_LAZY_ENABLE_PEER_ACCESS));
        return raw(pointer);
    }

    @Override
    public void ipcCloseMemHandle(long address) {
        CUdeviceptr pointer = set(new CUdeviceptr(), address);
        check(
                Call.IPC_CLOSE_MEM_HANDLE,
                hex(address),
                () -> JCudaDriver.cuIpcCloseMemHandle(pointer));
    }

    /** Bound only when IPC is used. */
    private static final class IpcBytes {
        static final VarHandle RESERVED = field(CUipcMemHandle.class, "reserved", byte[].class);
    }

    // ------------------------------------------------------------------ helpers

    private static VarHandle field(Class<?> owner, String name, Class<?> type) {
        try {
            return MethodHandles.privateLookupIn(owner, MethodHandles.lookup())
                    .findVarHandle(owner, name, type);
        } catch (ReflectiveOperationException e) {
            throw new LinkageError(
                    owner.getName()
                            + "."
                            + name
                            + " is not accessible: use JCuda 12.6.0 on the class path",
                    e);
        }
    }

    private static <T extends NativePointerObject> T set(T object, long handle) {
        NATIVE_POINTER.set((NativePointerObject) object, handle);
        return object;
    }

    private static long raw(NativePointerObject object) {
        return (long) NATIVE_POINTER.get(object);
    }

    private static Pointer direct(ByteBuffer buffer) {
        if (!buffer.isDirect()) {
            throw new IllegalArgumentException(
                    "a heap buffer cannot be copied: use a direct, mapped or page-locked one");
        }
        return Pointer.to(buffer.slice());
    }

    private static void check(Call call, String detail, NativeCall nativeCall) {
        int code = run(nativeCall);
        if (code != 0) {
            throw failure(call, code, detail);
        }
    }

    private static int run(NativeCall nativeCall) {
        try {
            return nativeCall.run();
        } catch (jcuda.CudaException e) {
            return code(e);
        }
    }

    /** The code behind JCuda's own exception, whose message is the name of the code. */
    private static int code(jcuda.CudaException e) {
        return CudaErrors.code(e.getMessage());
    }

    private static boolean done(Call call, int code) {
        if (code != 0 && code != CudaErrors.NOT_READY) {
            throw failure(call, code, "");
        }
        return code == 0;
    }

    private static CudaException failure(Call call, int code, String detail) {
        return new CudaException(call, code, detail);
    }

    private String sizes(int code, long bytes) {
        if (code != CudaErrors.OUT_OF_MEMORY) {
            return bytes + " bytes";
        }
        Scratch s = scratch.get();
        int info = run(() -> JCudaDriver.cuMemGetInfo(s.longs, s.longs2));
        return info == 0
                ? bytes + " bytes, " + s.longs[0] + " of " + s.longs2[0] + " free"
                : bytes + " bytes";
    }

    private static String shape(
            int gridX, int gridY, int gridZ, int blockX, int blockY, int blockZ, int shared) {
        return "grid "
                + gridX
                + "×"
                + gridY
                + "×"
                + gridZ
                + ", block "
                + blockX
                + "×"
                + blockY
                + "×"
                + blockZ
                + ", "
                + shared
                + " bytes shared";
    }

    private static String hex(long value) {
        return "0x" + Long.toHexString(value);
    }
}
