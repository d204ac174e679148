package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.EnumMap;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;
import java.util.stream.Collectors;

/**
 * A driver without a GPU, for tests of what is called and in which order. It hands out fake handles
 * and addresses, runs no kernel and keeps no device memory, but holds callers to the rules of the
 * real one: a context must be current, handles must be alive, copies must stay inside an
 * allocation, calls that a capture forbids fail and break it, forked streams must be joined. What
 * is not freed is listed by {@link #leaks}. Errors can be injected by {@link #failNth}.
 *
 * <p>Simplified: work finishes at once (events and streams are always done), reads of device memory
 * give zeros, and a forked stream has to be joined by the stream that captures, not by a third.
 * Thread-safe; captures and contexts belong to threads as in CUDA.
 */
public final class RecordingDriver implements Driver {
    /**
     * One call, in the order made.
     *
     * @param call the call
     * @param arguments as passed; kernel arguments as a copy of their bytes
     * @param result what it returned, or null
     * @param inCapture whether it became part of a graph or was made during a capture
     */
    public record Recorded(Call call, List<Object> arguments, Object result, boolean inCapture) {
        /**
         * {@return the argument at {@code index} as a long}
         *
         * @param index number of the argument
         */
        public long longAt(int index) {
            return ((Number) arguments.get(index)).longValue();
        }

        @Override
        public String toString() {
            return call.symbol()
                    + arguments.stream()
                            .map(RecordingDriver::show)
                            .collect(Collectors.joining(", ", "(", ")"))
                    + (result == null ? "" : " = " + show(result));
        }
    }

    /**
     * A kernel launch, decoded.
     *
     * @param kernel name of the function
     * @param gridX blocks in x
     * @param gridY blocks in y
     * @param gridZ blocks in z
     * @param blockX threads in x
     * @param blockY threads in y
     * @param blockZ threads in z
     * @param dynamicSharedBytes dynamic shared memory
     * @param stream the stream
     * @param params the argument bytes in order, without padding
     * @param pdl whether it may overlap its predecessor
     */
    public record Launch(
            String kernel,
            int gridX,
            int gridY,
            int gridZ,
            int blockX,
            int blockY,
            int blockZ,
            int dynamicSharedBytes,
            long stream,
            byte[] params,
            boolean pdl) {
        /** {@return the argument bytes, little endian} */
        public ByteBuffer paramBytes() {
            return ByteBuffer.wrap(params).order(ByteOrder.LITTLE_ENDIAN);
        }
    }

    private static final int HANDLE_STEP = 0x10;
    private static final long ADDRESS_ALIGNMENT = 512;

    private final List<Recorded> calls = new ArrayList<>();
    private final List<Launch> launches = new ArrayList<>();
    private final TreeMap<Long, Long> memory = new TreeMap<>();
    private final TreeMap<Long, HostMemory> hostMemory = new TreeMap<>();
    private final TreeMap<Long, Long> imported = new TreeMap<>();
    private final TreeMap<Long, Long> foreign = new TreeMap<>();
    private final Map<Long, Handle> handles = new LinkedHashMap<>();
    private final Map<Long, Capture> captures = new HashMap<>();
    private final Map<Integer, Long> primaryContexts = new HashMap<>();
    private final Map<Long, Integer> foreignContexts = new HashMap<>();

    /** Context of each block of device memory; 0 if it is not told. */
    private final Map<Long, Long> contextOf = new HashMap<>();

    private final Map<Integer, Integer> primaryReferences = new HashMap<>();
    private final Map<Call, Integer> made = new EnumMap<>(Call.class);
    private final Map<Call, Map<Integer, Integer>> injected = new EnumMap<>(Call.class);
    private final Map<DeviceAttribute, Integer> attributes = new EnumMap<>(DeviceAttribute.class);
    private final ThreadLocal<Integer> relaxed = ThreadLocal.withInitial(() -> 0);
    private final ThreadLocal<Deque<Long>> contexts = ThreadLocal.withInitial(ArrayDeque::new);

    private final int devices;
    private final long memoryBytes;
    private long nextHandle = 0x5000_0000_0000L;
    private long nextAddress = 0x7f00_0000_0000L;
    private long nextHostAddress = 0x6f00_0000_0000L;
    private long allocatedBytes;
    private long peakBytes;
    private int poisonCode;
    private Thread quiet;
    private final long[] quietCalls = new long[Call.values().length];
    private final Scope pop = this::contextPop;

    private enum Kind {
        STREAM,
        EVENT,
        GRAPH,
        GRAPH_EXEC,
        MODULE,
        FUNCTION
    }

    /** Something alive, with the little state the simulation needs. */
    private static final class Handle {
        final Kind kind;
        final String name;
        long module;
        boolean timing;
        boolean foreign;

        /** Of a stream: the context it belongs to. */
        long context;

        /** Of a graph: its nodes. */
        int nodes;

        /** Of a stream: calls enqueued on it in the running capture. */
        int enqueued;

        /** Of an event: the capture, stream and position it was recorded at. */
        Capture capture;

        long stream;
        int position;
        final Map<FuncAttribute, Integer> attributes = new EnumMap<>(FuncAttribute.class);

        Handle(Kind kind, String name) {
            this.kind = kind;
            this.name = name;
        }
    }

    /** A running capture: the stream it began on and the streams forked from it. */
    private static final class Capture {
        final long origin;
        final Thread thread;
        final Map<Long, Integer> joinedUpTo = new HashMap<>();
        int nodes;
        boolean broken;

        Capture(long origin, Thread thread) {
            this.origin = origin;
            this.thread = thread;
        }
    }

    /** One device like an H200: 132 SMs, compute capability 9.0, 141 GB. */
    public RecordingDriver() {
        this(1, 141L << 30);
    }

    /**
     * That many equal devices, each with so much memory; allocations above it fail.
     *
     * @param devices number of devices
     * @param memoryBytes memory of each in bytes
     */
    public RecordingDriver(int devices, long memoryBytes) {
        this.devices = devices;
        this.memoryBytes = memoryBytes;
        attributes.put(DeviceAttribute.MAX_THREADS_PER_BLOCK, 1024);
        attributes.put(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10);
        attributes.put(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 227 << 10);
        attributes.put(DeviceAttribute.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 228 << 10);
        attributes.put(DeviceAttribute.MAX_THREADS_PER_MULTIPROCESSOR, 2048);
        attributes.put(DeviceAttribute.MAX_REGISTERS_PER_MULTIPROCESSOR, 65536);
        attributes.put(DeviceAttribute.MULTIPROCESSOR_COUNT, 132);
        attributes.put(DeviceAttribute.COMPUTE_CAPABILITY_MAJOR, 9);
        attributes.put(DeviceAttribute.COMPUTE_CAPABILITY_MINOR, 0);
        attributes.put(DeviceAttribute.CLOCK_RATE_KHZ, 1_980_000);
        attributes.put(DeviceAttribute.MEMORY_CLOCK_RATE_KHZ, 3_201_000);
        attributes.put(DeviceAttribute.MEMORY_BUS_WIDTH_BITS, 6144);
        attributes.put(DeviceAttribute.L2_CACHE_BYTES, 60 << 20);
        attributes.put(DeviceAttribute.CAN_MAP_HOST_MEMORY, 1);
        attributes.put(DeviceAttribute.UNIFIED_ADDRESSING, 1);
        attributes.put(DeviceAttribute.COOPERATIVE_LAUNCH, 1);
    }

    // ------------------------------------------------------------------ for tests

    /** {@return all calls so far, in order} */
    public synchronized List<Recorded> calls() {
        return List.copyOf(calls);
    }

    /**
     * {@return the calls of these kinds so far, in order}
     *
     * @param kinds which calls
     */
    public synchronized List<Recorded> calls(Call... kinds) {
        List<Call> wanted = Arrays.asList(kinds);
        return calls.stream().filter(recorded -> wanted.contains(recorded.call())).toList();
    }

    /** {@return the kernel launches so far, in order} */
    public synchronized List<Launch> launches() {
        return List.copyOf(launches);
    }

    /** Forgets the calls and launches so far; what is allocated stays. */
    public synchronized void clearCalls() {
        calls.clear();
        launches.clear();
    }

    /**
     * Until {@link #endQuiet} the calling thread makes only calls a step may make: launches, and
     * contexts pushed and popped. They are counted and neither looked at nor kept, so that the
     * driver allocates nothing. Any other call of the thread fails.
     */
    public synchronized void beginQuiet() {
        Arrays.fill(quietCalls, 0);
        quiet = Thread.currentThread();
    }

    /**
     * Ends what {@link #beginQuiet} began.
     *
     * @return how often each call was made
     */
    public synchronized Map<Call, Long> endQuiet() {
        quiet = null;
        Map<Call, Long> counts = new EnumMap<>(Call.class);
        for (Call call : Call.values()) {
            if (quietCalls[call.ordinal()] > 0) {
                counts.put(call, quietCalls[call.ordinal()]);
            }
        }
        return counts;
    }

    private boolean quietly(Call call) {
        if (quiet != Thread.currentThread()) {
            return false;
        }
        quietCalls[call.ordinal()]++;
        return true;
    }

    /** {@return the device and host memory allocated now, in bytes} */
    public synchronized long allocatedBytes() {
        return allocatedBytes;
    }

    /** {@return the most bytes that were allocated at a time} */
    public synchronized long peakBytes() {
        return peakBytes;
    }

    /**
     * {@return everything alive that somebody should have released: one line each, empty if
     * nothing}
     */
    public synchronized List<String> leaks() {
        List<String> leaks = new ArrayList<>();
        memory.forEach((at, bytes) -> leaks.add("device memory " + hex(at) + ", " + bytes + " B"));
        hostMemory.forEach((at, m) -> leaks.add("host memory " + hex(at) + ", " + m.size() + " B"));
        imported.forEach((at, bytes) -> leaks.add("imported memory " + hex(at)));
        handles.forEach(
                (at, handle) -> {
                    if (!handle.foreign && handle.kind != Kind.FUNCTION) {
                        leaks.add(handle.name + " " + hex(at));
                    }
                });
        primaryReferences.forEach(
                (device, count) -> {
                    if (count > 0) {
                        leaks.add("primary context of device " + device + ", " + count + "×");
                    }
                });
        return leaks;
    }

    /**
     * Lets the {@code nth} call from now on of one kind fail with a code, once; 1 is the next one.
     *
     * @param call the kind of call
     * @param nth which of them, from 1
     * @param code a {@code CUresult}
     * @return this driver
     */
    public synchronized RecordingDriver failNth(Call call, int nth, int code) {
        injected.computeIfAbsent(call, c -> new HashMap<>())
                .put(made.getOrDefault(call, 0) + nth, code);
        return this;
    }

    /**
     * From now on every call that needs a context fails with this code, as after a device fault.
     *
     * @param code a {@code CUresult}
     */
    public synchronized void poison(int code) {
        poisonCode = code;
    }

    /**
     * Sets what {@link #deviceAttribute} returns, on all devices.
     *
     * @param attribute which attribute
     * @param value its value from now on
     * @return this driver
     */
    public synchronized RecordingDriver withAttribute(DeviceAttribute attribute, int value) {
        attributes.put(attribute, value);
        return this;
    }

    /**
     * {@return a context that another owner created on a device, not its primary one}
     *
     * @param device number of the device
     */
    public synchronized long foreignContext(int device) {
        long context = 0x4800_0000_0000L + (foreignContexts.size() + 1L) * HANDLE_STEP;
        foreignContexts.put(context, device);
        return context;
    }

    /** {@return a stream of another owner: usable here in any context, not counted as a leak} */
    public synchronized long foreignStream() {
        return foreignStream(0L);
    }

    /**
     * {@return a stream of another owner in one context: usable while that is current}
     *
     * @param context the raw context
     */
    public synchronized long foreignStream(long context) {
        long stream = newHandle(Kind.STREAM, "foreign stream");
        handles.get(stream).foreign = true;
        handles.get(stream).context = context;
        return stream;
    }

    /**
     * The other owner destroys its stream.
     *
     * @param stream a CUstream; 0 for the legacy default stream
     */
    public synchronized void destroyForeignStream(long stream) {
        handles.remove(stream);
    }

    /**
     * {@return the memory of another owner: addressable here, not counted as allocated or as a
     * leak}
     *
     * @param bytes how many bytes
     */
    public synchronized long foreignMemory(long bytes) {
        return foreignMemory(bytes, 0L);
    }

    /**
     * {@return the memory of another owner, allocated in one context}
     *
     * @param bytes how many bytes
     * @param context the raw context
     */
    public synchronized long foreignMemory(long bytes, long context) {
        long address = newAddress(bytes);
        foreign.put(address, bytes);
        contextOf.put(address, context);
        return address;
    }

    /**
     * The other owner frees its memory.
     *
     * @param address what was allocated
     */
    public synchronized void freeForeignMemory(long address) {
        foreign.remove(address);
        contextOf.remove(address);
    }

    // ------------------------------------------------------------------ driver and devices

    @Override
    public synchronized int version() {
        begin(Call.DRIVER_GET_VERSION, false);
        return result(Call.DRIVER_GET_VERSION, 13_000);
    }

    @Override
    public synchronized int deviceCount() {
        begin(Call.DEVICE_GET_COUNT, false);
        return result(Call.DEVICE_GET_COUNT, devices);
    }

    @Override
    public synchronized String deviceName(int device) {
        beginDevice(Call.DEVICE_GET_NAME, device);
        return result(Call.DEVICE_GET_NAME, "recorded device " + device, device);
    }

    @Override
    public synchronized int deviceAttribute(int device, DeviceAttribute attribute) {
        beginDevice(Call.DEVICE_GET_ATTRIBUTE, device);
        int value = attributes.getOrDefault(attribute, 0);
        return result(Call.DEVICE_GET_ATTRIBUTE, value, device, attribute);
    }

    @Override
    public synchronized long deviceTotalMemory(int device) {
        beginDevice(Call.DEVICE_TOTAL_MEM, device);
        return result(Call.DEVICE_TOTAL_MEM, memoryBytes, device);
    }

    @Override
    public synchronized String devicePciBusId(int device) {
        beginDevice(Call.DEVICE_GET_PCI_BUS_ID, device);
        return result(
                Call.DEVICE_GET_PCI_BUS_ID, String.format("0000:%02x:00.0", device + 1), device);
    }

    @Override
    public synchronized boolean deviceCanAccessPeer(int device, int peer) {
        beginDevice(Call.DEVICE_CAN_ACCESS_PEER, device);
        beginDevice(Call.DEVICE_CAN_ACCESS_PEER, peer);
        return result(Call.DEVICE_CAN_ACCESS_PEER, device != peer, device, peer);
    }

    // ------------------------------------------------------------------ contexts

    @Override
    public synchronized long primaryContextRetain(int device) {
        beginDevice(Call.PRIMARY_CTX_RETAIN, device);
        long context =
                primaryContexts.computeIfAbsent(device, d -> 0x4000_0000_0000L + d * HANDLE_STEP);
        primaryReferences.merge(device, 1, Integer::sum);
        return result(Call.PRIMARY_CTX_RETAIN, context, device);
    }

    @Override
    public synchronized void primaryContextRelease(int device) {
        beginDevice(Call.PRIMARY_CTX_RELEASE, device);
        if (primaryReferences.getOrDefault(device, 0) == 0) {
            fail(Call.PRIMARY_CTX_RELEASE, CudaErrors.INVALID_CONTEXT, "device " + device);
        }
        primaryReferences.merge(device, -1, Integer::sum);
        record(Call.PRIMARY_CTX_RELEASE, null, device);
    }

    @Override
    public synchronized long contextCurrent() {
        begin(Call.CTX_GET_CURRENT, false);
        Long top = contexts.get().peek();
        return result(Call.CTX_GET_CURRENT, top == null ? 0L : top);
    }

    @Override
    public synchronized int contextDevice() {
        begin(Call.CTX_GET_DEVICE, true);
        return result(Call.CTX_GET_DEVICE, deviceOf(contexts.get().peek()));
    }

    private int deviceOf(long context) {
        Integer device = foreignContexts.get(context);
        return device != null ? device : (int) ((context - 0x4000_0000_0000L) / HANDLE_STEP);
    }

    @Override
    public synchronized void contextPush(long context) {
        if (quietly(Call.CTX_PUSH_CURRENT)) {
            return;
        }
        begin(Call.CTX_PUSH_CURRENT, false);
        if (!foreignContexts.containsKey(context)
                && (!primaryContexts.containsValue(context)
                        || primaryReferences.getOrDefault(deviceOf(context), 0) == 0)) {
            fail(Call.CTX_PUSH_CURRENT, CudaErrors.INVALID_CONTEXT, hex(context));
        }
        contexts.get().push(context);
        record(Call.CTX_PUSH_CURRENT, null, context);
    }

    @Override
    public Scope enter(long context) {
        contextPush(context);
        return pop;
    }

    @Override
    public synchronized long contextPop() {
        if (quietly(Call.CTX_POP_CURRENT)) {
            return 0;
        }
        begin(Call.CTX_POP_CURRENT, false);
        if (contexts.get().isEmpty()) {
            fail(Call.CTX_POP_CURRENT, CudaErrors.INVALID_CONTEXT, "");
        }
        return result(Call.CTX_POP_CURRENT, contexts.get().pop());
    }

    @Override
    public synchronized void contextSynchronize() {
        begin(Call.CTX_SYNCHRONIZE, true);
        record(Call.CTX_SYNCHRONIZE, null);
    }

    @Override
    public synchronized void contextEnablePeerAccess(long peerContext) {
        begin(Call.CTX_ENABLE_PEER_ACCESS, true);
        record(Call.CTX_ENABLE_PEER_ACCESS, null, peerContext);
    }

    // ------------------------------------------------------------------ memory

    @Override
    public synchronized long memAlloc(long bytes) {
        begin(Call.MEM_ALLOC, true);
        if (bytes < 1) {
            fail(Call.MEM_ALLOC, CudaErrors.INVALID_VALUE, bytes + " bytes");
        }
        if (allocatedBytes + bytes > memoryBytes) {
            fail(
                    Call.MEM_ALLOC,
                    CudaErrors.OUT_OF_MEMORY,
                    bytes
                            + " bytes, "
                            + (memoryBytes - allocatedBytes)
                            + " of "
                            + memoryBytes
                            + " free");
        }
        long address = newAddress(bytes);
        memory.put(address, bytes);
        contextOf.put(address, contexts.get().peek());
        account(bytes);
        return result(Call.MEM_ALLOC, address, bytes);
    }

    @Override
    public synchronized void memFree(long address) {
        if (address == 0) {
            return;
        }
        begin(Call.MEM_FREE, true);
        Long bytes = memory.remove(address);
        contextOf.remove(address);
        if (bytes == null) {
            fail(
                    Call.MEM_FREE,
                    CudaErrors.INVALID_VALUE,
                    hex(address) + " is not allocated, or was freed before");
        }
        account(-bytes);
        record(Call.MEM_FREE, null, address);
    }

    @Override
    public synchronized Optional<PointerInfo> pointer(long address) {
        begin(Call.POINTER_GET_ATTRIBUTE, true);
        Optional<PointerInfo> info = lookUp(address);
        record(Call.POINTER_GET_ATTRIBUTE, info.isPresent(), address);
        return info;
    }

    private Optional<PointerInfo> lookUp(long address) {
        for (TreeMap<Long, Long> owned : List.of(memory, foreign, imported)) {
            Map.Entry<Long, Long> block = owned.floorEntry(address);
            if (block != null && address < block.getKey() + block.getValue()) {
                long context = contextOf.getOrDefault(block.getKey(), 0L);
                return Optional.of(
                        new PointerInfo(context, context == 0 ? 0 : deviceOf(context), false));
            }
        }
        Map.Entry<Long, HostMemory> mapped = hostMemory.floorEntry(address);
        return mapped != null && address < mapped.getKey() + mapped.getValue().size()
                ? Optional.of(new PointerInfo(0L, 0, true))
                : Optional.empty();
    }

    @Override
    public synchronized MemInfo memGetInfo() {
        begin(Call.MEM_GET_INFO, true);
        return result(Call.MEM_GET_INFO, new MemInfo(memoryBytes - allocatedBytes, memoryBytes));
    }

    @Override
    public synchronized HostMemory hostAlloc(long bytes) {
        begin(Call.MEM_HOST_ALLOC, true);
        if (bytes < 1 || bytes > Integer.MAX_VALUE) {
            throw new IllegalArgumentException(
                    bytes + " bytes of page-locked memory: 1 to 2147483647 are possible");
        }
        long address = nextHostAddress;
        nextHostAddress += alignUp(bytes);
        HostMemory host = new HostMemory(address, address, ByteBuffer.allocateDirect((int) bytes));
        hostMemory.put(address, host);
        account(bytes);
        record(Call.MEM_HOST_ALLOC, address, bytes);
        return host;
    }

    @Override
    public synchronized void hostFree(HostMemory host) {
        begin(Call.MEM_FREE_HOST, true);
        if (hostMemory.remove(host.address()) == null) {
            fail(
                    Call.MEM_FREE_HOST,
                    CudaErrors.INVALID_VALUE,
                    hex(host.address()) + " is not allocated, or was freed before");
        }
        account(-host.size());
        record(Call.MEM_FREE_HOST, null, host.address());
    }

    @Override
    public synchronized void memsetD8(long address, byte value, long count) {
        begin(Call.MEMSET_D8, true);
        requireDevice(Call.MEMSET_D8, address, count);
        record(Call.MEMSET_D8, null, address, value, count);
    }

    @Override
    public synchronized void memsetD32(long address, int value, long count) {
        begin(Call.MEMSET_D32, true);
        requireDevice(Call.MEMSET_D32, address, 4 * count);
        record(Call.MEMSET_D32, null, address, value, count);
    }

    @Override
    public synchronized void memsetD8Async(long address, byte value, long count, long stream) {
        begin(Call.MEMSET_D8_ASYNC, true);
        requireDevice(Call.MEMSET_D8_ASYNC, address, count);
        enqueue(Call.MEMSET_D8_ASYNC, stream);
        record(Call.MEMSET_D8_ASYNC, null, address, value, count, stream);
    }

    @Override
    public synchronized void memsetD32Async(long address, int value, long count, long stream) {
        begin(Call.MEMSET_D32_ASYNC, true);
        requireDevice(Call.MEMSET_D32_ASYNC, address, 4 * count);
        enqueue(Call.MEMSET_D32_ASYNC, stream);
        record(Call.MEMSET_D32_ASYNC, null, address, value, count, stream);
    }

    @Override
    public synchronized void memcpyHtoD(long to, ByteBuffer from) {
        begin(Call.MEMCPY_H_TO_D, true);
        requireDirect(from);
        requireDevice(Call.MEMCPY_H_TO_D, to, from.remaining());
        record(Call.MEMCPY_H_TO_D, null, to, (long) from.remaining());
    }

    @Override
    public synchronized void memcpyDtoH(ByteBuffer to, long from) {
        begin(Call.MEMCPY_D_TO_H, true);
        if (to.isReadOnly()) {
            throw new IllegalArgumentException("the target buffer is read-only");
        }
        requireDirect(to);
        requireDevice(Call.MEMCPY_D_TO_H, from, to.remaining());
        for (int i = to.position(); i < to.limit(); i++) {
            to.put(i, (byte) 0);
        }
        record(Call.MEMCPY_D_TO_H, null, (long) to.remaining(), from);
    }

    @Override
    public synchronized void memcpyDtoD(long to, long from, long bytes) {
        begin(Call.MEMCPY_D_TO_D, true);
        requireDevice(Call.MEMCPY_D_TO_D, to, bytes);
        requireDevice(Call.MEMCPY_D_TO_D, from, bytes);
        record(Call.MEMCPY_D_TO_D, null, to, from, bytes);
    }

    @Override
    public synchronized void memcpyHtoDAsync(
            long to, HostMemory from, long fromOffset, long bytes, long stream) {
        begin(Call.MEMCPY_H_TO_D_ASYNC, true);
        from.checkRange(fromOffset, bytes);
        requireHost(Call.MEMCPY_H_TO_D_ASYNC, from);
        requireDevice(Call.MEMCPY_H_TO_D_ASYNC, to, bytes);
        enqueue(Call.MEMCPY_H_TO_D_ASYNC, stream);
        record(Call.MEMCPY_H_TO_D_ASYNC, null, to, from.address() + fromOffset, bytes, stream);
    }

    @Override
    public synchronized void memcpyDtoHAsync(
            HostMemory to, long toOffset, long from, long bytes, long stream) {
        begin(Call.MEMCPY_D_TO_H_ASYNC, true);
        to.checkRange(toOffset, bytes);
        requireHost(Call.MEMCPY_D_TO_H_ASYNC, to);
        requireDevice(Call.MEMCPY_D_TO_H_ASYNC, from, bytes);
        enqueue(Call.MEMCPY_D_TO_H_ASYNC, stream);
        record(Call.MEMCPY_D_TO_H_ASYNC, null, to.address() + toOffset, from, bytes, stream);
    }

    @Override
    public synchronized void memcpyDtoDAsync(long to, long from, long bytes, long stream) {
        begin(Call.MEMCPY_D_TO_D_ASYNC, true);
        requireDevice(Call.MEMCPY_D_TO_D_ASYNC, to, bytes);
        requireDevice(Call.MEMCPY_D_TO_D_ASYNC, from, bytes);
        enqueue(Call.MEMCPY_D_TO_D_ASYNC, stream);
        record(Call.MEMCPY_D_TO_D_ASYNC, null, to, from, bytes, stream);
    }

    // ------------------------------------------------------------------ streams

    @Override
    public synchronized long streamCreate() {
        begin(Call.STREAM_CREATE, true);
        long stream = newHandle(Kind.STREAM, "stream");
        handles.get(stream).context = contexts.get().peek();
        return result(Call.STREAM_CREATE, stream);
    }

    @Override
    public synchronized void streamDestroy(long stream) {
        begin(Call.STREAM_DESTROY, true);
        destroy(Call.STREAM_DESTROY, Kind.STREAM, stream);
    }

    @Override
    public synchronized void streamSynchronize(long stream) {
        begin(Call.STREAM_SYNCHRONIZE, true);
        requireIdle(Call.STREAM_SYNCHRONIZE, stream);
        record(Call.STREAM_SYNCHRONIZE, null, stream);
    }

    @Override
    public synchronized boolean streamQuery(long stream) {
        begin(Call.STREAM_QUERY, true);
        requireIdle(Call.STREAM_QUERY, stream);
        return result(Call.STREAM_QUERY, true, stream);
    }

    @Override
    public synchronized void streamWaitEvent(long stream, long event) {
        begin(Call.STREAM_WAIT_EVENT, true);
        Handle mark = require(Call.STREAM_WAIT_EVENT, Kind.EVENT, event);
        Capture capture = captures.get(stream);
        if (mark.capture != null && captures.containsValue(mark.capture)) {
            if (capture == null) {
                // the stream forks from the capture the event was recorded in
                captures.put(stream, mark.capture);
                stream(stream).enqueued = 0;
                mark.capture.joinedUpTo.putIfAbsent(stream, 0);
            } else if (stream == mark.capture.origin) {
                mark.capture.joinedUpTo.merge(mark.stream, mark.position, Math::max);
            }
        } else if (capture != null && mark.stream != 0) {
            capture.broken = true;
            fail(Call.STREAM_WAIT_EVENT, 905, "event " + hex(event));
        }
        enqueue(Call.STREAM_WAIT_EVENT, stream);
        record(Call.STREAM_WAIT_EVENT, null, stream, event);
    }

    @Override
    public synchronized boolean streamIsCapturing(long stream) {
        begin(Call.STREAM_IS_CAPTURING, true);
        stream(stream);
        return result(Call.STREAM_IS_CAPTURING, captures.containsKey(stream), stream);
    }

    @Override
    public synchronized void streamBeginCapture(long stream) {
        begin(Call.STREAM_BEGIN_CAPTURE, true);
        if (stream == 0 || captures.containsKey(stream)) {
            fail(Call.STREAM_BEGIN_CAPTURE, CudaErrors.STREAM_CAPTURE_UNSUPPORTED, hex(stream));
        }
        require(Call.STREAM_BEGIN_CAPTURE, Kind.STREAM, stream).enqueued = 0;
        captures.put(stream, new Capture(stream, Thread.currentThread()));
        record(Call.STREAM_BEGIN_CAPTURE, null, stream);
    }

    @Override
    public synchronized long streamEndCapture(long stream) {
        begin(Call.STREAM_END_CAPTURE, true);
        Capture capture = captures.get(stream);
        if (capture == null) {
            fail(Call.STREAM_END_CAPTURE, 401, hex(stream) + " is not capturing");
        }
        if (capture.origin != stream) {
            fail(Call.STREAM_END_CAPTURE, CudaErrors.STREAM_CAPTURE_UNMATCHED, hex(stream));
        }
        if (capture.thread != Thread.currentThread()) {
            fail(Call.STREAM_END_CAPTURE, CudaErrors.STREAM_CAPTURE_WRONG_THREAD, hex(stream));
        }
        boolean unjoined = false;
        for (Map.Entry<Long, Integer> fork : capture.joinedUpTo.entrySet()) {
            unjoined |= fork.getValue() < stream(fork.getKey()).enqueued;
        }
        captures.values().removeIf(running -> running == capture);
        if (capture.broken) {
            fail(Call.STREAM_END_CAPTURE, CudaErrors.STREAM_CAPTURE_INVALIDATED, hex(stream));
        }
        if (unjoined) {
            fail(Call.STREAM_END_CAPTURE, CudaErrors.STREAM_CAPTURE_UNJOINED, hex(stream));
        }
        long graph = newHandle(Kind.GRAPH, "graph");
        handles.get(graph).nodes = capture.nodes;
        return result(Call.STREAM_END_CAPTURE, graph, stream);
    }

    // ------------------------------------------------------------------ graphs

    @Override
    public synchronized Scope relaxCapture() {
        begin(Call.THREAD_EXCHANGE_CAPTURE_MODE, false);
        record(Call.THREAD_EXCHANGE_CAPTURE_MODE, null);
        relaxed.set(relaxed.get() + 1);
        return () -> relaxed.set(relaxed.get() - 1);
    }

    @Override
    public synchronized long graphInstantiate(long graph) {
        begin(Call.GRAPH_INSTANTIATE, true);
        Handle source = require(Call.GRAPH_INSTANTIATE, Kind.GRAPH, graph);
        long exec = newHandle(Kind.GRAPH_EXEC, "executable graph");
        handles.get(exec).nodes = source.nodes;
        return result(Call.GRAPH_INSTANTIATE, exec, graph);
    }

    @Override
    public synchronized void graphUpload(long graphExec, long stream) {
        begin(Call.GRAPH_UPLOAD, true);
        require(Call.GRAPH_UPLOAD, Kind.GRAPH_EXEC, graphExec);
        requireIdle(Call.GRAPH_UPLOAD, stream);
        record(Call.GRAPH_UPLOAD, null, graphExec, stream);
    }

    @Override
    public synchronized void graphLaunch(long graphExec, long stream) {
        if (quietly(Call.GRAPH_LAUNCH)) {
            return;
        }
        begin(Call.GRAPH_LAUNCH, true);
        require(Call.GRAPH_LAUNCH, Kind.GRAPH_EXEC, graphExec);
        enqueue(Call.GRAPH_LAUNCH, stream);
        record(Call.GRAPH_LAUNCH, null, graphExec, stream);
    }

    @Override
    public synchronized long graphNodeCount(long graph) {
        begin(Call.GRAPH_GET_NODES, true);
        int nodes = require(Call.GRAPH_GET_NODES, Kind.GRAPH, graph).nodes;
        return result(Call.GRAPH_GET_NODES, (long) nodes, graph);
    }

    @Override
    public synchronized void graphDestroy(long graph) {
        begin(Call.GRAPH_DESTROY, true);
        destroy(Call.GRAPH_DESTROY, Kind.GRAPH, graph);
    }

    @Override
    public synchronized void graphExecDestroy(long graphExec) {
        begin(Call.GRAPH_EXEC_DESTROY, true);
        destroy(Call.GRAPH_EXEC_DESTROY, Kind.GRAPH_EXEC, graphExec);
    }

    // ------------------------------------------------------------------ events

    @Override
    public synchronized long eventCreate(boolean timing) {
        begin(Call.EVENT_CREATE, true);
        long event = newHandle(Kind.EVENT, "event");
        handles.get(event).timing = timing;
        return result(Call.EVENT_CREATE, event, timing);
    }

    @Override
    public synchronized void eventDestroy(long event) {
        begin(Call.EVENT_DESTROY, true);
        destroy(Call.EVENT_DESTROY, Kind.EVENT, event);
    }

    @Override
    public synchronized void eventRecord(long event, long stream) {
        begin(Call.EVENT_RECORD, true);
        Handle mark = require(Call.EVENT_RECORD, Kind.EVENT, event);
        mark.capture = captures.get(stream);
        mark.stream = stream;
        mark.position = stream(stream).enqueued;
        record(Call.EVENT_RECORD, null, event, stream);
    }

    @Override
    public synchronized boolean eventQuery(long event) {
        begin(Call.EVENT_QUERY, true);
        requirePassed(Call.EVENT_QUERY, event);
        return result(Call.EVENT_QUERY, true, event);
    }

    @Override
    public synchronized void eventSynchronize(long event) {
        begin(Call.EVENT_SYNCHRONIZE, true);
        requirePassed(Call.EVENT_SYNCHRONIZE, event);
        record(Call.EVENT_SYNCHRONIZE, null, event);
    }

    @Override
    public synchronized float eventElapsedMs(long start, long end) {
        begin(Call.EVENT_ELAPSED_TIME, true);
        if (!require(Call.EVENT_ELAPSED_TIME, Kind.EVENT, start).timing
                || !require(Call.EVENT_ELAPSED_TIME, Kind.EVENT, end).timing) {
            fail(Call.EVENT_ELAPSED_TIME, CudaErrors.INVALID_HANDLE, "an event has no timing");
        }
        return result(Call.EVENT_ELAPSED_TIME, 0.001f, start, end);
    }

    // ------------------------------------------------------------------ kernels

    @Override
    public synchronized long moduleLoad(byte[] image) {
        begin(Call.MODULE_LOAD_DATA, true);
        if (image.length == 0) {
            fail(Call.MODULE_LOAD_DATA, 200, "0 bytes");
        }
        return result(Call.MODULE_LOAD_DATA, newHandle(Kind.MODULE, "module"), (long) image.length);
    }

    @Override
    public synchronized void moduleUnload(long module) {
        begin(Call.MODULE_UNLOAD, true);
        destroy(Call.MODULE_UNLOAD, Kind.MODULE, module);
        handles.values().removeIf(h -> h.kind == Kind.FUNCTION && h.module == module);
    }

    @Override
    public synchronized long moduleGetFunction(long module, String name) {
        begin(Call.MODULE_GET_FUNCTION, true);
        require(Call.MODULE_GET_FUNCTION, Kind.MODULE, module);
        for (Map.Entry<Long, Handle> known : handles.entrySet()) {
            Handle handle = known.getValue();
            if (handle.kind == Kind.FUNCTION
                    && handle.module == module
                    && handle.name.equals(name)) {
                return result(Call.MODULE_GET_FUNCTION, known.getKey(), module, name);
            }
        }
        long function = newHandle(Kind.FUNCTION, name);
        handles.get(function).module = module;
        return result(Call.MODULE_GET_FUNCTION, function, module, name);
    }

    @Override
    public synchronized int funcGetAttribute(long function, FuncAttribute attribute) {
        begin(Call.FUNC_GET_ATTRIBUTE, true);
        Handle kernel = require(Call.FUNC_GET_ATTRIBUTE, Kind.FUNCTION, function);
        int standard =
                switch (attribute) {
                    case MAX_THREADS_PER_BLOCK -> 1024;
                    case MAX_DYNAMIC_SHARED_BYTES -> 48 << 10;
                    case REGISTERS -> 64;
                    case PTX_VERSION, BINARY_VERSION -> 90;
                    default -> 0;
                };
        int value = kernel.attributes.getOrDefault(attribute, standard);
        return result(Call.FUNC_GET_ATTRIBUTE, value, function, attribute);
    }

    @Override
    public synchronized void funcSetAttribute(long function, FuncAttribute attribute, int value) {
        begin(Call.FUNC_SET_ATTRIBUTE, true);
        Handle kernel = require(Call.FUNC_SET_ATTRIBUTE, Kind.FUNCTION, function);
        if (attribute == FuncAttribute.MAX_DYNAMIC_SHARED_BYTES
                && value > attributes.get(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)) {
            fail(Call.FUNC_SET_ATTRIBUTE, CudaErrors.INVALID_VALUE, attribute + "=" + value);
        }
        kernel.attributes.put(attribute, value);
        record(Call.FUNC_SET_ATTRIBUTE, null, function, attribute, value);
    }

    @Override
    public synchronized int occupancyMaxActiveBlocks(
            long function, int blockThreads, long dynamicSharedBytes) {
        begin(Call.OCCUPANCY, true);
        require(Call.OCCUPANCY, Kind.FUNCTION, function);
        int perSm = attributes.get(DeviceAttribute.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
        long byShared = perSm / Math.max(1024, dynamicSharedBytes + 1024);
        int byThreads = 2048 / Math.max(1, blockThreads);
        int blocks = (int) Math.min(Math.min(32, byThreads), byShared);
        return result(Call.OCCUPANCY, blocks, function, blockThreads, dynamicSharedBytes);
    }

    @Override
    public synchronized void launchKernel(
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
        if (quietly(Call.LAUNCH_KERNEL)) {
            return;
        }
        launch(
                Call.LAUNCH_KERNEL,
                function,
                new int[] {gridX, gridY, gridZ, blockX, blockY, blockZ, dynamicSharedBytes},
                stream,
                params);
    }

    @Override
    public PdlSupport pdlSupport() {
        return new PdlSupport(true, "recorded");
    }

    @Override
    public synchronized void launchKernelPdl(
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
        if (quietly(Call.LAUNCH_KERNEL_EX)) {
            return;
        }
        launch(
                Call.LAUNCH_KERNEL_EX,
                function,
                new int[] {gridX, gridY, gridZ, blockX, blockY, blockZ, dynamicSharedBytes},
                stream,
                params);
    }

    private void launch(Call call, long function, int[] shape, long stream, KernelParams params) {
        begin(call, true);
        Handle kernel = require(call, Kind.FUNCTION, function);
        for (int i = 0; i < 6; i++) {
            if (shape[i] < 1 || (i > 0 && i < 3 && shape[i] > 65_535)) {
                fail(call, CudaErrors.INVALID_VALUE, kernel.name + ", " + Arrays.toString(shape));
            }
        }
        int allowed =
                kernel.attributes.getOrDefault(FuncAttribute.MAX_DYNAMIC_SHARED_BYTES, 48 << 10);
        if ((long) shape[3] * shape[4] * shape[5] > 1024 || shape[6] > allowed) {
            fail(call, CudaErrors.INVALID_VALUE, kernel.name + ", " + Arrays.toString(shape));
        }
        Long block = hostMemory.floorKey(params.tableAddress());
        if (block == null || params.tableAddress() >= block + hostMemory.get(block).size()) {
            fail(call, CudaErrors.INVALID_VALUE, kernel.name + ": its arguments were freed");
        }
        enqueue(call, stream);
        byte[] bytes = params.snapshot();
        launches.add(
                new Launch(
                        kernel.name,
                        shape[0],
                        shape[1],
                        shape[2],
                        shape[3],
                        shape[4],
                        shape[5],
                        shape[6],
                        stream,
                        bytes,
                        call == Call.LAUNCH_KERNEL_EX));
        record(
                call,
                null,
                kernel.name,
                shape[0],
                shape[1],
                shape[2],
                shape[3],
                shape[4],
                shape[5],
                shape[6],
                stream,
                bytes);
    }

    // ------------------------------------------------------------------ other processes

    @Override
    public synchronized byte[] ipcGetMemHandle(long address) {
        begin(Call.IPC_GET_MEM_HANDLE, true);
        Long bytes = memory.get(address);
        if (bytes == null) {
            fail(Call.IPC_GET_MEM_HANDLE, CudaErrors.INVALID_VALUE, hex(address));
        }
        byte[] handle = new byte[64];
        ByteBuffer.wrap(handle).putLong(address).putLong(bytes);
        record(Call.IPC_GET_MEM_HANDLE, null, address);
        return handle;
    }

    @Override
    public synchronized long ipcOpenMemHandle(byte[] handle) {
        begin(Call.IPC_OPEN_MEM_HANDLE, true);
        if (handle.length != 64) {
            throw new IllegalArgumentException("an IPC handle has 64 bytes, not " + handle.length);
        }
        long bytes = ByteBuffer.wrap(handle).getLong(8);
        long address = newAddress(bytes);
        imported.put(address, bytes);
        return result(Call.IPC_OPEN_MEM_HANDLE, address);
    }

    @Override
    public synchronized void ipcCloseMemHandle(long address) {
        begin(Call.IPC_CLOSE_MEM_HANDLE, true);
        if (imported.remove(address) == null) {
            fail(Call.IPC_CLOSE_MEM_HANDLE, CudaErrors.INVALID_VALUE, hex(address));
        }
        record(Call.IPC_CLOSE_MEM_HANDLE, null, address);
    }

    // ------------------------------------------------------------------ the rules

    /** What every call checks first: injected errors, the context, and the capture. */
    private void begin(Call call, boolean needsContext) {
        if (quiet == Thread.currentThread()) {
            throw new IllegalStateException(call.symbol() + " was called in a quiet stretch");
        }
        int count = made.merge(call, 1, Integer::sum);
        Integer code = injected.getOrDefault(call, Map.of()).get(count);
        if (code != null) {
            fail(call, code, "injected");
        }
        if (needsContext && contexts.get().isEmpty()) {
            fail(call, CudaErrors.INVALID_CONTEXT, "");
        }
        if (needsContext && poisonCode != 0) {
            fail(call, poisonCode, "");
        }
        Capture capture = captureOfThread();
        if (capture != null && !call.legalInCapture() && relaxed.get() == 0) {
            capture.broken = true;
            fail(call, CudaErrors.STREAM_CAPTURE_UNSUPPORTED, "");
        }
    }

    private void beginDevice(Call call, int device) {
        begin(call, false);
        if (device < 0 || device >= devices) {
            fail(call, 101, "device " + device);
        }
    }

    /** Adds a node to the capture of a stream, if there is one. */
    private void enqueue(Call call, long stream) {
        Capture capture = captures.get(stream);
        Handle handle = stream(stream);
        if (capture == null) {
            return;
        }
        if (capture.broken) {
            fail(call, CudaErrors.STREAM_CAPTURE_INVALIDATED, hex(stream));
        }
        handle.enqueued++;
        if (call != Call.STREAM_WAIT_EVENT) {
            capture.nodes++;
        }
    }

    private Capture captureOfThread() {
        for (Capture capture : captures.values()) {
            if (capture.thread == Thread.currentThread()) {
                return capture;
            }
        }
        return null;
    }

    private Handle stream(long stream) {
        if (stream == 0) {
            return new Handle(Kind.STREAM, "legacy default stream");
        }
        Handle handle = require(Call.STREAM_QUERY, Kind.STREAM, stream);
        if (handle.context != 0 && handle.context != contexts.get().peek()) {
            fail(
                    Call.STREAM_QUERY,
                    CudaErrors.INVALID_HANDLE,
                    hex(stream) + " is a stream of context " + hex(handle.context));
        }
        return handle;
    }

    private void requireIdle(Call call, long stream) {
        stream(stream);
        Capture capture = captures.get(stream);
        if (capture != null) {
            capture.broken = true;
            fail(call, CudaErrors.STREAM_CAPTURE_UNSUPPORTED, hex(stream));
        }
    }

    private void requirePassed(Call call, long event) {
        Handle mark = require(call, Kind.EVENT, event);
        if (mark.capture != null) {
            fail(call, 907, hex(event));
        }
    }

    private void requireDevice(Call call, long address, long bytes) {
        for (TreeMap<Long, Long> owned : List.of(memory, foreign, imported)) {
            Map.Entry<Long, Long> block = owned.floorEntry(address);
            if (block != null && address + bytes <= block.getKey() + block.getValue()) {
                return;
            }
        }
        Map.Entry<Long, HostMemory> mapped = hostMemory.floorEntry(address);
        if (mapped != null && address + bytes <= mapped.getKey() + mapped.getValue().size()) {
            return;
        }
        fail(
                call,
                CudaErrors.INVALID_VALUE,
                bytes + " bytes at " + hex(address) + " are not inside one allocation");
    }

    private void requireHost(Call call, HostMemory host) {
        if (!hostMemory.containsKey(host.address())) {
            fail(call, CudaErrors.INVALID_VALUE, "the host memory was freed");
        }
    }

    private static void requireDirect(ByteBuffer buffer) {
        if (!buffer.isDirect()) {
            throw new IllegalArgumentException(
                    "a heap buffer cannot be copied: use a direct, mapped or page-locked one");
        }
    }

    private Handle require(Call call, Kind kind, long at) {
        Handle handle = handles.get(at);
        if (handle == null || handle.kind != kind) {
            fail(call, CudaErrors.INVALID_HANDLE, hex(at) + " is no " + kind);
        }
        return handle;
    }

    private void destroy(Call call, Kind kind, long at) {
        require(call, kind, at);
        handles.remove(at);
        record(call, null, at);
    }

    private long newHandle(Kind kind, String name) {
        long handle = nextHandle;
        nextHandle += HANDLE_STEP;
        handles.put(handle, new Handle(kind, name));
        return handle;
    }

    private long newAddress(long bytes) {
        long address = nextAddress;
        // why: one step more than needed, so that one past an allocation is never another one
        nextAddress += alignUp(bytes) + ADDRESS_ALIGNMENT;
        return address;
    }

    private static long alignUp(long bytes) {
        return (bytes + ADDRESS_ALIGNMENT - 1) / ADDRESS_ALIGNMENT * ADDRESS_ALIGNMENT;
    }

    private void account(long bytes) {
        allocatedBytes += bytes;
        peakBytes = Math.max(peakBytes, allocatedBytes);
    }

    private <T> T result(Call call, T value, Object... arguments) {
        record(call, value, arguments);
        return value;
    }

    private void record(Call call, Object result, Object... arguments) {
        boolean inCapture = captureOfThread() != null && relaxed.get() == 0;
        calls.add(new Recorded(call, List.of(arguments), result, inCapture));
    }

    private static void fail(Call call, int code, String detail) {
        throw new CudaException(call, code, detail);
    }

    private static String hex(long value) {
        return "0x" + Long.toHexString(value);
    }

    private static String show(Object value) {
        if (value instanceof Long number && number > 0xffff_ffffL) {
            return hex(number);
        }
        return value instanceof byte[] bytes ? bytes.length + " B" : String.valueOf(value);
    }
}
