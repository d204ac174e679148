package io.moe4j.cuda;

import io.moe4j.MoeFaultException;
import io.moe4j.RankLostException;
import io.moe4j.Recovery;
import io.moe4j.observe.LayerFault;
import java.time.Duration;

/** What the error records of a handle say, in words and as exceptions. */
final class Faults {
    /** FaultCode kPeerAbort of step_params.cuh. */
    private static final int PEER_ABORT = 3;

    private static final int ITEMS_MISSING = 4; // kInternal of step_params.cuh

    private Faults() {}

    /** The fault of a handle's ranks that is most likely the cause of the others, or null. */
    static LayerFault first(CudaHandle handle, int firstRank, int endRank) {
        int failed = -1;
        for (int rank = firstRank; rank < endRank; rank++) {
            // why: a rank that was aborted by its peer is not the cause
            if (handle.errorCode(rank) != 0
                    && (failed < 0 || handle.errorCode(failed) == PEER_ABORT)) {
                failed = rank;
            }
        }
        return failed < 0 ? null : read(handle, failed, handle.errorCode(failed));
    }

    /** What {@code check} throws for it. */
    static MoeFaultException exception(LayerFault fault) {
        if (fault.operation().endsWith("_recv")) {
            return new RankLostException(
                    describe(fault),
                    fault.operation(),
                    fault.rank(),
                    fault.peer(),
                    fault.epochExpected(),
                    fault.epochSeen(),
                    Duration.ofNanos(fault.waitedNs()));
        }
        return new MoeFaultException(describe(fault));
    }

    /** Of a rank whose record holds {@code code}. */
    static LayerFault read(CudaHandle handle, int rank, int code) {
        String operation =
                switch (handle.errorInt(rank, "op")) {
                    case 1 -> "dispatch_recv";
                    case 2 -> "combine_recv";
                    case 3 -> "experts";
                    default -> "operation " + handle.errorInt(rank, "op");
                };
        String what =
                switch (code) {
                    case 1 -> "timed out";
                    case 2 -> "saw an epoch that does not fit";
                    case PEER_ABORT -> "was aborted by its peer";
                    case ITEMS_MISSING -> "waited for its own gate and up products";
                    default -> "failed with code " + code;
                };
        return new LayerFault(
                operation,
                handle.errorInt(rank, "rank"),
                handle.errorInt(rank, "peer"),
                what,
                handle.errorLong(rank, "waited_ns"),
                handle.errorLong(rank, "epoch_expected"),
                handle.errorLong(rank, "epoch_seen"),
                handle.validEpoch(rank));
    }

    /** One sentence. */
    static String describe(LayerFault fault) {
        if (fault.operation().equals("experts")) {
            return String.format(
                    "experts on rank %d %s: after %.1f ms %d of an expert's %d half tiles were"
                            + " finished; the last valid epoch is %d",
                    fault.rank(),
                    fault.cause(),
                    fault.waitedNs() / 1e6,
                    fault.epochSeen(),
                    fault.epochExpected(),
                    fault.validEpoch());
        }
        return String.format(
                "%s on rank %d %s: waited %.1f ms for rank %d, epoch expected %s, seen %s; the last"
                        + " valid epoch is %s",
                fault.operation(),
                fault.rank(),
                fault.cause(),
                fault.waitedNs() / 1e6,
                fault.peer(),
                Recovery.describe(fault.epochExpected()),
                Recovery.describe(fault.epochSeen()),
                Recovery.describe(fault.validEpoch()));
    }
}
