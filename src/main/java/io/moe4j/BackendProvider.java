package io.moe4j;

import java.util.List;

/**
 * A backend, found by {@link java.util.ServiceLoader}. A provider must be cheap to construct and
 * must load no native code before {@link #availability} is asked.
 */
public interface BackendProvider {
    /** {@return {@code cpu} or {@code cuda}} */
    String name();

    /** {@return a rank: backend {@code auto} takes the usable provider with the highest} */
    int preference();

    /** {@return whether this machine can run the backend, and why or why not} Never throws. */
    Availability availability();

    /**
     * {@return what a layer with this configuration would allocate; allocates nothing}
     *
     * @param config may lack weights
     */
    MemoryPlan plan(MoeConfig config);

    /**
     * Opens a layer; called only if available.
     *
     * @param config with weights
     * @param reason why this backend was chosen, for {@link MoeLayer#backendReason}
     * @return the layer, not prepared yet; the caller closes it
     */
    MoeLayer open(MoeConfig config, String reason);

    /**
     * As {@link #open}, with every driver call of a step checked by the host-sync checker.
     *
     * @param config with weights
     * @param reason why this backend was chosen
     * @return the layer, not prepared yet; the caller closes it
     * @throws IllegalArgumentException if the backend has no device a step could wait for
     */
    default HostSyncCheckedLayer openHostSyncChecked(MoeConfig config, String reason) {
        throw new IllegalArgumentException(
                "the "
                        + name()
                        + " backend has no device to wait for: host syncs are checked on cuda only");
    }

    /**
     * Whether a backend can run here.
     *
     * @param usable true if it can
     * @param reason one line: what it runs on, or what is missing
     * @param details further lines for {@code moe4j info}
     */
    record Availability(boolean usable, String reason, List<String> details) {}
}
