package io.moe4j.ep;

import java.util.Set;

/** Ranks of a group did not meet: some did not come in time, left, or are somewhere else. */
public class GroupException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    /** The ranks to look at. */
    private final transient Set<Integer> missing;

    /**
     * A meeting that failed.
     *
     * @param message names the meeting, the ranks and what is known of them
     * @param missing the ranks that did not come
     */
    public GroupException(String message, Set<Integer> missing) {
        super(message);
        this.missing = Set.copyOf(missing);
    }

    /** {@return the ranks that did not come, left, or are at another meeting} */
    public Set<Integer> missing() {
        return missing;
    }
}
