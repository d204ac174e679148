package io.moe4j.cli;

/** What the exit code of every command means. */
public final class ExitCodes {
    /** Everything is as it should be. */
    public static final int OK = 0;

    /** An output differs from its reference, or the computation failed. */
    public static final int MISMATCH = 1;

    /** Wrong usage, or input that cannot be read. */
    public static final int BAD_INPUT = 2;

    /** A GPU was asked for and none is usable. */
    public static final int NO_GPU = 3;

    private ExitCodes() {}
}
