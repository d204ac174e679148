package io.moe4j.bench;

import io.moe4j.cuda.CudaProbe;
import java.util.Map;

/** The environment part of a report. */
public final class Machine {
    private Machine() {}

    /**
     * {@return the host facts, and with the cuda backend those of the GPU; call it right after the
     * last timing}
     *
     * @param backend {@code cpu} or {@code cuda}
     */
    public static Map<String, String> facts(String backend) {
        Map<String, String> facts = Environment.ofHost();
        if (backend.equals("cuda")) {
            try (CudaProbe probe = new CudaProbe()) {
                facts.put("gpu", probe.gpu());
                facts.put("cuda", probe.driverCuda());
                facts.put("sm clock of the device at most", probe.maxSmClockMhz() + " MHz");
                facts.put("kernels", probe.kernels());
                facts.put("PDL", probe.pdl());
                Environment.addNvidiaSmi(facts, probe.pciBusId());
            }
        }
        return facts;
    }
}
