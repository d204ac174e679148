package io.moe4j;

import java.time.Duration;

/**
 * A wait between ranks failed: what was waited for did not come within its bound, another rank gave
 * up, or a rank is in another step. The CUDA context computes on; {@link MoeLayer#recover} begins
 * anew, with all ranks or without the lost one.
 */
public class RankLostException extends MoeFaultException {
    private static final long serialVersionUID = 1L;

    /** The wait that failed. */
    private final String operation;

    /** The rank that waited. */
    private final int rank;

    /** The rank it waited for. */
    private final int peer;

    /** The epoch it waited for. */
    private final long epochExpected;

    /** The epoch it saw. */
    private final long epochSeen;

    /** How long it waited. */
    private final Duration waited;

    /**
     * A wait that failed.
     *
     * @param message names all of it
     * @param operation {@link #operation()}
     * @param rank {@link #rank()}
     * @param peer {@link #peer()}
     * @param epochExpected {@link #epochExpected()}
     * @param epochSeen {@link #epochSeen()}
     * @param waited {@link #waited()}
     */
    public RankLostException(
            String message,
            String operation,
            int rank,
            int peer,
            long epochExpected,
            long epochSeen,
            Duration waited) {
        super(message);
        this.operation = operation;
        this.rank = rank;
        this.peer = peer;
        this.epochExpected = epochExpected;
        this.epochSeen = epochSeen;
        this.waited = waited;
    }

    /** {@return {@code dispatch_recv} or {@code combine_recv}} */
    public String operation() {
        return operation;
    }

    /** {@return the rank that waited} */
    public int rank() {
        return rank;
    }

    /** {@return the rank it waited for, or the one that gave up first and told it} */
    public int peer() {
        return peer;
    }

    /** {@return the epoch it waited for: generation · 2^48 + step} */
    public long epochExpected() {
        return epochExpected;
    }

    /** {@return the epoch it saw} */
    public long epochSeen() {
        return epochSeen;
    }

    /** {@return how long it waited} */
    public Duration waited() {
        return waited;
    }
}
