package io.moe4j.cuda.driver;

import com.sun.jna.Function;
import com.sun.jna.Memory;
import com.sun.jna.Native;
import com.sun.jna.NativeLibrary;
import com.sun.jna.Pointer;

/**
 * {@code cuLaunchKernelEx} with the attribute for programmatic dependent launch, through JNA
 * because JCuda has no binding for it. Used when a step is enqueued for capture; a replay never
 * comes here. The launch configuration is one native block per thread.
 */
final class PdlLaunch {
    // CUlaunchConfig: grid and block (6 × u32), shared bytes (u32), stream, attributes, count
    private static final int CONFIG_BYTES = 56;
    private static final int SHARED_OFFSET = 24;
    private static final int STREAM_OFFSET = 32;
    private static final int ATTRIBUTES_OFFSET = 40;
    private static final int ATTRIBUTE_COUNT_OFFSET = 48;
    // CUlaunchAttribute: id (u32), padding to 8, value (64 bytes)
    private static final int ATTRIBUTE_BYTES = 72;
    private static final int ATTRIBUTE_VALUE_OFFSET = 8;
    private static final int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

    private final Function cuLaunchKernelEx;
    private final ThreadLocal<Memory> config = ThreadLocal.withInitial(PdlLaunch::newConfig);

    /**
     * Binds the function.
     *
     * @throws LinkageError if JNA or the symbol is missing
     */
    PdlLaunch() {
        if (Native.POINTER_SIZE != 8) {
            throw new UnsatisfiedLinkError("a 64-bit JVM is needed");
        }
        cuLaunchKernelEx =
                NativeLibrary.getInstance("libcuda.so.1").getFunction("cuLaunchKernelEx");
    }

    int launch(
            long function,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            long paramTable) {
        Memory block = config.get();
        block.setInt(0, gridX);
        block.setInt(4, gridY);
        block.setInt(8, gridZ);
        block.setInt(12, blockX);
        block.setInt(16, blockY);
        block.setInt(20, blockZ);
        block.setInt(SHARED_OFFSET, dynamicSharedBytes);
        block.setLong(STREAM_OFFSET, stream);
        return cuLaunchKernelEx.invokeInt(
                new Object[] {block, new Pointer(function), new Pointer(paramTable), null});
    }

    private static Memory newConfig() {
        Memory block = new Memory(CONFIG_BYTES + ATTRIBUTE_BYTES);
        block.clear();
        long attribute = Pointer.nativeValue(block) + CONFIG_BYTES;
        block.setLong(ATTRIBUTES_OFFSET, attribute);
        block.setInt(ATTRIBUTE_COUNT_OFFSET, 1);
        block.setInt(CONFIG_BYTES, PROGRAMMATIC_STREAM_SERIALIZATION);
        block.setInt(CONFIG_BYTES + ATTRIBUTE_VALUE_OFFSET, 1);
        return block;
    }
}
