package io.moe4j.ffm;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import io.moe4j.engines.EngineCuda;
import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.nio.ByteBuffer;
import java.nio.file.Path;

/**
 * An engine on java.lang.foreign: its own context on device 0, not the primary one. Handles and
 * addresses are plain longs.
 */
final class FfmEngine implements EngineCuda {
    private static final int NON_BLOCKING = 1;
    private static final int THREAD_LOCAL = 1;

    private final Arena arena = Arena.ofShared();
    private final SymbolLookup library;
    private final MethodHandle cuMemcpyHtoDAsync;
    private final MethodHandle cuMemcpyDtoHAsync;
    private final MethodHandle cuMemAlloc;
    private final MethodHandle cuMemFree;
    private final MethodHandle cuCtxGetCurrent;
    private final MethodHandle cuCtxSetCurrent;
    private final MethodHandle cuStreamSynchronize;
    private final MethodHandle cuStreamBeginCapture;
    private final MethodHandle cuStreamEndCapture;
    private final MethodHandle cuGraphInstantiate;
    private final MethodHandle cuGraphDestroy;
    private final MethodHandle cuGraphLaunch;
    private final MethodHandle cuGraphExecDestroy;
    private final MethodHandle cuStreamDestroy;
    private final MethodHandle cuCtxDestroy;
    private final long context;
    private final long stream;

    /** The engine over the driver of this machine. */
    static FfmEngine open() {
        return new FfmEngine("libcuda.so.1");
    }

    /** The engine over a library at a path. */
    static FfmEngine open(Path library) {
        return new FfmEngine(library.toString());
    }

    private FfmEngine(String name) {
        this.library =
                name.startsWith("/")
                        ? SymbolLookup.libraryLookup(Path.of(name), arena)
                        : SymbolLookup.libraryLookup(name, arena);
        this.cuMemcpyHtoDAsync =
                bind("cuMemcpyHtoDAsync_v2", JAVA_LONG, ADDRESS, JAVA_LONG, JAVA_LONG);
        this.cuMemcpyDtoHAsync =
                bind("cuMemcpyDtoHAsync_v2", ADDRESS, JAVA_LONG, JAVA_LONG, JAVA_LONG);
        this.cuMemAlloc = bind("cuMemAlloc_v2", ADDRESS, JAVA_LONG);
        this.cuMemFree = bind("cuMemFree_v2", JAVA_LONG);
        this.cuCtxGetCurrent = bind("cuCtxGetCurrent", ADDRESS);
        this.cuCtxSetCurrent = bind("cuCtxSetCurrent", JAVA_LONG);
        this.cuStreamSynchronize = bind("cuStreamSynchronize", JAVA_LONG);
        this.cuStreamBeginCapture = bind("cuStreamBeginCapture_v2", JAVA_LONG, JAVA_INT);
        this.cuStreamEndCapture = bind("cuStreamEndCapture", JAVA_LONG, ADDRESS);
        this.cuGraphInstantiate =
                bind("cuGraphInstantiateWithFlags", ADDRESS, JAVA_LONG, JAVA_LONG);
        this.cuGraphDestroy = bind("cuGraphDestroy", JAVA_LONG);
        this.cuGraphLaunch = bind("cuGraphLaunch", JAVA_LONG, JAVA_LONG);
        this.cuGraphExecDestroy = bind("cuGraphExecDestroy", JAVA_LONG);
        this.cuStreamDestroy = bind("cuStreamDestroy_v2", JAVA_LONG);
        this.cuCtxDestroy = bind("cuCtxDestroy_v2", JAVA_LONG);

        call(bind("cuInit", JAVA_INT), 0);
        this.context =
                handle(out -> call(bind("cuCtxCreate_v2", ADDRESS, JAVA_INT, JAVA_INT), out, 0, 0));
        this.stream =
                handle(out -> call(bind("cuStreamCreate", ADDRESS, JAVA_INT), out, NON_BLOCKING));
    }

    private MethodHandle bind(String name, MemoryLayout... arguments) {
        return Linker.nativeLinker()
                .downcallHandle(
                        library.find(name).orElseThrow(() -> new IllegalStateException(name)),
                        FunctionDescriptor.of(JAVA_INT, arguments));
    }

    private static void call(MethodHandle function, Object... arguments) {
        int code;
        try {
            code = (int) function.invokeWithArguments(arguments);
        } catch (Throwable t) {
            throw new AssertionError(t);
        }
        if (code != 0) {
            throw new IllegalStateException("the engine's own CUDA call failed: " + code);
        }
    }

    @FunctionalInterface
    private interface Producer {
        void into(MemorySegment out);
    }

    private static long handle(Producer producer) {
        try (Arena scratch = Arena.ofConfined()) {
            MemorySegment out = scratch.allocate(ValueLayout.JAVA_LONG);
            producer.into(out);
            return out.get(ValueLayout.JAVA_LONG, 0);
        }
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
        return handle(out -> call(cuCtxGetCurrent, out));
    }

    @Override
    public void makeCurrent(long other) {
        call(cuCtxSetCurrent, other);
    }

    @Override
    public long allocate(long bytes) {
        return handle(out -> call(cuMemAlloc, out, bytes));
    }

    @Override
    public void free(long address) {
        call(cuMemFree, address);
    }

    @Override
    public void write(long to, ByteBuffer from) {
        call(cuMemcpyHtoDAsync, to, MemorySegment.ofBuffer(from), (long) from.remaining(), stream);
        synchronize();
    }

    @Override
    public void read(ByteBuffer to, long from) {
        call(cuMemcpyDtoHAsync, MemorySegment.ofBuffer(to), from, (long) to.remaining(), stream);
        synchronize();
    }

    @Override
    public void beginCapture() {
        call(cuStreamBeginCapture, stream, THREAD_LOCAL);
    }

    @Override
    public long endCapture() {
        long graph = handle(out -> call(cuStreamEndCapture, stream, out));
        long executable = handle(out -> call(cuGraphInstantiate, out, graph, 0L));
        call(cuGraphDestroy, graph);
        return executable;
    }

    @Override
    public void launch(long graph) {
        call(cuGraphLaunch, graph, stream);
    }

    @Override
    public void destroyGraph(long graph) {
        call(cuGraphExecDestroy, graph);
    }

    @Override
    public void synchronize() {
        call(cuStreamSynchronize, stream);
    }

    @Override
    public void close() {
        makeCurrent(context);
        call(cuStreamDestroy, stream);
        call(cuCtxDestroy, context);
        makeCurrent(0L);
        arena.close();
    }
}
