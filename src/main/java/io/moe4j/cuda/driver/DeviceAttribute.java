package io.moe4j.cuda.driver;

/** The device attributes in use, with the numbers of {@code CUdevice_attribute}. */
public enum DeviceAttribute {
    /** Threads of a block at most. */
    MAX_THREADS_PER_BLOCK(1),
    /** Shared memory of a block without opt-in. */
    MAX_SHARED_MEMORY_PER_BLOCK(8),
    /** SM clock in kHz. */
    CLOCK_RATE_KHZ(13),
    /** Number of SMs. */
    MULTIPROCESSOR_COUNT(16),
    /** Whether a device reaches page-locked host memory. */
    CAN_MAP_HOST_MEMORY(19),
    /** Memory clock in kHz. */
    MEMORY_CLOCK_RATE_KHZ(36),
    /** Width of the memory bus in bits. */
    MEMORY_BUS_WIDTH_BITS(37),
    /** Bytes of the L2 cache. */
    L2_CACHE_BYTES(38),
    /** Threads of an SM at most. */
    MAX_THREADS_PER_MULTIPROCESSOR(39),
    /** 1 if host and device share one address space. */
    UNIFIED_ADDRESSING(41),
    /** Major part of the compute capability. */
    COMPUTE_CAPABILITY_MAJOR(75),
    /** Minor part of the compute capability. */
    COMPUTE_CAPABILITY_MINOR(76),
    /** Bytes of shared memory of an SM. */
    MAX_SHARED_MEMORY_PER_MULTIPROCESSOR(81),
    /** Registers of an SM. */
    MAX_REGISTERS_PER_MULTIPROCESSOR(82),
    /** 1 if cooperative launches work. */
    COOPERATIVE_LAUNCH(95),
    /** Bytes of shared memory of a block with opt-in. */
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN(97);

    private final int number;

    DeviceAttribute(int number) {
        this.number = number;
    }

    /** {@return the number of {@code CUdevice_attribute}} */
    public int number() {
        return number;
    }
}
