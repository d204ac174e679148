package io.moe4j;

import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;

/**
 * Allocation and copies in a backend's memory, for programs that do not manage device memory
 * themselves (tools, tests, small programs). Engines pass views of their own memory instead. None
 * of these calls belongs into a step: the copies wait for the device.
 */
public interface BackendMemory {
    /**
     * {@return new zeroed memory, aligned to 256 bytes on CUDA; the layer frees it when it closes}
     *
     * @param dtype element type
     * @param shape sizes, the last one contiguous
     * @throws IllegalStateException after close, on CUDA
     */
    Tensor allocate(DType dtype, long... shape);

    /**
     * Copies host memory into backend memory of equal type and size; waits until done.
     *
     * @param to made by {@link #allocate}, or any memory of the backend
     * @param fromHost host tensor of the same type and size
     * @throws IllegalArgumentException if type or size differ, or if host memory is not direct, on
     *     CUDA
     */
    void write(Tensor to, Tensor fromHost);

    /**
     * Copies backend memory into host memory of equal type and size; waits until done.
     *
     * @param toHost host tensor of the same type and size
     * @param from memory of the backend
     * @throws IllegalArgumentException if type or size differ, or if host memory is not direct, on
     *     CUDA
     */
    void read(Tensor toHost, Tensor from);
}
