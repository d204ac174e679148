package io.moe4j.engines;

import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import jcuda.NativePointerObject;
import jcuda.Pointer;
import jcuda.driver.CUcontext;
import jcuda.driver.CUdevice;
import jcuda.driver.CUdeviceptr;
import jcuda.driver.CUgraph;
import jcuda.driver.CUgraphExec;
import jcuda.driver.CUstream;
import jcuda.driver.CUstreamCaptureMode;
import jcuda.driver.CUstream_flags;
import jcuda.driver.JCudaDriver;

/** An engine in plain JCuda: its own context on device 0, not the primary one. */
public final class JCudaEngine implements EngineCuda {
    private static final VarHandle NATIVE = nativePointer();

    private final CUcontext context = new CUcontext();
    private final CUstream stream = new CUstream();

    /** Creates context and stream; the context becomes current. */
    public JCudaEngine() {
        check(JCudaDriver.cuInit(0));
        CUdevice device = new CUdevice();
        check(JCudaDriver.cuDeviceGet(device, 0));
        check(JCudaDriver.cuCtxCreate(context, 0, device));
        check(JCudaDriver.cuStreamCreate(stream, CUstream_flags.CU_STREAM_NON_BLOCKING));
    }

    @Override
    public long context() {
        return raw(context);
    }

    @Override
    public long stream() {
        return raw(stream);
    }

    @Override
    public long current() {
        CUcontext now = new CUcontext();
        check(JCudaDriver.cuCtxGetCurrent(now));
        return raw(now);
    }

    @Override
    public void makeCurrent(long other) {
        check(JCudaDriver.cuCtxSetCurrent(handle(new CUcontext(), other)));
    }

    @Override
    public long allocate(long bytes) {
        CUdeviceptr memory = new CUdeviceptr();
        check(JCudaDriver.cuMemAlloc(memory, bytes));
        return raw(memory);
    }

    @Override
    public void free(long address) {
        check(JCudaDriver.cuMemFree(handle(new CUdeviceptr(), address)));
    }

    @Override
    public void write(long to, ByteBuffer from) {
        check(
                JCudaDriver.cuMemcpyHtoDAsync(
                        handle(new CUdeviceptr(), to),
                        Pointer.toBuffer(from),
                        from.remaining(),
                        stream));
        synchronize();
    }

    @Override
    public void read(ByteBuffer to, long from) {
        check(
                JCudaDriver.cuMemcpyDtoHAsync(
                        Pointer.toBuffer(to),
                        handle(new CUdeviceptr(), from),
                        to.remaining(),
                        stream));
        synchronize();
    }

    @Override
    public void beginCapture() {
        check(
                JCudaDriver.cuStreamBeginCapture(
                        stream, CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    }

    @Override
    public long endCapture() {
        CUgraph graph = new CUgraph();
        check(JCudaDriver.cuStreamEndCapture(stream, graph));
        CUgraphExec executable = new CUgraphExec();
        check(JCudaDriver.cuGraphInstantiate(executable, graph, 0));
        check(JCudaDriver.cuGraphDestroy(graph));
        return raw(executable);
    }

    @Override
    public void launch(long graph) {
        check(JCudaDriver.cuGraphLaunch(handle(new CUgraphExec(), graph), stream));
    }

    @Override
    public void destroyGraph(long graph) {
        check(JCudaDriver.cuGraphExecDestroy(handle(new CUgraphExec(), graph)));
    }

    @Override
    public void synchronize() {
        check(JCudaDriver.cuStreamSynchronize(stream));
    }

    @Override
    public void close() {
        makeCurrent(context());
        check(JCudaDriver.cuStreamDestroy(stream));
        check(JCudaDriver.cuCtxDestroy(context));
        makeCurrent(0L);
    }

    private static void check(int code) {
        if (code != 0) {
            throw new IllegalStateException("the engine's own CUDA call failed: " + code);
        }
    }

    private static long raw(NativePointerObject handle) {
        return (long) NATIVE.get(handle);
    }

    private static <T extends NativePointerObject> T handle(T object, long value) {
        NATIVE.set(object, value);
        return object;
    }

    private static VarHandle nativePointer() {
        try {
            return MethodHandles.privateLookupIn(NativePointerObject.class, MethodHandles.lookup())
                    .findVarHandle(NativePointerObject.class, "nativePointer", long.class);
        } catch (ReflectiveOperationException e) {
            throw new ExceptionInInitializerError(e);
        }
    }
}
