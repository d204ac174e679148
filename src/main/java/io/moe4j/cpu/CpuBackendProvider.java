package io.moe4j.cpu;

import io.moe4j.BackendProvider;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import java.util.List;

/** Offers the CPU backend, which is always usable. */
public final class CpuBackendProvider implements BackendProvider {
    /** For {@link java.util.ServiceLoader}. */
    public CpuBackendProvider() {}

    @Override
    public String name() {
        return "cpu";
    }

    @Override
    public int preference() {
        return 0;
    }

    @Override
    public Availability availability() {
        int processors = Runtime.getRuntime().availableProcessors();
        String reason = processors + (processors == 1 ? " processor" : " processors") + ", float32";
        return new Availability(
                true,
                reason,
                List.of(
                        "max heap "
                                + MemoryPlan.human(Runtime.getRuntime().maxMemory())
                                + " (weights are kept as float32 on the heap)"));
    }

    @Override
    public MemoryPlan plan(MoeConfig config) {
        requireNoGroup(config);
        return CpuMemoryPlan.of(config);
    }

    @Override
    public MoeLayer open(MoeConfig config, String reason) {
        requireNoGroup(config);
        return new CpuLayer(config, reason);
    }

    private static void requireNoGroup(MoeConfig config) {
        if (config.group() != null) {
            throw new IllegalArgumentException(
                    "the CPU backend runs all ranks in one process: leave group(...) out and set"
                            + " ranks("
                            + config.ranks()
                            + "), or use backend cuda");
        }
    }
}
