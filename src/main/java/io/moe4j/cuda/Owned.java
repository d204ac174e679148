package io.moe4j.cuda;

import java.util.ArrayDeque;
import java.util.Deque;

/**
 * What its holder has opened, to be closed in reverse order, all of it whatever fails. For one
 * thread at a time.
 */
final class Owned {
    private final Deque<AutoCloseable> resources = new ArrayDeque<>();

    /** Takes over a resource. */
    <T extends AutoCloseable> T add(T resource) {
        resources.push(resource);
        return resource;
    }

    /** Closes everything; failures are added to {@code cause}. */
    void close(Throwable cause) {
        while (!resources.isEmpty()) {
            try {
                resources.pop().close();
            } catch (Exception e) {
                cause.addSuppressed(e);
            }
        }
    }

    /**
     * Closes everything.
     *
     * @throws IllegalStateException with this message and the failures, if there are any
     */
    void close(String message) {
        IllegalStateException failure = new IllegalStateException(message);
        close(failure);
        if (failure.getSuppressed().length > 0) {
            throw failure;
        }
    }
}
