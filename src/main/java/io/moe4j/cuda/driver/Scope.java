package io.moe4j.cuda.driver;

/**
 * The time for which a context is current on the thread that opened it. Close it on the same
 * thread, in reverse order of opening; what was current before is current again.
 */
@FunctionalInterface
public interface Scope extends AutoCloseable {
    /** Makes the context current that was current before. */
    @Override
    void close();
}
