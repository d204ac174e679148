package io.moe4j.weights;

/**
 * A model folder or safetensors file that cannot be used as it is. The message names the file, the
 * tensor or field, what was found and what to do about it.
 */
public final class CheckpointException extends IllegalArgumentException {
    private static final int LONGEST_QUOTE = 160;

    /**
     * An error with a message for the user.
     *
     * @param message names the file, what is wrong and the cure
     */
    public CheckpointException(String message) {
        super(message);
    }

    /**
     * An error with a message for the user and the failure that led to it.
     *
     * @param message names the file, what is wrong and the cure
     * @param cause the failure that led to it
     */
    public CheckpointException(String message, Throwable cause) {
        super(message, cause);
    }

    /** Text from an untrusted file for use in a message: one line, printable, shortened. */
    static String quote(String text) {
        StringBuilder safe = new StringBuilder();
        for (int i = 0; i < text.length() && i < LONGEST_QUOTE; i++) {
            char c = text.charAt(i);
            if (Character.isISOControl(c) || c == '\u2028' || c == '\u2029' || c == '\u202e') {
                safe.append(String.format("\\u%04x", (int) c));
            } else {
                safe.append(c);
            }
        }
        return text.length() > LONGEST_QUOTE ? safe + "..." : safe.toString();
    }
}
