package io.moe4j.ffm;

import io.moe4j.StepTensors;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import io.moe4j.weights.EngineTensor;
import io.moe4j.weights.GgufType;
import java.lang.foreign.MemorySegment;
import org.bytedeco.javacpp.Pointer;

/** Memory of engines on java.lang.foreign and on JavaCPP, as docs/engines.md shows it. */
final class OwnMemoryExample {
    private OwnMemoryExample() {}

    // docs: begin device-memory
    /** Device memory is a number, whatever holds it: segment.address(), pointer.address(). */
    static StepTensors step(
            long out, long hidden, long ids, long weights, long count, int m, int h, int k) {
        return StepTensors.topk(
                        Tensor.device(out, DType.F32, m, h),
                        Tensor.device(hidden, DType.F32, m, h),
                        Tensor.device(ids, DType.I32, m, k),
                        Tensor.device(weights, DType.F32, m, k),
                        Tensor.device(count, DType.I32, 1))
                .accumulating(); // out += experts: the residual is in place
    }

    // docs: end device-memory

    // docs: begin host-weights
    /** Weights in a MemorySegment of any size, a mapped file for one. */
    static EngineTensor tensor(MemorySegment memory, GgufType type, int experts, int i, int h) {
        return EngineTensor.of(
                (offset, bytes) -> memory.asSlice(offset, bytes).asByteBuffer(),
                memory.byteSize(),
                type,
                experts,
                i,
                h);
    }

    /** A row pointer of an engine's own: the engine keeps the memory until prepare is done. */
    static WeightMatrix matrix(long address, GgufType type, int rows, int cols) {
        long bytes = type.rowBytes(cols) * rows;
        return tensor(MemorySegment.ofAddress(address).reinterpret(bytes), type, 1, rows, cols)
                .matrix();
    }

    /** JavaCPP: capacity is in elements of the pointer's type. */
    static EngineTensor tensor(Pointer memory, GgufType type, int experts, int i, int h) {
        return EngineTensor.of(
                (offset, bytes) ->
                        new Pointer(memory)
                                .position(offset)
                                .capacity(offset + bytes)
                                .asByteBuffer(),
                memory.capacity() * memory.sizeof(),
                type,
                experts,
                i,
                h);
    }
    // docs: end host-weights
}
