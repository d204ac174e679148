package io.moe4j.cuda.driver;

import java.util.EnumSet;
import java.util.Set;

/**
 * Every driver call in use, and what it may do to the host. The one place where this is written:
 * {@link CheckedDriver} refuses by it, {@link RecordingDriver} simulates captures by it, {@link
 * NativeDriver} names failures by it.
 */
public enum Call {
    /** Loads the driver. */
    INIT("cuInit"),
    /** Version of the driver. */
    DRIVER_GET_VERSION("cuDriverGetVersion"),
    /** Number of devices. */
    DEVICE_GET_COUNT("cuDeviceGetCount"),
    /** Handle of a device. */
    DEVICE_GET("cuDeviceGet"),
    /** Name of a device. */
    DEVICE_GET_NAME("cuDeviceGetName"),
    /** One attribute of a device. */
    DEVICE_GET_ATTRIBUTE("cuDeviceGetAttribute"),
    /** Memory of a device. */
    DEVICE_TOTAL_MEM("cuDeviceTotalMem"),
    /** Bus address of a device. */
    DEVICE_GET_PCI_BUS_ID("cuDeviceGetPCIBusId"),
    /** Whether a device reaches another's memory. */
    DEVICE_CAN_ACCESS_PEER("cuDeviceCanAccessPeer"),
    /** Creates or retains the primary context. */
    PRIMARY_CTX_RETAIN("cuDevicePrimaryCtxRetain", Effect.ALLOCATES),
    /** Releases the primary context. */
    PRIMARY_CTX_RELEASE("cuDevicePrimaryCtxRelease", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** The context of this thread. */
    CTX_GET_CURRENT("cuCtxGetCurrent"),
    /** The device of the current context. */
    CTX_GET_DEVICE("cuCtxGetDevice"),
    /** Makes a context current. */
    CTX_PUSH_CURRENT("cuCtxPushCurrent"),
    /** Restores the context before. */
    CTX_POP_CURRENT("cuCtxPopCurrent"),
    /** Waits for a whole context. */
    CTX_SYNCHRONIZE("cuCtxSynchronize", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Maps a peer's memory. */
    CTX_ENABLE_PEER_ACCESS("cuCtxEnablePeerAccess", Effect.ALLOCATES, Effect.BREAKS_CAPTURE),
    /** Device memory. */
    MEM_ALLOC("cuMemAlloc", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Frees device memory. */
    MEM_FREE("cuMemFree", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Free and total device memory. */
    MEM_GET_INFO("cuMemGetInfo"),
    /** What an address belongs to. */
    POINTER_GET_ATTRIBUTE("cuPointerGetAttribute"),
    /** Page-locked host memory. */
    MEM_HOST_ALLOC("cuMemHostAlloc", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Address of page-locked memory on the device. */
    MEM_HOST_GET_DEVICE_POINTER("cuMemHostGetDevicePointer"),
    /** Frees page-locked memory. */
    MEM_FREE_HOST("cuMemFreeHost", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Fill, on the legacy stream. */
    MEMSET_D8("cuMemsetD8", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Fill, on the legacy stream. */
    MEMSET_D32("cuMemsetD32", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Fill, stream-ordered. */
    MEMSET_D8_ASYNC("cuMemsetD8Async"),
    /** Fill, stream-ordered. */
    MEMSET_D32_ASYNC("cuMemsetD32Async"),
    /** Copy from any direct memory. */
    MEMCPY_H_TO_D("cuMemcpyHtoD", Effect.WAITS, Effect.COPIES_PAGEABLE, Effect.BREAKS_CAPTURE),
    /** Copy into any direct memory. */
    MEMCPY_D_TO_H("cuMemcpyDtoH", Effect.WAITS, Effect.COPIES_PAGEABLE, Effect.BREAKS_CAPTURE),
    /** Copy on the legacy stream. */
    MEMCPY_D_TO_D("cuMemcpyDtoD", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Copy from page-locked memory, stream-ordered. */
    MEMCPY_H_TO_D_ASYNC("cuMemcpyHtoDAsync"),
    /** Copy into page-locked memory, stream-ordered. */
    MEMCPY_D_TO_H_ASYNC("cuMemcpyDtoHAsync"),
    /** Copy, stream-ordered. */
    MEMCPY_D_TO_D_ASYNC("cuMemcpyDtoDAsync"),
    /** New stream. */
    STREAM_CREATE("cuStreamCreate", Effect.ALLOCATES),
    /** Destroys a stream. */
    STREAM_DESTROY("cuStreamDestroy", Effect.ALLOCATES),
    /** Waits for a stream. */
    STREAM_SYNCHRONIZE("cuStreamSynchronize", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Whether a stream is done. */
    STREAM_QUERY("cuStreamQuery", Effect.BREAKS_CAPTURE),
    /** Whether a stream records a graph. */
    STREAM_IS_CAPTURING("cuStreamIsCapturing"),
    /** Starts a capture. */
    STREAM_BEGIN_CAPTURE("cuStreamBeginCapture"),
    /** Ends a capture. */
    STREAM_END_CAPTURE("cuStreamEndCapture"),
    /** Orders a stream after an event. */
    STREAM_WAIT_EVENT("cuStreamWaitEvent"),
    /** What this thread may do while streams are captured. */
    THREAD_EXCHANGE_CAPTURE_MODE("cuThreadExchangeStreamCaptureMode"),
    /** Makes a graph executable. */
    GRAPH_INSTANTIATE("cuGraphInstantiate", Effect.ALLOCATES),
    /** Brings an executable graph to the device. */
    GRAPH_UPLOAD("cuGraphUpload", Effect.ALLOCATES, Effect.BREAKS_CAPTURE),
    /** Enqueues a graph. */
    GRAPH_LAUNCH("cuGraphLaunch"),
    /** Destroys a graph. */
    GRAPH_DESTROY("cuGraphDestroy", Effect.ALLOCATES),
    /** Destroys an executable graph. */
    GRAPH_EXEC_DESTROY("cuGraphExecDestroy", Effect.ALLOCATES),
    /** Number of nodes. */
    GRAPH_GET_NODES("cuGraphGetNodes"),
    /** New event. */
    EVENT_CREATE("cuEventCreate", Effect.ALLOCATES),
    /** Destroys an event. */
    EVENT_DESTROY("cuEventDestroy", Effect.ALLOCATES),
    /** Marks a point of a stream. */
    EVENT_RECORD("cuEventRecord"),
    /** Whether an event has passed. */
    EVENT_QUERY("cuEventQuery", Effect.BREAKS_CAPTURE),
    /** Waits for an event. */
    EVENT_SYNCHRONIZE("cuEventSynchronize", Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Time between two events. */
    EVENT_ELAPSED_TIME("cuEventElapsedTime"),
    /** Loads kernels. */
    MODULE_LOAD_DATA("cuModuleLoadData", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Unloads kernels. */
    MODULE_UNLOAD("cuModuleUnload", Effect.ALLOCATES, Effect.WAITS, Effect.BREAKS_CAPTURE),
    /** Looks up a kernel; with lazy loading this is what loads it. */
    MODULE_GET_FUNCTION("cuModuleGetFunction", Effect.ALLOCATES, Effect.BREAKS_CAPTURE),
    /** One attribute of a kernel. */
    FUNC_GET_ATTRIBUTE("cuFuncGetAttribute"),
    /** Sets an attribute of a kernel. */
    FUNC_SET_ATTRIBUTE("cuFuncSetAttribute", Effect.ALLOCATES),
    /** Blocks of a kernel that fit one SM. */
    OCCUPANCY("cuOccupancyMaxActiveBlocksPerMultiprocessor"),
    /** Enqueues a kernel. */
    LAUNCH_KERNEL("cuLaunchKernel"),
    /** Enqueues a kernel that may start before its predecessor ends. */
    LAUNCH_KERNEL_EX("cuLaunchKernelEx"),
    /** Exports memory to another process. */
    IPC_GET_MEM_HANDLE("cuIpcGetMemHandle", Effect.BREAKS_CAPTURE),
    /** Maps memory of another process. */
    IPC_OPEN_MEM_HANDLE("cuIpcOpenMemHandle", Effect.ALLOCATES, Effect.BREAKS_CAPTURE),
    /** Unmaps memory of another process. */
    IPC_CLOSE_MEM_HANDLE("cuIpcCloseMemHandle", Effect.ALLOCATES, Effect.BREAKS_CAPTURE);

    /** What a call may do that a step must not. */
    public enum Effect {
        /** May wait for the device. */
        WAITS,
        /** Allocates or frees memory, on the device or in the driver. */
        ALLOCATES,
        /** Reads or writes pageable host memory. */
        COPIES_PAGEABLE,
        /** Illegal while this thread captures a stream. */
        BREAKS_CAPTURE
    }

    private final String symbol;
    private final Set<Effect> effects;

    Call(String symbol, Effect... effects) {
        this.symbol = symbol;
        this.effects = EnumSet.noneOf(Effect.class);
        this.effects.addAll(Set.of(effects));
    }

    /** {@return the name of the CUDA driver function} */
    public String symbol() {
        return symbol;
    }

    /**
     * {@return whether the call may have this effect}
     *
     * @param effect the effect asked for
     */
    public boolean has(Effect effect) {
        return effects.contains(effect);
    }

    /**
     * {@return whether a step may make this call: it neither waits, allocates nor copies pageable
     * memory}
     */
    public boolean legalInStep() {
        return !has(Effect.WAITS) && !has(Effect.ALLOCATES) && !has(Effect.COPIES_PAGEABLE);
    }

    /**
     * {@return whether the call is legal on a thread that captures a stream (thread-local mode)}
     */
    public boolean legalInCapture() {
        return !has(Effect.BREAKS_CAPTURE);
    }

    @Override
    public String toString() {
        return symbol;
    }
}
