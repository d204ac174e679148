package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.ImportedBuffer;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.cuda.layout.Region;
import io.moe4j.ep.Group;
import io.moe4j.ep.GroupException;
import io.moe4j.model.WeightMatrix;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.security.SecureRandom;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.zip.CRC32;

/**
 * What one layer of a group shares with the other ranks: its symmetric regions, mapped to them, and
 * theirs, mapped here. Lives as long as its layer; the regions themselves stay until every rank has
 * closed the layer, because a rank that is not through yet may still write to them.
 */
final class PeerMemory implements AutoCloseable {
    /** Tells the ranks of this process from others, also where process numbers repeat. */
    private static final UUID PROCESS = UUID.randomUUID();

    /** Meetings that what an earlier one left behind may spoil. */
    private static final int RECOVERY_ATTEMPTS = 8;

    private static final System.Logger LOG = System.getLogger("io.moe4j");
    private static final byte OK = 0;
    private static final byte FAILED = 1;

    private final Context context;
    private final MoeConfig config;
    private final DeviceLayout layout;
    private final Group group;

    /** why of its own: it is released with the regions, maybe long after the layer. */
    private final Context regionContext;

    private final List<DeviceBuffer> regions = new ArrayList<>();
    private final List<ImportedBuffer> mapped = new ArrayList<>();
    private final UUID[] processes;
    private String name = "";
    private long seed;
    private boolean closed;

    /** Ranks of the group on this rank's GPU, itself included. */
    private int sharing = 1;

    private LineTest lineTest;

    /** Why rows do not travel in lines although they might; empty if they do. */
    private String brokenLines = "";

    /** Address of each handle's region on each rank, as this GPU has it. */
    private long[][] addresses;

    private List<byte[]> told;

    PeerMemory(Context context, MoeConfig config, DeviceLayout layout) {
        this.context = context;
        this.config = config;
        this.layout = layout;
        this.group = config.group();
        this.processes = new UUID[config.ranks()];
        this.regionContext =
                context.isPrimary()
                        ? new Context(context.driver(), context.device())
                        : Context.ofEngine(context.driver(), context.handle());
    }

    // ------------------------------------------------------------------ meetings

    /**
     * A meeting at which every rank says how it went: one that failed comes too, so that the others
     * hear why and none waits for its limit.
     */
    void meet(String what, Supplier<byte[]> mine, Consumer<List<byte[]>> then) {
        byte[] said;
        Throwable failure = null;
        try {
            said = mine.get();
        } catch (RuntimeException | Error e) {
            failure = e;
            said = String.valueOf(e.getMessage()).getBytes(StandardCharsets.UTF_8);
        }
        byte[] frame = new byte[1 + said.length];
        frame[0] = failure == null ? OK : FAILED;
        System.arraycopy(said, 0, frame, 1, said.length);
        List<byte[]> all;
        try {
            all = group.exchange(what + name, frame);
        } catch (RuntimeException e) {
            if (failure != null) {
                failure.addSuppressed(e);
                throw rethrown(failure);
            }
            throw e;
        }
        if (failure != null) {
            throw rethrown(failure);
        }
        List<byte[]> bytes = new ArrayList<>();
        for (int rank = 0; rank < all.size(); rank++) {
            byte[] theirs = all.get(rank);
            if (theirs.length == 0 || theirs[0] != OK) {
                String why =
                        theirs.length == 0
                                ? "no reason given"
                                : new String(theirs, 1, theirs.length - 1, StandardCharsets.UTF_8);
                throw new GroupException(
                        "rank "
                                + rank
                                + " failed while the layer was prepared, at "
                                + what
                                + ": "
                                + why,
                        Set.of(rank));
            }
            bytes.add(Arrays.copyOfRange(theirs, 1, theirs.length));
        }
        then.accept(bytes);
    }

    private static RuntimeException rethrown(Throwable failure) {
        if (failure instanceof Error error) {
            throw error;
        }
        return (RuntimeException) failure;
    }

    /**
     * Finds out whether all ranks open the same layer, on GPUs that let them wait for each other.
     */
    void agree(String kernels) {
        meet("configuration", () -> greeting(kernels), this::compare);
    }

    private byte[] greeting(String kernels) {
        seed = new SecureRandom().nextLong();
        String fields = fields(kernels);
        byte[] text = fields.getBytes(StandardCharsets.UTF_8);
        byte[] gpu = gpu().getBytes(StandardCharsets.UTF_8);
        return ByteBuffer.allocate(32 + 32 + 4 + gpu.length + text.length)
                .putLong(PROCESS.getMostSignificantBits())
                .putLong(PROCESS.getLeastSignificantBits())
                .putLong(seed)
                .putLong(context.handle())
                .put(hash(text))
                .putInt(gpu.length)
                .put(gpu)
                .put(text)
                .array();
    }

    private String gpu() {
        return context.driver().devicePciBusId(context.device());
    }

    private static byte[] hash(byte[] text) {
        return sha256().digest(text);
    }

    private static MessageDigest sha256() {
        try {
            return MessageDigest.getInstance("SHA-256");
        } catch (NoSuchAlgorithmException e) {
            throw new IllegalStateException(e);
        }
    }

    /** What has to be the same on all ranks, as lines {@code name=value}. */
    private String fields(String kernels) {
        Map<String, Object> fields = new LinkedHashMap<>();
        fields.put("maxTokensPerRank", config.maxTokensPerRank());
        fields.put("wire", DeviceLayout.usesLines(config) ? "lines" : "rows");
        fields.put("shape", config.shape());
        fields.put("handles", config.handles());
        fields.put("activation", config.activation());
        fields.put("expertBias", config.expertBias());
        fields.put("sharedExpert", config.usesSharedExpert());
        fields.put("routingInput", config.routingInput());
        fields.put("rule", config.routingInput() == RoutingInput.TOPK ? "none" : config.rule());
        fields.put("stepTimeout", config.stepTimeout());
        fields.put("firstStepTimeout", config.firstStepTimeout());
        fields.put("router weights", routerChecksum());
        fields.put("kernels", kernels);
        StringBuilder offsets = new StringBuilder();
        for (Region.Field field : layout.symmetric().fields()) {
            offsets.append(field.name()).append('@').append(field.offset()).append(' ');
        }
        fields.put("symmetric region", offsets.toString().trim());
        StringBuilder text = new StringBuilder();
        fields.forEach((name, value) -> text.append(name).append('=').append(value).append('\n'));
        return text.toString();
    }

    /** why: layers of equal sizes in another order would exchange rows of different layers. */
    private String routerChecksum() {
        WeightMatrix router = config.weights().router();
        if (router == null) {
            return "none";
        }
        float[] values = new float[Math.multiplyExact(router.rows(), router.cols())];
        router.read(values);
        ByteBuffer bytes = ByteBuffer.allocate(Math.multiplyExact(values.length, 4));
        bytes.asFloatBuffer().put(values);
        CRC32 crc = new CRC32();
        crc.update(bytes);
        return String.format("crc %08x", crc.getValue());
    }

    private void compare(List<byte[]> all) {
        byte[][] texts = new byte[all.size()][];
        String[] gpus = new String[all.size()];
        long[] seeds = new long[all.size()];
        long[] contexts = new long[all.size()];
        byte[] mine = null;
        for (int rank = 0; rank < all.size(); rank++) {
            ByteBuffer from = ByteBuffer.wrap(all.get(rank));
            processes[rank] = new UUID(from.getLong(), from.getLong());
            seeds[rank] = from.getLong();
            contexts[rank] = from.getLong();
            byte[] hash = new byte[32];
            from.get(hash);
            byte[] gpu = new byte[from.getInt()];
            from.get(gpu);
            gpus[rank] = new String(gpu, StandardCharsets.UTF_8);
            texts[rank] = new byte[from.remaining()];
            from.get(texts[rank]);
            if (rank == group.rank()) {
                mine = hash;
            }
        }
        for (int rank = 0; rank < all.size(); rank++) {
            if (!MessageDigest.isEqual(mine, hash(texts[rank]))) {
                throw difference(rank, lines(texts[rank]), lines(texts[group.rank()]));
            }
            for (int other = 0; other < rank; other++) {
                if (gpus[rank].equals(gpus[other])) {
                    requireTogether(other, rank, gpus[rank], contexts);
                }
            }
            sharing += rank != group.rank() && gpus[rank].equals(gpus[group.rank()]) ? 1 : 0;
        }
        seed = seeds[0];
        name = String.format(" of layer %016x", seed);
    }

    /**
     * Ranks that share a GPU wait for each other, so their kernels have to run side by side. Those
     * of two processes, or of two contexts, take turns.
     */
    private void requireTogether(int first, int second, String gpu, long[] contexts) {
        boolean processes = !this.processes[first].equals(this.processes[second]);
        if (processes || contexts[first] != contexts[second]) {
            throw new IllegalArgumentException(
                    "ranks "
                            + first
                            + " and "
                            + second
                            + " are both on GPU "
                            + gpu
                            + " but in two "
                            + (processes ? "processes" : "contexts")
                            + ": ranks that share a GPU wait for each other, give each its own with"
                            + " device(...) or CUDA_VISIBLE_DEVICES, or open both in one process and"
                            + " context");
        }
    }

    /** Ranks of the group on this rank's GPU, itself included; known once they agree. */
    int sharing() {
        return sharing;
    }

    private static Map<String, String> lines(byte[] text) {
        Map<String, String> fields = new LinkedHashMap<>();
        new String(text, StandardCharsets.UTF_8)
                .lines()
                .forEach(
                        line -> {
                            int at = Math.max(0, line.indexOf('='));
                            fields.put(line.substring(0, at), line.substring(at));
                        });
        return fields;
    }

    private IllegalArgumentException difference(
            int rank, Map<String, String> theirs, Map<String, String> mine) {
        for (Map.Entry<String, String> field : mine.entrySet()) {
            if (!field.getValue().equals(theirs.get(field.getKey()))) {
                return new IllegalArgumentException(
                        field.getKey()
                                + field.getValue()
                                + " on rank "
                                + group.rank()
                                + " but "
                                + field.getKey()
                                + theirs.getOrDefault(field.getKey(), " is missing")
                                + " on rank "
                                + rank
                                + ": open the same layer on all ranks");
            }
        }
        return new IllegalArgumentException(
                "rank " + rank + " runs another version of this library than rank " + group.rank());
    }

    // ------------------------------------------------------------------ memory

    /** The symmetric region of the next handle. */
    long allocate() {
        DeviceBuffer region = new DeviceBuffer(regionContext, layout.symmetricBytes());
        regions.add(region);
        return region.address();
    }

    /** What others need to reach this rank's regions; from now on they may be written to. */
    byte[] export() {
        boolean others = false;
        for (UUID process : processes) {
            others |= !process.equals(PROCESS);
        }
        ByteBuffer bytes = ByteBuffer.allocate(8 + regions.size() * (8 + 64));
        bytes.putLong(context.handle());
        try (Scope scope = context.enter()) {
            for (DeviceBuffer region : regions) {
                bytes.putLong(region.address());
                bytes.put(
                        others ? context.driver().ipcGetMemHandle(region.address()) : new byte[64]);
            }
        }
        return bytes.array();
    }

    void addresses(List<byte[]> all) {
        told = all;
    }

    /** Maps the regions of all ranks and writes this rank's tile of the self-test to each. */
    byte[] connect(CudaHandle[] handles, LoadedKernels kernels) {
        addresses = new long[handles.length][config.ranks()];
        try (Scope scope = context.enter()) {
            for (int rank = 0; rank < config.ranks(); rank++) {
                map(rank, ByteBuffer.wrap(told.get(rank)));
            }
        }
        told = null; // why: handles are capabilities
        for (int handle = 0; handle < handles.length; handle++) {
            handles[handle].connect(addresses[handle]);
        }
        try (Fill fill = new Fill(kernels)) {
            for (int handle = 0; handle < handles.length; handle++) {
                for (int rank = 0; rank < config.ranks(); rank++) {
                    fill.write(
                            addresses[handle][rank] + layout.selfTestOffset(group.rank()),
                            seedOf(group.rank(), rank, handle));
                }
            }
            fill.finish();
        }
        return new byte[0];
    }

    /** Where this GPU has the symmetric region of a rank. */
    long address(int handle, int rank) {
        return addresses[handle][rank];
    }

    /**
     * Meets the members of a new generation. Twice: the second time every rank shows whom it heard
     * the first time, so that what a failed meeting left behind is not taken for an answer. If it
     * was, all see it, and begin again.
     *
     * @param valid by handle: the last valid step of this rank; afterwards that of all members
     * @return the newest generation that any of them is in
     */
    int agreeOnGeneration(int generation, Set<Integer> members, long[] valid) {
        ByteBuffer mine = ByteBuffer.allocate(20 + 8 * valid.length);
        for (int attempt = 0; attempt < RECOVERY_ATTEMPTS; attempt++) {
            mine.clear();
            mine.putLong(new SecureRandom().nextLong());
            mine.putLong(maskOf(members)).putInt(generation);
            for (long epoch : valid) {
                mine.putLong(epoch);
            }
            List<byte[]> all = group.meet("recovery" + name, mine.array(), members);
            if (heardTheSame(all, members)) {
                return newest(all, members, valid);
            }
        }
        throw new GroupException(
                "rank " + group.rank() + ": the ranks do not agree on a recovery: call it again",
                Set.of());
    }

    static long maskOf(Set<Integer> ranks) {
        return ranks.stream().mapToLong(rank -> 1L << rank).reduce(0L, (a, b) -> a | b);
    }

    private boolean heardTheSame(List<byte[]> all, Set<Integer> members) {
        MessageDigest heard = sha256();
        for (int rank : new TreeSet<>(members)) {
            heard.update(all.get(rank));
        }
        byte[] digest = heard.digest();
        List<byte[]> digests = group.meet("end of recovery" + name, digest, members);
        return members.stream().allMatch(r -> MessageDigest.isEqual(digest, digests.get(r)));
    }

    private int newest(List<byte[]> all, Set<Integer> members, long[] valid) {
        int newest = 0;
        for (int rank : members) {
            ByteBuffer from = ByteBuffer.wrap(all.get(rank));
            from.getLong();
            long theirs = from.getLong();
            if (theirs != maskOf(members)) {
                throw new GroupException(
                        String.format(
                                "rank %d recovers with ranks %s but rank %d with %s: recover with the"
                                        + " same ranks everywhere",
                                rank, ranksOf(theirs), group.rank(), members),
                        Set.of(rank));
            }
            newest = Math.max(newest, from.getInt());
            for (int handle = 0; handle < valid.length; handle++) {
                valid[handle] = Math.min(valid[handle], from.getLong());
            }
        }
        return newest;
    }

    private static Set<Integer> ranksOf(long mask) {
        Set<Integer> ranks = new TreeSet<>();
        for (long left = mask; left != 0; left &= left - 1) {
            ranks.add(Long.numberOfTrailingZeros(left));
        }
        return ranks;
    }

    private void map(int rank, ByteBuffer from) {
        Driver driver = context.driver();
        long peerContext = from.getLong();
        boolean near = processes[rank].equals(PROCESS);
        if (near && rank != group.rank() && peerContext != context.handle()) {
            driver.contextEnablePeerAccess(peerContext);
        }
        for (int handle = 0; handle < addresses.length; handle++) {
            long address = from.getLong();
            byte[] key = new byte[64];
            from.get(key);
            if (!near) {
                ImportedBuffer imported = new ImportedBuffer(context, key);
                mapped.add(imported);
                address = imported.address();
            }
            addresses[handle][rank] = address;
        }
    }

    private long seedOf(int source, int destination, int handle) {
        return seed ^ ((source * 64L + destination) * 16L + handle) << 1;
    }

    /** Reads what every rank wrote here; names those whose tile did not come. */
    byte[] verify(LoadedKernels kernels) {
        List<Integer> wrong = new ArrayList<>();
        int bytes = DeviceLayout.SELF_TEST_BYTES;
        try (DeviceBuffer expected = new DeviceBuffer(context, bytes);
                Fill fill = new Fill(kernels);
                Scope scope = context.enter()) {
            ByteBuffer want = ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
            ByteBuffer got = ByteBuffer.allocateDirect(bytes).order(ByteOrder.LITTLE_ENDIAN);
            for (int rank = 0; rank < config.ranks(); rank++) {
                boolean right = true;
                for (int handle = 0; handle < addresses.length; handle++) {
                    fill.write(expected.address(), seedOf(rank, group.rank(), handle));
                    fill.finish();
                    context.driver().memcpyDtoH(want, expected.address());
                    context.driver()
                            .memcpyDtoH(
                                    got,
                                    regions.get(handle).address() + layout.selfTestOffset(rank));
                    right &= want.equals(got);
                }
                if (!right) {
                    wrong.add(rank);
                }
            }
        }
        if (!wrong.isEmpty()) {
            throw new IllegalStateException(
                    "what ranks "
                            + wrong
                            + " wrote did not arrive in the memory of rank "
                            + group.rank()
                            + " on GPU "
                            + gpu()
                            + ": look at nvidia-smi topo -p2p w, IOMMU and ACS settings");
        }
        return new byte[0];
    }

    /** As {@link #verify}; then everything is ready for {@link #tryLines}, on all ranks. */
    byte[] verifyForLines(LoadedKernels kernels) {
        verify(kernels);
        try (Scope scope = context.enter()) {
            // why: the test of lines reads them before anybody writes
            context.driver()
                    .memsetD8(
                            regions.get(0).address() + layout.selfTestOffset(0),
                            (byte) 0,
                            (long) config.ranks() * DeviceLayout.SELF_TEST_BYTES);
            context.driver().streamSynchronize(0L);
        }
        lineTest = new LineTest(context, config, kernels);
        return new byte[0];
    }

    /** Lines to all peers and from all peers, at the same time; tells what came of them. */
    byte[] tryLines(CudaHandle handle) {
        List<LineTest.Finding> findings = lineTest.run(handle, layout);
        closeLineTest();
        LOG.log(System.Logger.Level.DEBUG, "rank {0}: lines {1}", group.rank(), findings);
        ByteBuffer bytes = ByteBuffer.allocate(findings.size() * LineTest.Finding.BYTES);
        findings.forEach(finding -> finding.put(bytes));
        return bytes.array();
    }

    /** One rank that has not seen lines arrive whole speaks for all. */
    void judgeLines(List<byte[]> all) {
        for (int rank = 0; rank < all.size(); rank++) {
            ByteBuffer from = ByteBuffer.wrap(all.get(rank));
            while (from.hasRemaining() && brokenLines.isEmpty()) {
                LineTest.Finding finding = LineTest.Finding.get(from);
                if (!finding.good()) {
                    brokenLines =
                            String.format(
                                    "lines of rank %d do not arrive whole at rank %d (torn %d times"
                                            + " in %d changes, %d lines missing)",
                                    finding.source(),
                                    rank,
                                    finding.torn(),
                                    finding.epochs(),
                                    finding.missing());
                }
            }
        }
    }

    /** Why rows must not travel in lines, the same on all ranks; empty: they may. */
    String brokenLines() {
        return brokenLines;
    }

    private void closeLineTest() {
        if (lineTest != null) {
            lineTest.close();
            lineTest = null;
        }
    }

    /** Writes tiles of numbers by a kernel, as steps write rows. */
    private final class Fill implements AutoCloseable {
        private final LoadedKernels kernels;
        private final Stream stream = new Stream(context);
        private final ParamArena arena = new ParamArena(context);
        private final KernelParams params = arena.params(DeviceStructs.FILL_PARAMS.size());

        Fill(LoadedKernels kernels) {
            this.kernels = kernels;
        }

        void write(long to, long seed) {
            var writer = DeviceStructs.FILL_PARAMS.writer(params.bytes(0));
            writer.put("packed", to);
            writer.put("seed", seed);
            writer.put("experts", 1);
            writer.put("rows", DeviceLayout.TILE_ROWS);
            writer.put("cols", DeviceLayout.PAD);
            writer.put("row_tiles", 1);
            writer.put("column_blocks", 1);
            writer.put("gate_up", 0);
            writer.put("scale", 1f);
            try (Scope scope = context.enter()) {
                kernels.kernel("moe_fill_random")
                        .launch(context.driver(), 1, stream.handle(), params);
            }
        }

        void finish() {
            stream.synchronize();
        }

        @Override
        public void close() {
            arena.close();
            stream.close();
        }
    }

    /** Unmaps what others own; its own regions go when all ranks have come here. */
    @Override
    public void close() {
        if (closed) {
            return;
        }
        closed = true;
        RuntimeException failure = new RuntimeException("closing the memory of a group");
        try {
            closeLineTest();
        } catch (RuntimeException e) {
            failure.addSuppressed(e);
        }
        for (ImportedBuffer imported : mapped) {
            try {
                imported.close();
            } catch (RuntimeException e) {
                failure.addSuppressed(e);
            }
        }
        mapped.clear();
        // why by name: once ranks agree on a layer, any of them may know this one's addresses
        CompletableFuture<Void> through =
                name.isEmpty()
                        ? CompletableFuture.completedFuture(null)
                        : group.announce("closed" + name);
        through.thenRun(this::freeRegions);
        if (failure.getSuppressed().length > 0) {
            throw failure;
        }
    }

    private void freeRegions() {
        regions.forEach(DeviceBuffer::close);
        regionContext.close();
    }
}
