package io.moe4j;

/**
 * A step that was enqueued did not produce a valid output; the message says what, where and when.
 */
public class MoeFaultException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    /**
     * A fault described by {@code message}.
     *
     * @param message names operation, rank and epoch
     */
    public MoeFaultException(String message) {
        super(message);
    }
}
