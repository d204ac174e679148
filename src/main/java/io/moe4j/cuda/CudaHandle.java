package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.Phase;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.PinnedBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.cuda.layout.Region;
import io.moe4j.ep.PeerStatistics;
import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;
import java.util.Set;
import java.util.function.LongSupplier;
import java.util.stream.LongStream;

/**
 * The buffers, flags and epochs of one step in flight: per rank a symmetric region and a workspace,
 * and one page of pinned memory that the device reports to. Owned by a layer; freed by close.
 */
final class CudaHandle implements AutoCloseable {
    private static final VarHandle INT =
            MethodHandles.byteBufferViewVarHandle(int[].class, ByteOrder.LITTLE_ENDIAN);
    private static final VarHandle LONG =
            MethodHandles.byteBufferViewVarHandle(long[].class, ByteOrder.LITTLE_ENDIAN);

    /** What later steps read of earlier ones. */
    private static final Set<String> LASTING =
            Set.of(
                    "dispatch_flags",
                    "combine_flags",
                    "abort_words",
                    "dispatch_lines",
                    "combine_lines",
                    "members",
                    "peer_totals",
                    "received_totals",
                    "epoch",
                    "arrivals",
                    "totals",
                    "work",
                    "expert_done");

    private final DeviceLayout layout;
    private final MoeConfig config;
    private final Context context;
    private final int firstLocalRank;
    private final int ranks;
    private final long[] symmetric;
    private final long[] workspace;
    private final Owned owned = new Owned();
    private DeviceBuffer rankViews;
    private PinnedBuffer pinned;

    /** What the next phase of this handle must be, and of which step; guarded by the layer. */
    Phase nextPhase = Phase.ROUTE;

    CudaStep stepInFlight;

    /**
     * Allocates and zeroes everything; frees what it got if a part fails.
     *
     * @param regions gives the memory of a symmetric region that others keep; null: the handle has
     *     it itself
     */
    CudaHandle(Context context, DeviceLayout layout, MoeConfig config, LongSupplier regions) {
        this.layout = layout;
        this.config = config;
        this.context = context;
        this.firstLocalRank = config.firstLocalRank();
        this.ranks = config.ranks();
        this.symmetric = new long[config.localRanks()];
        this.workspace = new long[config.localRanks()];
        try {
            allocate(regions);
        } catch (RuntimeException | Error e) {
            owned.close(e);
            throw e;
        }
    }

    private void allocate(LongSupplier regions) {
        for (int local = 0; local < symmetric.length; local++) {
            symmetric[local] =
                    regions != null
                            ? regions.getAsLong()
                            : owned.add(new DeviceBuffer(context, layout.symmetric().size()))
                                    .address();
            workspace[local] =
                    owned.add(new DeviceBuffer(context, layout.workspace().size())).address();
        }
        rankViews =
                owned.add(new DeviceBuffer(context, (long) ranks * DeviceStructs.RANK_VIEW.size()));
        pinned = owned.add(new PinnedBuffer(context, layout.pinned().size()));
        // why rank 0 alone in a group: the others are not connected yet
        clear(regions == null ? -1L >>> (Long.SIZE - ranks) : 1L);
        connect(symmetric);
    }

    /**
     * Zeroes everything that steps write; for the time when no step and no peer writes.
     *
     * @param members bit r: rank r takes part in the steps to come
     */
    void clear(long members) {
        for (int at = 0; at < pinned.size(); at += 8) {
            pinned.bytes().putLong(at, 0L);
        }
        try (Scope scope = context.enter()) {
            for (int local = 0; local < symmetric.length; local++) {
                context.driver().memsetD8(symmetric[local], (byte) 0, layout.symmetricBytes());
                context.driver().memsetD8(workspace[local], (byte) 0, layout.workspace().size());
            }
            setMembers(members);
            // why: fills may still be under way, and steps run on other streams
            context.driver().streamSynchronize(0L);
        }
    }

    /** Bit r: rank r of the group takes part in the steps of the local ranks. */
    private void setMembers(long members) {
        ByteBuffer word = ByteBuffer.allocateDirect(8).order(ByteOrder.nativeOrder());
        for (int local = 0; local < symmetric.length; local++) {
            context.driver()
                    .memcpyHtoD(
                            workspace(firstLocalRank + local, "members"), word.putLong(0, members));
        }
    }

    /**
     * Makes the next step the first after {@code epoch}, among {@code members}; for the time when
     * no step runs. Words that peers write stay as they are: one that was faster may have written
     * them already.
     */
    void begin(long epoch, long members) {
        ByteBuffer words = ByteBuffer.allocateDirect(16).order(ByteOrder.nativeOrder());
        words.putLong(0, epoch).putLong(8, epoch);
        ByteBuffer steps = ByteBuffer.allocateDirect(8).order(ByteOrder.nativeOrder());
        try (Scope scope = context.enter()) {
            for (int local = 0; local < symmetric.length; local++) {
                int rank = firstLocalRank + local;
                context.driver().memcpyHtoD(workspace(rank, "epoch"), words);
                // why: the step that failed may have counted itself; "steps" is the first total
                context.driver()
                        .memcpyHtoD(workspace(rank, "totals"), steps.putLong(0, steps(rank)));
                for (String counters : List.of("arrivals", "work", "expert_done")) {
                    context.driver()
                            .memsetD8(
                                    workspace(rank, counters),
                                    (byte) 0,
                                    layout.workspace().field(counters).bytes());
                }
            }
            setMembers(members);
            // why: fills may still be under way, and steps run on other streams
            context.driver().streamSynchronize(0L);
        }
        for (int local = 0; local < symmetric.length; local++) {
            clearFault(firstLocalRank + local);
        }
        nextPhase = Phase.ROUTE;
        stepInFlight = null;
    }

    /** What the device told of the step that failed goes with its fault. */
    private void clearFault(int rank) {
        int error = errorOffset(rank);
        long steps = steps(rank);
        LONG.setOpaque(
                pinned.bytes(),
                error + DeviceStructs.ERROR_RECORD.offset("valid_epoch"),
                validEpoch(rank));
        LONG.setOpaque(
                pinned.bytes(),
                countersOffset(rank) + DeviceStructs.SOFT_COUNTERS.offset("steps"),
                steps);
        INT.setRelease(pinned.bytes(), error + DeviceStructs.ERROR_RECORD.offset("code"), 0);
    }

    /**
     * The last step of a rank with a valid output; exact when the stream has ended. why not the
     * record's word: the kernel that combines tells of its step before the step can no longer fail.
     */
    long validEpoch(int rank) {
        long told = errorLong(rank, "valid_epoch");
        return errorCode(rank) == 0 ? told : Math.min(told, errorLong(rank, "epoch") - 1);
    }

    /** The steps of a rank with a valid output; exact when the stream has ended. */
    long steps(int rank) {
        long told = counter(rank, "steps");
        return validEpoch(rank) == errorLong(rank, "valid_epoch") ? told : told - 1;
    }

    /** What the device last told of a local rank and a peer. */
    PeerStatistics statistics(int handle, int rank, int peer) {
        return new PeerStatistics(
                handle,
                rank,
                peer,
                peerStat(rank, peer, "rows_received"),
                peerStat(rank, peer, "waited_ns"),
                peerStat(rank, peer, "waited_ns_combine"),
                peerStat(rank, peer, "waited_total_ns"),
                expertRows(rank, peer));
    }

    /** Tells the device where the symmetric regions of the first ranks are. */
    void connect(long[] regions) {
        ByteBuffer views =
                ByteBuffer.allocateDirect(regions.length * DeviceStructs.RANK_VIEW.size())
                        .order(ByteOrder.nativeOrder());
        for (int rank = 0; rank < regions.length; rank++) {
            views.position(rank * DeviceStructs.RANK_VIEW.size());
            DeviceStructs.RANK_VIEW.writer(views).put("symmetric", regions[rank]);
        }
        try (Scope scope = context.enter()) {
            context.driver().memcpyHtoD(rankViews.address(), views.rewind());
            context.driver().streamSynchronize(0L); // why: the copy may still be under way
        }
    }

    long rankViews() {
        return rankViews.address();
    }

    /** Device address of a local rank's symmetric region. */
    long region(int rank) {
        return symmetric[rank - firstLocalRank];
    }

    /** Device address of a workspace buffer; 0 if the layer has none. */
    long workspace(int rank, String name) {
        return layout.workspace().address(workspace[rank - firstLocalRank], name);
    }

    /** Device address of a buffer in a rank's symmetric region. */
    long symmetric(int rank, String name) {
        return layout.symmetric().address(symmetric[rank - firstLocalRank], name);
    }

    /** Address by which the device writes the rank's error record. */
    long errorAddress(int rank) {
        return pinned.deviceAddress() + errorOffset(rank);
    }

    /** Address by which the device writes the rank's counters. */
    long countersAddress(int rank) {
        return pinned.deviceAddress() + countersOffset(rank);
    }

    /** Address by which the device writes what it knows of each peer of a local rank. */
    long statsAddress(int rank) {
        return pinned.deviceAddress() + statsOffset(rank);
    }

    /** Address by which the device writes the rows of each source and expert of a local rank. */
    long receivedAddress(int rank) {
        return pinned.deviceAddress() + receivedOffset(rank);
    }

    private List<Long> expertRows(int rank, int peer) {
        int experts = config.expertsPerRank();
        return LongStream.range(0, config.expertsOn(rank))
                .map(
                        expert ->
                                (long)
                                        LONG.getOpaque(
                                                pinned.bytes(),
                                                receivedOffset(rank)
                                                        + (int) (peer * (long) experts + expert)
                                                                * Long.BYTES))
                .boxed()
                .toList();
    }

    /** For tests as well: where the rows of source 0 and local expert 0 are told. */
    int receivedOffset(int rank) {
        return (int) layout.pinned().offset("received")
                + (rank - firstLocalRank) * ranks * config.expertsPerRank() * Long.BYTES;
    }

    /** A field of what a local rank knows of a peer. */
    long peerStat(int rank, int peer, String field) {
        return (long)
                LONG.getAcquire(
                        pinned.bytes(),
                        statsOffset(rank)
                                + peer * DeviceStructs.PEER_STATS.size()
                                + DeviceStructs.PEER_STATS.offset(field));
    }

    int statsOffset(int rank) {
        return (int) layout.pinned().offset("peers")
                + (rank - firstLocalRank) * ranks * DeviceStructs.PEER_STATS.size();
    }

    /** A field of a rank's error record; the code is read first, with acquire. */
    int errorCode(int rank) {
        return (int)
                INT.getAcquire(
                        pinned.bytes(),
                        errorOffset(rank) + DeviceStructs.ERROR_RECORD.offset("code"));
    }

    int errorInt(int rank, String field) {
        return pinned.bytes()
                .order(ByteOrder.LITTLE_ENDIAN)
                .getInt(errorOffset(rank) + DeviceStructs.ERROR_RECORD.offset(field));
    }

    long errorLong(int rank, String field) {
        return (long)
                LONG.getAcquire(
                        pinned.bytes(),
                        errorOffset(rank) + DeviceStructs.ERROR_RECORD.offset(field));
    }

    long counter(int rank, String field) {
        return (long)
                LONG.getAcquire(
                        pinned.bytes(),
                        countersOffset(rank) + DeviceStructs.SOFT_COUNTERS.offset(field));
    }

    /**
     * For tests, when no step runs: fills every buffer that a step must rewrite before it reads;
     * flags, epochs, arrival counters and totals, which live from step to step, stay. The context
     * is entered, and whoever calls waits for the fills.
     */
    void poison(byte value) {
        for (int local = 0; local < symmetric.length; local++) {
            poison(layout.symmetric(), symmetric[local], value);
            poison(layout.workspace(), workspace[local], value);
        }
    }

    private void poison(Region region, long base, byte value) {
        for (Region.Field field : region.fields()) {
            if (!LASTING.contains(field.name())) {
                long address = region.address(base, field.name());
                context.driver().memsetD8(address, value, field.bytes());
            }
        }
    }

    /** For tests: what the device reports to. */
    ByteBuffer reports() {
        return pinned.bytes();
    }

    int errorOffset(int rank) {
        return (int) layout.pinned().offset("errors")
                + (rank - firstLocalRank) * DeviceStructs.ERROR_RECORD.size();
    }

    int countersOffset(int rank) {
        return (int) layout.pinned().offset("counters")
                + (rank - firstLocalRank) * DeviceStructs.SOFT_COUNTERS.size();
    }

    @Override
    public void close() {
        owned.close("closing a handle");
    }
}
