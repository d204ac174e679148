package io.moe4j;

import java.util.List;

/**
 * A layer whose steps are watched by the host-sync checker: every driver call made inside {@code
 * enqueue} or a graph launch that could wait for the device, allocate or copy pageable memory is
 * noted with the place it came from. Opened by {@link Moe#openHostSyncChecked}.
 */
public interface HostSyncCheckedLayer extends MoeLayer {
    /** {@return the violations so far, one line each, in order; empty if there are none} */
    List<String> violations();
}
