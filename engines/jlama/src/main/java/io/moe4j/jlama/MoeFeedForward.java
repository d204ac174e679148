package io.moe4j.jlama;

import com.github.tjake.jlama.model.functions.FeedForward;
import com.github.tjake.jlama.safetensors.DType;
import com.github.tjake.jlama.tensor.AbstractTensor;
import com.github.tjake.jlama.tensor.TensorShape;
import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.tensor.Tensor;
import java.lang.foreign.MemorySegment;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.locks.ReentrantLock;
import java.util.function.Consumer;
import java.util.function.Function;

/**
 * One Mixture-of-Experts layer as a block of Jlama: takes the normalised hidden states of any
 * number of tokens and gives their expert outputs; router, weights and sums are moe4j's. Owns its
 * layer and the staging memory; the result is a tensor of Jlama's, which Jlama closes. Calls from
 * several threads wait for each other.
 *
 * <p>Jlama keeps tensors in host memory, so on CUDA a call copies the rows to the device, runs the
 * step on the default stream, waits and copies the result back.
 */
public final class MoeFeedForward implements FeedForward, AutoCloseable {
    private static final long DEFAULT_STREAM = 0L;

    private final MoeLayer layer;
    private final Function<TensorShape, AbstractTensor> outputs;
    private final int maxTokens;
    private final int hidden;
    private final Tensor hostIn;
    private final Tensor hostOut;
    private final Tensor hostCount;
    private final Tensor in;
    private final Tensor out;
    private final Tensor count;
    private final BoundStep step;
    private final ReentrantLock lock = new ReentrantLock();

    /**
     * Opens and prepares the layer.
     *
     * @param config one rank; hidden states and output in F32, routing from hidden states
     * @param outputs makes the result: {@code model::makeDenseTensor}
     * @throws IllegalArgumentException if the configuration does not fit; names field and cure
     */
    public MoeFeedForward(MoeConfig config, Function<TensorShape, AbstractTensor> outputs) {
        require(config.ranks() == 1, "ranks=" + config.ranks(), "ranks(1)");
        require(
                config.routingInput() == RoutingInput.HIDDEN,
                "routingInput=" + config.routingInput(),
                "routingInput(RoutingInput.HIDDEN)");
        require(
                config.hiddenDType() == io.moe4j.tensor.DType.F32,
                "hiddenDType=" + config.hiddenDType(),
                "hiddenDType(DType.F32)");
        this.outputs = outputs;
        this.maxTokens = config.maxTokensPerRank();
        this.hidden = config.shape().hidden();
        this.hostIn = Tensor.allocateHost(config.hiddenDType(), maxTokens, hidden);
        this.hostOut = Tensor.allocateHost(config.outDType(), maxTokens, hidden);
        this.hostCount = Tensor.allocateHost(io.moe4j.tensor.DType.I32, 1);
        this.layer = Moe.open(config);
        try {
            layer.prepare();
            BackendMemory memory = layer.memory();
            this.in = memory.allocate(config.hiddenDType(), maxTokens, hidden);
            this.out = memory.allocate(config.outDType(), maxTokens, hidden);
            this.count = memory.allocate(io.moe4j.tensor.DType.I32, 1);
            this.step = layer.bind(List.of(StepTensors.hidden(out, in, count)));
        } catch (RuntimeException | Error e) {
            layer.close();
            throw e;
        }
    }

    /** The layer behind this block. */
    public MoeLayer layer() {
        return layer;
    }

    // docs: begin jlama-forward
    @Override
    public AbstractTensor forward(
            AbstractTensor x, Optional<Consumer<List<AbstractTensor>>> tensorReducer) {
        requireWhole(x, tensorReducer);
        int tokens = x.shape().first();
        AbstractTensor y = outputs.apply(TensorShape.of(tokens, hidden));
        lock.lock();
        try {
            for (int first = 0; first < tokens; first += maxTokens) {
                int n = Math.min(maxTokens, tokens - first);
                read(x, first, n);
                layer.memory().write(rows(in, n), rows(hostIn, n));
                hostCount.setInt(0, n);
                layer.memory().write(count, hostCount);
                layer.enqueue(DEFAULT_STREAM, step);
                layer.synchronize(DEFAULT_STREAM);
                layer.check();
                layer.memory().read(rows(hostOut, n), rows(out, n));
                write(y, first, n);
            }
            return y;
        } catch (RuntimeException | Error e) {
            y.close();
            throw e;
        } finally {
            lock.unlock();
        }
    }

    // docs: end jlama-forward

    private void requireWhole(
            AbstractTensor x, Optional<Consumer<List<AbstractTensor>>> tensorReducer) {
        if (tensorReducer.isPresent() || x.shape().isSparse()) {
            throw new UnsupportedOperationException(
                    "the model is split over Jlama workers: load it whole, and give ranks to"
                            + " moe4j instead");
        }
        if (x.shape().last() != hidden) {
            throw new IllegalArgumentException(
                    "hidden states are "
                            + x.shape().last()
                            + " wide but the layer has hidden="
                            + hidden
                            + ": config.json and weights do not belong together");
        }
    }

    /** Copies rows of a tensor of any of Jlama's types to the staging memory, as F32. */
    private void read(AbstractTensor from, int first, int n) {
        if (from.dType() == DType.F32) {
            bytes(hostIn, n).copyFrom(bytes(from, first, n));
            return;
        }
        for (int row = 0; row < n; row++) {
            for (int i = 0; i < hidden; i++) {
                hostIn.setFloat((long) row * hidden + i, from.get(first + row, i));
            }
        }
    }

    private void write(AbstractTensor to, int first, int n) {
        if (to.dType() == DType.F32 && hostOut.dtype() == io.moe4j.tensor.DType.F32) {
            bytes(to, first, n).copyFrom(bytes(hostOut, n));
            return;
        }
        for (int row = 0; row < n; row++) {
            for (int i = 0; i < hidden; i++) {
                to.set(hostOut.getFloat((long) row * hidden + i), first + row, i);
            }
        }
    }

    private MemorySegment bytes(AbstractTensor tensor, int first, int n) {
        int offset = tensor.getMemorySegmentOffset(tensor.getOffset(first, 0));
        return tensor.getMemorySegment().asSlice(offset, 4L * n * hidden);
    }

    private MemorySegment bytes(Tensor host, int n) {
        return MemorySegment.ofBuffer(host.buffer()).asSlice(0, 4L * n * hidden);
    }

    /** The first rows of a tensor, wherever it is. */
    private Tensor rows(Tensor all, int n) {
        return all.isHost()
                ? Tensor.host(all.buffer(), all.dtype(), n, hidden)
                : Tensor.device(all.address(), all.dtype(), n, hidden);
    }

    private static void require(boolean condition, String what, String cure) {
        if (!condition) {
            throw new IllegalArgumentException(what + " does not fit Jlama: use " + cure);
        }
    }

    /** Frees the layer. Idempotent. */
    @Override
    public void close() {
        layer.close();
    }
}
