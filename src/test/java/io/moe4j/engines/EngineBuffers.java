package io.moe4j.engines;

import io.moe4j.MoeConfig;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * One allocation of an engine, cut into the tensors of a step. Each piece lies behind a header of 8
 * bytes more than a multiple of 16, or of 16, as arrays of managed runtimes do.
 */
final class EngineBuffers implements AutoCloseable {
    private static final int BYTES = 1 << 20;

    private final EngineCuda cuda;
    private final long base;
    private final int alignment;
    private long used;
    final Tensor hidden;
    final Tensor ids;
    final Tensor weights;
    final Tensor count;
    final Tensor out;

    /**
     * Tensors for TOPK input.
     *
     * @param alignment what the addresses are a multiple of, and of no more: 8, 16 or 256
     */
    EngineBuffers(EngineCuda cuda, MoeConfig config, int alignment) {
        this.cuda = cuda;
        this.alignment = alignment;
        this.base = cuda.allocate(BYTES);
        int m = config.maxTokensPerRank();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        this.hidden = take(config.hiddenDType(), m, h);
        this.ids = take(DType.I32, m, k);
        this.weights = take(DType.F32, m, k);
        this.count = take(DType.I32, 1);
        this.out = take(config.outDType(), m, h);
    }

    private Tensor take(DType type, long... shape) {
        long at = (base + used + 2L * alignment - 1) / (2L * alignment) * (2L * alignment);
        at += alignment; // aligned to that and no better
        long bytes = type.bytes();
        for (long extent : shape) {
            bytes *= extent;
        }
        used = at + bytes - base;
        if (used > BYTES) {
            throw new IllegalStateException("the engine's pool is too small");
        }
        return Tensor.device(at, type, shape);
    }

    long base() {
        return base;
    }

    StepTensors step() {
        return StepTensors.topk(out, hidden, ids, weights, count);
    }

    /** Copies values into a tensor, rounded to its type. */
    void write(Tensor to, float[] values) {
        Tensor host = Tensor.allocateHost(to.dtype(), to.shape());
        host.setFloats(values);
        cuda.write(to.address(), host.buffer());
    }

    void write(Tensor to, int[] values) {
        ByteBuffer host =
                ByteBuffer.allocateDirect(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
        host.asIntBuffer().put(values);
        cuda.write(to.address(), host);
    }

    float[] readOut() {
        Tensor host = Tensor.allocateHost(out.dtype(), out.shape());
        cuda.read(host.buffer(), out.address());
        return host.toFloats();
    }

    @Override
    public void close() {
        cuda.free(base);
    }
}
