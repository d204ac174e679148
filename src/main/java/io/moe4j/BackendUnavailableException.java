package io.moe4j;

/** The backend asked for cannot run on this machine; the message is the reason. */
public class BackendUnavailableException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    /**
     * The reason, and what to do about it.
     *
     * @param message what is missing, and the cure
     */
    public BackendUnavailableException(String message) {
        super(message);
    }
}
