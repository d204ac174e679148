package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.util.Optional;

/**
 * The CUDA driver calls moe4j makes. Contexts, streams, events, modules, functions, graphs and
 * device addresses are raw {@code long} values of the driver's own handles, so those of any other
 * library work as well; stream 0 is the legacy default stream.
 *
 * <p>Every method throws {@link CudaException} if the driver reports an error. Methods are safe to
 * call from any thread; those that need a context use the one current on the calling thread (see
 * {@link #enter}). What a call may do beyond its purpose is stated as <i>waits</i> (may wait for
 * the device), <i>allocates</i> (allocates or frees in the driver or on the device) and <i>not in
 * capture</i> (illegal on a thread that captures a stream); methods that state nothing do none of
 * this and may be used in a step. {@link Call} holds the same facts for programs.
 */
public interface Driver {
    // ------------------------------------------------------------------ driver and devices

    /** Version of CUDA the installed driver supports, as major × 1000 + minor × 10. */
    int version();

    /** Number of devices. */
    int deviceCount();

    /** Name of a device. */
    String deviceName(int device);

    /** One attribute of a device. */
    int deviceAttribute(int device, DeviceAttribute attribute);

    /** Memory of a device in bytes. */
    long deviceTotalMemory(int device);

    /** PCI bus address of a device, such as {@code 0000:1b:00.0}. */
    String devicePciBusId(int device);

    /** Whether kernels of {@code device} can reach memory of {@code peer}. */
    boolean deviceCanAccessPeer(int device, int peer);

    // ------------------------------------------------------------------ contexts

    /**
     * Retains the primary context of a device, the one that the CUDA runtime and most other
     * libraries use too; does not make it current. The first call in a process creates it and takes
     * long. <i>Allocates.</i>
     */
    long primaryContextRetain(int device);

    /** Releases the primary context once. <i>Waits; not in capture.</i> */
    void primaryContextRelease(int device);

    /** The context current on this thread; 0 if none. */
    long contextCurrent();

    /** Number of the device that the current context is on. */
    int contextDevice();

    /** Makes a context current on this thread, keeping the one before. Prefer {@link #enter}. */
    void contextPush(long context);

    /** Undoes the last {@link #contextPush} of this thread; returns the context popped. */
    long contextPop();

    /**
     * Makes a context current on this thread until the scope closes, then restores what was current
     * before.
     */
    default Scope enter(long context) {
        contextPush(context);
        return this::contextPop;
    }

    /** Waits for everything in the current context. <i>Waits; not in capture.</i> */
    void contextSynchronize();

    /**
     * Lets kernels of the current context reach all memory of a peer's context; does nothing if
     * they can already. <i>Allocates; not in capture.</i>
     */
    void contextEnablePeerAccess(long peerContext);

    // ------------------------------------------------------------------ memory

    /** Device memory, not zeroed, aligned to 256 bytes. <i>Allocates, waits; not in capture.</i> */
    long memAlloc(long bytes);

    /** Frees device memory; address 0 is ignored. <i>Allocates, waits; not in capture.</i> */
    void memFree(long address);

    /** What an address belongs to; empty if the driver knows no memory there. */
    Optional<PointerInfo> pointer(long address);

    /** Memory of the device that is free and in all. */
    MemInfo memGetInfo();

    /**
     * Page-locked host memory that is portable to all contexts and mapped for kernels; at most 2
     * GiB. <i>Allocates, waits; not in capture.</i>
     */
    HostMemory hostAlloc(long bytes);

    /** Frees page-locked host memory. <i>Allocates, waits; not in capture.</i> */
    void hostFree(HostMemory memory);

    /** Fills {@code count} bytes. <i>Waits; not in capture.</i> */
    void memsetD8(long address, byte value, long count);

    /** Fills {@code count} words of 4 bytes. <i>Waits; not in capture.</i> */
    void memsetD32(long address, int value, long count);

    /** Fills {@code count} bytes in stream order. */
    void memsetD8Async(long address, byte value, long count, long stream);

    /** Fills {@code count} words of 4 bytes in stream order. */
    void memsetD32Async(long address, int value, long count, long stream);

    /**
     * Copies the remaining bytes of a direct buffer to the device; its position stays. <i>Waits,
     * copies pageable memory; not in capture.</i>
     *
     * @throws IllegalArgumentException if the buffer is not direct
     */
    void memcpyHtoD(long to, ByteBuffer from);

    /**
     * Fills the remaining bytes of a direct buffer from the device; its position stays. <i>Waits,
     * copies pageable memory; not in capture.</i>
     *
     * @throws IllegalArgumentException if the buffer is not direct or is read-only
     */
    void memcpyDtoH(ByteBuffer to, long from);

    /** Copies on the device. <i>Waits; not in capture.</i> */
    void memcpyDtoD(long to, long from, long bytes);

    /** Copies page-locked memory to the device in stream order; it must stay until then. */
    void memcpyHtoDAsync(long to, HostMemory from, long fromOffset, long bytes, long stream);

    /** Copies from the device to page-locked memory in stream order. */
    void memcpyDtoHAsync(HostMemory to, long toOffset, long from, long bytes, long stream);

    /** Copies between devices or on one in stream order. */
    void memcpyDtoDAsync(long to, long from, long bytes, long stream);

    // ------------------------------------------------------------------ streams

    /** A stream that does not wait for the legacy default stream. <i>Allocates.</i> */
    long streamCreate();

    /** Destroys a stream once its work is done; does not wait for it. <i>Allocates.</i> */
    void streamDestroy(long stream);

    /** Waits for a stream. <i>Waits; not in capture.</i> */
    void streamSynchronize(long stream);

    /** Whether everything enqueued is done. <i>Not in capture.</i> */
    boolean streamQuery(long stream);

    /** Orders what follows on a stream after an event, also one of another device. */
    void streamWaitEvent(long stream, long event);

    /** Whether a stream records a graph at the moment. */
    boolean streamIsCapturing(long stream);

    /**
     * Starts to record a graph instead of running what is enqueued. In thread-local mode: only
     * calls of this thread can break the capture.
     */
    void streamBeginCapture(long stream);

    /** Ends a capture on the thread that began it and returns the graph. */
    long streamEndCapture(long stream);

    /**
     * Until the scope closes, this thread may make the calls that a capture forbids. They run at
     * once and become no part of a graph; they must not touch a stream that is captured, nor the
     * legacy default stream. Close it on the same thread.
     */
    Scope relaxCapture();

    // ------------------------------------------------------------------ graphs

    /** Makes a graph executable. <i>Allocates.</i> */
    long graphInstantiate(long graph);

    /** Brings an executable graph to the device ahead of its first launch. <i>Allocates.</i> */
    void graphUpload(long graphExec, long stream);

    /** Enqueues a graph. */
    void graphLaunch(long graphExec, long stream);

    /** Number of nodes of a graph. */
    long graphNodeCount(long graph);

    /** Destroys a graph; executable graphs made from it stay. <i>Allocates.</i> */
    void graphDestroy(long graph);

    /** Destroys an executable graph. <i>Allocates.</i> */
    void graphExecDestroy(long graphExec);

    // ------------------------------------------------------------------ events

    /** An event; without timing it costs less. <i>Allocates.</i> */
    long eventCreate(boolean timing);

    /** Destroys an event. <i>Allocates.</i> */
    void eventDestroy(long event);

    /** Marks the point of a stream that everything enqueued so far precedes. */
    void eventRecord(long event, long stream);

    /** Whether the point marked last has passed. <i>Not in capture.</i> */
    boolean eventQuery(long event);

    /** Waits for the point marked last. <i>Waits; not in capture.</i> */
    void eventSynchronize(long event);

    /** Milliseconds between two events with timing that have passed. */
    float eventElapsedMs(long start, long end);

    // ------------------------------------------------------------------ kernels

    /** Loads a cubin, a fat binary or PTX text. <i>Allocates, waits; not in capture.</i> */
    long moduleLoad(byte[] image);

    /** Unloads a module. <i>Allocates, waits; not in capture.</i> */
    void moduleUnload(long module);

    /**
     * The kernel of that name. <i>Allocates; not in capture</i>, as the driver may load it only
     * now.
     */
    long moduleGetFunction(long module, String name);

    /** One attribute of a kernel. */
    int funcGetAttribute(long function, FuncAttribute attribute);

    /** Sets an attribute of a kernel. <i>Allocates.</i> */
    void funcSetAttribute(long function, FuncAttribute attribute, int value);

    /** Blocks of a kernel that can be resident on one SM at a time. */
    int occupancyMaxActiveBlocks(long function, int blockThreads, long dynamicSharedBytes);

    /** Enqueues a kernel; the arguments are read before the call returns. */
    void launchKernel(
            long function,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            KernelParams params);

    /** Whether {@link #launchKernelPdl} overlaps kernels here, and if not why. */
    PdlSupport pdlSupport();

    /**
     * As {@link #launchKernel}, but the kernel may start before its predecessor on the stream ends
     * (programmatic dependent launch); it has to wait itself before it reads what that one writes.
     * Where {@link #pdlSupport} says no, this is an ordinary launch, which is always correct.
     */
    void launchKernelPdl(
            long function,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            KernelParams params);

    // ------------------------------------------------------------------ other processes

    /**
     * A handle of 64 bytes by which another process can open this memory. It is a capability: do
     * not log it. <i>Not in capture.</i>
     */
    byte[] ipcGetMemHandle(long address);

    /** Maps the memory of another process. <i>Allocates; not in capture.</i> */
    long ipcOpenMemHandle(byte[] handle);

    /** Unmaps the memory of another process. <i>Allocates; not in capture.</i> */
    void ipcCloseMemHandle(long address);

    /**
     * What an address belongs to.
     *
     * @param context the context it was allocated in; 0 if it belongs to none
     * @param device number of the device
     * @param anywhere whether every context reaches it: page-locked or managed memory
     */
    record PointerInfo(long context, int device, boolean anywhere) {}

    /**
     * Memory of a device.
     *
     * @param free bytes
     * @param total bytes
     */
    record MemInfo(long free, long total) {}

    /**
     * Whether programmatic dependent launch works.
     *
     * @param usable true if it does
     * @param reason one line
     */
    record PdlSupport(boolean usable, String reason) {}
}
