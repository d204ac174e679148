package io.moe4j.cuda;

import io.moe4j.BackendMemory;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;

/** Device memory for tools and tests; everything allocated here is freed with the layer. */
final class CudaMemory implements BackendMemory, AutoCloseable {
    private final Context context;
    private final List<DeviceBuffer> buffers = new ArrayList<>();
    private boolean refused;

    CudaMemory(Context context) {
        this.context = context;
    }

    /** Refuses further use; the memory itself stays until close, for graphs that use it. */
    synchronized void refuse() {
        refused = true;
    }

    @Override
    public synchronized Tensor allocate(DType dtype, long... shape) {
        requireOpen();
        long elements = 1;
        for (long extent : shape) {
            elements = Math.multiplyExact(elements, extent);
        }
        long bytes = Math.multiplyExact(elements, dtype.bytes());
        DeviceBuffer buffer = new DeviceBuffer(context, Math.max(1, bytes));
        buffers.add(buffer);
        try (Scope scope = context.enter()) {
            context.driver().memsetD8(buffer.address(), (byte) 0, buffer.size());
            context.driver().streamSynchronize(0L); // why: a fill is asynchronous
        }
        return Tensor.device(buffer.address(), dtype, shape);
    }

    @Override
    public synchronized void write(Tensor to, Tensor fromHost) {
        requireOpen();
        requireEqual(to, fromHost);
        try (Scope scope = context.enter()) {
            context.driver().memcpyHtoD(to.address(), bytes(fromHost));
            context.driver().streamSynchronize(0L); // why: the copy may still be under way
        }
    }

    @Override
    public synchronized void read(Tensor toHost, Tensor from) {
        requireOpen();
        requireEqual(toHost, from);
        try (Scope scope = context.enter()) {
            context.driver().memcpyDtoH(bytes(toHost), from.address());
        }
    }

    @Override
    public synchronized void close() {
        refused = true;
        buffers.forEach(DeviceBuffer::close);
        buffers.clear();
    }

    private void requireOpen() {
        if (refused) {
            throw new IllegalStateException("the layer is closed: open a new one");
        }
    }

    private static ByteBuffer bytes(Tensor host) {
        ByteBuffer buffer = host.buffer();
        if (!buffer.isDirect()) {
            throw new IllegalArgumentException(
                    "host tensor "
                            + host
                            + " is not in direct memory: use Tensor.allocateHost or a direct"
                            + " buffer");
        }
        return buffer.limit((int) host.bytes());
    }

    private static void requireEqual(Tensor to, Tensor from) {
        if (to.dtype() != from.dtype() || to.bytes() != from.bytes()) {
            throw new IllegalArgumentException(
                    "cannot copy " + from + " to " + to + ": type and size must be equal");
        }
    }
}
