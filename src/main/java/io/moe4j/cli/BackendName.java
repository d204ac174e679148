package io.moe4j.cli;

import java.util.Locale;

/** The backends that can be asked for on the command line. */
public enum BackendName {
    /** A usable GPU, else the CPU. */
    AUTO,
    /** The CPU backend. */
    CPU,
    /** The CUDA backend; an error if no GPU is usable. */
    CUDA;

    /** The name in configurations and on the command line. */
    @Override
    public String toString() {
        return name().toLowerCase(Locale.ROOT);
    }
}
