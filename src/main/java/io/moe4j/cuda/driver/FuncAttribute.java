package io.moe4j.cuda.driver;

/** The kernel attributes in use, with the numbers of {@code CUfunction_attribute}. */
public enum FuncAttribute {
    /** Threads of a block at most, by registers. */
    MAX_THREADS_PER_BLOCK(0),
    /** Bytes of static shared memory. */
    STATIC_SHARED_BYTES(1),
    /** Bytes of constant memory. */
    CONST_BYTES(2),
    /** Bytes of local memory a thread: above 0 means spills or a stack frame. */
    LOCAL_BYTES(3),
    /** Registers of a thread. */
    REGISTERS(4),
    /** PTX version × 10. */
    PTX_VERSION(5),
    /** Architecture of the code × 10. */
    BINARY_VERSION(6),
    /** Dynamic shared memory allowed; must be raised above 48 KiB. Can be set. */
    MAX_DYNAMIC_SHARED_BYTES(8),
    /** Share of shared memory wanted of the L1 cache in percent. Can be set. */
    PREFERRED_SHARED_CARVEOUT(9);

    private final int number;

    FuncAttribute(int number) {
        this.number = number;
    }

    /** {@return the number of {@code CUfunction_attribute}} */
    public int number() {
        return number;
    }
}
