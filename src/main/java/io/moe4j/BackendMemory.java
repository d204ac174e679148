package io.moe4j;

import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;

/**
 * Allocation and copies in a backend's memory, for programs that do not manage device memory
 * themselves (tools, tests, small programs). Engines pass views of their own memory instead. None
 * of these calls belongs into a step: the copies wait for the device.
 */
public interface BackendMemory {
    /** New zeroed memory; freed when the layer closes. */
    Tensor allocate(DType dtype, long... shape);

    /** Copies host memory into backend memory of equal type and size; waits until done. */
    void write(Tensor to, Tensor fromHost);

    /** Copies backend memory into host memory of equal type and size; waits until done. */
    void read(Tensor toHost, Tensor from);
}
