package io.moe4j.engines;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/** Every call of an {@link EngineCuda} once, against the fake libcuda. */
public final class EngineSmoke {
    private EngineSmoke() {}

    /** For a child JVM: the engine in JCuda. Prints OK at the end, or throws. */
    public static void main(String[] args) {
        try (EngineCuda cuda = new JCudaEngine()) {
            run(cuda);
        }
        System.out.println("OK");
    }

    /** Throws if a call does not do what it says. */
    public static void run(EngineCuda cuda) {
        same(cuda.context(), cuda.current(), "its context is current");
        same(true, cuda.stream() != 0, "stream");
        long memory = cuda.allocate(64);
        ByteBuffer bytes = ByteBuffer.allocateDirect(64).order(ByteOrder.LITTLE_ENDIAN);
        bytes.putInt(60, 42);
        cuda.write(memory, bytes);
        bytes.putInt(60, 0);
        cuda.read(bytes, memory);
        same(42, bytes.getInt(60), "copies");
        cuda.beginCapture();
        long graph = cuda.endCapture();
        cuda.launch(graph);
        cuda.synchronize();
        cuda.destroyGraph(graph);
        cuda.free(memory);
        cuda.makeCurrent(0);
        same(0L, cuda.current(), "none current");
        cuda.makeCurrent(cuda.context());
        same(cuda.context(), cuda.current(), "current again");
    }

    private static void same(Object expected, Object actual, String what) {
        if (!expected.equals(actual)) {
            throw new AssertionError(what + ": expected " + expected + ", got " + actual);
        }
    }
}
