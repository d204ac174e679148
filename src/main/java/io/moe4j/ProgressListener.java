package io.moe4j;

/** Hears about progress of long work such as packing weights; called from any thread. */
@FunctionalInterface
public interface ProgressListener {
    /** Ignores everything. */
    ProgressListener NONE = (done, total) -> {};

    /**
     * {@code done} of {@code total} units are finished; calls may arrive out of order.
     *
     * @param done units that are finished
     * @param total all units
     */
    void progress(long done, long total);
}
