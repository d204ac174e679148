package io.moe4j.cpu;

import io.moe4j.MoeFaultException;
import io.moe4j.observe.LayerFault;

/** A flag that should have been set before it was read: the CPU backend never waits for one. */
final class MissingFlag extends MoeFaultException {
    private static final long serialVersionUID = 1L;

    private final String operation;
    private final int rank;
    private final int peer;
    private final long seen;
    private final long expected;

    MissingFlag(String operation, int rank, int peer, long seen, long expected) {
        super(
                String.format(
                        "%s on rank %d: peer %d is at epoch %d, expected %d",
                        operation, rank, peer, seen, expected));
        this.operation = operation;
        this.rank = rank;
        this.peer = peer;
        this.seen = seen;
        this.expected = expected;
    }

    LayerFault fault(long validEpoch) {
        return new LayerFault(
                operation, rank, peer, "found no flag", 0, expected, seen, validEpoch);
    }
}
