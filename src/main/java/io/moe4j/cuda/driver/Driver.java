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

    /** {@return the version of CUDA the installed driver supports, as major × 1000 + minor × 10} */
    int version();

    /** {@return the number of devices} */
    int deviceCount();

    /**
     * {@return the name of a device}
     *
     * @param device number of the device
     */
    String deviceName(int device);

    /**
     * {@return one attribute of a device}
     *
     * @param device number of the device
     * @param attribute which attribute
     */
    int deviceAttribute(int device, DeviceAttribute attribute);

    /**
     * {@return the memory of a device in bytes}
     *
     * @param device number of the device
     */
    long deviceTotalMemory(int device);

    /**
     * {@return PCI bus address of a device, such as {@code 0000:1b:00.0}}
     *
     * @param device number of the device
     */
    String devicePciBusId(int device);

    /**
     * {@return whether kernels of {@code device} can reach memory of {@code peer}}
     *
     * @param device number of the device
     * @param peer number of the other device
     */
    boolean deviceCanAccessPeer(int device, int peer);

    // ------------------------------------------------------------------ contexts

    /**
     * Retains the primary context of a device, the one that the CUDA runtime and most other
     * libraries use too; does not make it current. The first call in a process creates it and takes
     * long. <i>Allocates.</i>
     *
     * @param device number of the device
     * @return the raw context
     */
    long primaryContextRetain(int device);

    /**
     * Releases the primary context once. <i>Waits; not in capture.</i>
     *
     * @param device number of the device
     */
    void primaryContextRelease(int device);

    /** {@return the context current on this thread; 0 if none} */
    long contextCurrent();

    /** {@return the number of the device that the current context is on} */
    int contextDevice();

    /**
     * Makes a context current on this thread, keeping the one before. Prefer {@link #enter}.
     *
     * @param context the raw context
     */
    void contextPush(long context);

    /**
     * Undoes the last {@link #contextPush} of this thread; returns the context popped.
     *
     * @return the raw context that was popped
     */
    long contextPop();

    /**
     * Makes a context current on this thread until the scope closes, then restores what was current
     * before.
     *
     * @param context the raw context
     * @return restores the context before, on the same thread
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
     *
     * @param peerContext the raw context of the peer
     */
    void contextEnablePeerAccess(long peerContext);

    // ------------------------------------------------------------------ memory

    /**
     * {@return the device memory, not zeroed, aligned to 256 bytes} <i>Allocates, waits; not in
     * capture.</i>
     *
     * @param bytes how many bytes
     */
    long memAlloc(long bytes);

    /**
     * Frees device memory; address 0 is ignored. <i>Allocates, waits; not in capture.</i>
     *
     * @param address device address in bytes
     */
    void memFree(long address);

    /**
     * {@return what an address belongs to; empty if the driver knows no memory there}
     *
     * @param address device address in bytes
     */
    Optional<PointerInfo> pointer(long address);

    /** {@return the memory of the device that is free and in all} */
    MemInfo memGetInfo();

    /**
     * {@return the page-locked host memory that is portable to all contexts and mapped for kernels;
     * at most 2 GiB} <i>Allocates, waits; not in capture.</i>
     *
     * @param bytes how many bytes
     */
    HostMemory hostAlloc(long bytes);

    /**
     * Frees page-locked host memory. <i>Allocates, waits; not in capture.</i>
     *
     * @param memory what {@link #hostAlloc} returned
     */
    void hostFree(HostMemory memory);

    /**
     * Fills {@code count} bytes. <i>Waits; not in capture.</i>
     *
     * @param address device address in bytes
     * @param value the value of each
     * @param count how many
     */
    void memsetD8(long address, byte value, long count);

    /**
     * Fills {@code count} words of 4 bytes. <i>Waits; not in capture.</i>
     *
     * @param address device address in bytes
     * @param value the value of each
     * @param count how many
     */
    void memsetD32(long address, int value, long count);

    /**
     * Fills {@code count} bytes in stream order.
     *
     * @param address device address in bytes
     * @param value the value of each
     * @param count how many
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void memsetD8Async(long address, byte value, long count, long stream);

    /**
     * Fills {@code count} words of 4 bytes in stream order.
     *
     * @param address device address in bytes
     * @param value the value of each
     * @param count how many
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void memsetD32Async(long address, int value, long count, long stream);

    /**
     * Copies the remaining bytes of a direct buffer to the device; its position stays. <i>Waits,
     * copies pageable memory; not in capture.</i>
     *
     * @param to destination
     * @param from source
     * @throws IllegalArgumentException if the buffer is not direct
     */
    void memcpyHtoD(long to, ByteBuffer from);

    /**
     * Fills the remaining bytes of a direct buffer from the device; its position stays. <i>Waits,
     * copies pageable memory; not in capture.</i>
     *
     * @param to destination
     * @param from source
     * @throws IllegalArgumentException if the buffer is not direct or is read-only
     */
    void memcpyDtoH(ByteBuffer to, long from);

    /**
     * Copies on the device. <i>Waits; not in capture.</i>
     *
     * @param to destination
     * @param from source
     * @param bytes how many bytes
     */
    void memcpyDtoD(long to, long from, long bytes);

    /**
     * Copies page-locked memory to the device in stream order; it must stay until then.
     *
     * @param to destination
     * @param from source
     * @param fromOffset first byte of the source
     * @param bytes how many bytes
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void memcpyHtoDAsync(long to, HostMemory from, long fromOffset, long bytes, long stream);

    /**
     * Copies from the device to page-locked memory in stream order.
     *
     * @param to destination
     * @param toOffset first byte of the destination
     * @param from source
     * @param bytes how many bytes
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void memcpyDtoHAsync(HostMemory to, long toOffset, long from, long bytes, long stream);

    /**
     * Copies between devices or on one in stream order.
     *
     * @param to destination
     * @param from source
     * @param bytes how many bytes
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void memcpyDtoDAsync(long to, long from, long bytes, long stream);

    // ------------------------------------------------------------------ streams

    /** {@return a stream that does not wait for the legacy default stream} <i>Allocates.</i> */
    long streamCreate();

    /**
     * Destroys a stream once its work is done; does not wait for it. <i>Allocates.</i>
     *
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void streamDestroy(long stream);

    /**
     * Waits for a stream. <i>Waits; not in capture.</i>
     *
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void streamSynchronize(long stream);

    /**
     * {@return whether everything enqueued is done} <i>Not in capture.</i>
     *
     * @param stream the raw stream; 0 for the legacy default stream
     */
    boolean streamQuery(long stream);

    /**
     * Orders what follows on a stream after an event, also one of another device.
     *
     * @param stream the raw stream; 0 for the legacy default stream
     * @param event the raw event
     */
    void streamWaitEvent(long stream, long event);

    /**
     * {@return whether a stream records a graph at the moment}
     *
     * @param stream the raw stream; 0 for the legacy default stream
     */
    boolean streamIsCapturing(long stream);

    /**
     * Starts to record a graph instead of running what is enqueued. In thread-local mode: only
     * calls of this thread can break the capture.
     *
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void streamBeginCapture(long stream);

    /**
     * Ends a capture on the thread that began it and returns the graph.
     *
     * @param stream the raw stream; 0 for the legacy default stream
     * @return the raw graph
     */
    long streamEndCapture(long stream);

    /**
     * Until the scope closes, this thread may make the calls that a capture forbids. They run at
     * once and become no part of a graph; they must not touch a stream that is captured, nor the
     * legacy default stream. Close it on the same thread.
     *
     * @return ends the exception when it is closed, on the same thread
     */
    Scope relaxCapture();

    // ------------------------------------------------------------------ graphs

    /**
     * Makes a graph executable. <i>Allocates.</i>
     *
     * @param graph the raw graph
     * @return the raw executable graph
     */
    long graphInstantiate(long graph);

    /**
     * Brings an executable graph to the device ahead of its first launch. <i>Allocates.</i>
     *
     * @param graphExec the raw executable graph
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void graphUpload(long graphExec, long stream);

    /**
     * Enqueues a graph.
     *
     * @param graphExec the raw executable graph
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void graphLaunch(long graphExec, long stream);

    /**
     * {@return the number of nodes of a graph}
     *
     * @param graph the raw graph
     */
    long graphNodeCount(long graph);

    /**
     * Destroys a graph; executable graphs made from it stay. <i>Allocates.</i>
     *
     * @param graph the raw graph
     */
    void graphDestroy(long graph);

    /**
     * Destroys an executable graph. <i>Allocates.</i>
     *
     * @param graphExec the raw executable graph
     */
    void graphExecDestroy(long graphExec);

    // ------------------------------------------------------------------ events

    /**
     * {@return an event; without timing it costs less} <i>Allocates.</i>
     *
     * @param timing whether it can measure times
     */
    long eventCreate(boolean timing);

    /**
     * Destroys an event. <i>Allocates.</i>
     *
     * @param event the raw event
     */
    void eventDestroy(long event);

    /**
     * Marks the point of a stream that everything enqueued so far precedes.
     *
     * @param event the raw event
     * @param stream the raw stream; 0 for the legacy default stream
     */
    void eventRecord(long event, long stream);

    /**
     * {@return whether the point marked last has passed} <i>Not in capture.</i>
     *
     * @param event the raw event
     */
    boolean eventQuery(long event);

    /**
     * Waits for the point marked last. <i>Waits; not in capture.</i>
     *
     * @param event the raw event
     */
    void eventSynchronize(long event);

    /**
     * {@return milliseconds between two events with timing that have passed}
     *
     * @param start the earlier event
     * @param end the later event
     */
    float eventElapsedMs(long start, long end);

    // ------------------------------------------------------------------ kernels

    /**
     * Loads a cubin, a fat binary or PTX text. <i>Allocates, waits; not in capture.</i>
     *
     * @param image the image; PTX ends with a zero byte
     * @return the raw module
     */
    long moduleLoad(byte[] image);

    /**
     * Unloads a module. <i>Allocates, waits; not in capture.</i>
     *
     * @param module the raw module
     */
    void moduleUnload(long module);

    /**
     * {@return the kernel of that name} <i>Allocates; not in capture</i>, as the driver may load it
     * only now.
     *
     * @param module the raw module
     * @param name symbol of the kernel
     */
    long moduleGetFunction(long module, String name);

    /**
     * {@return one attribute of a kernel}
     *
     * @param function the raw kernel
     * @param attribute which attribute
     */
    int funcGetAttribute(long function, FuncAttribute attribute);

    /**
     * Sets an attribute of a kernel. <i>Allocates.</i>
     *
     * @param function the raw kernel
     * @param attribute which attribute
     * @param value the value of each
     */
    void funcSetAttribute(long function, FuncAttribute attribute, int value);

    /**
     * {@return the blocks of a kernel that can be resident on one SM at a time}
     *
     * @param function the raw kernel
     * @param blockThreads threads of a block
     * @param dynamicSharedBytes bytes of dynamic shared memory of a block
     */
    int occupancyMaxActiveBlocks(long function, int blockThreads, long dynamicSharedBytes);

    /**
     * Enqueues a kernel; the arguments are read before the call returns.
     *
     * @param function the raw kernel
     * @param gridX blocks in x
     * @param gridY blocks in y
     * @param gridZ blocks in z
     * @param blockX threads of a block in x
     * @param blockY threads of a block in y
     * @param blockZ threads of a block in z
     * @param dynamicSharedBytes bytes of dynamic shared memory of a block
     * @param stream the raw stream; 0 for the legacy default stream
     * @param params its arguments
     */
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

    /** {@return whether {@link #launchKernelPdl} overlaps kernels here, and if not why} */
    PdlSupport pdlSupport();

    /**
     * As {@link #launchKernel}, but the kernel may start before its predecessor on the stream ends
     * (programmatic dependent launch); it has to wait itself before it reads what that one writes.
     * Where {@link #pdlSupport} says no, this is an ordinary launch, which is always correct.
     *
     * @param function the raw kernel
     * @param gridX blocks in x
     * @param gridY blocks in y
     * @param gridZ blocks in z
     * @param blockX threads of a block in x
     * @param blockY threads of a block in y
     * @param blockZ threads of a block in z
     * @param dynamicSharedBytes bytes of dynamic shared memory of a block
     * @param stream the raw stream; 0 for the legacy default stream
     * @param params its arguments
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
     * {@return a handle of 64 bytes by which another process can open this memory} It is a
     * capability: do not log it. <i>Not in capture.</i>
     *
     * @param address device address in bytes
     */
    byte[] ipcGetMemHandle(long address);

    /**
     * Maps the memory of another process. <i>Allocates; not in capture.</i>
     *
     * @param handle the 64 bytes
     * @return its device address in this process
     */
    long ipcOpenMemHandle(byte[] handle);

    /**
     * Unmaps the memory of another process. <i>Allocates; not in capture.</i>
     *
     * @param address device address in bytes
     */
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
