package io.moe4j.checker;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * Runs a layer on host data through the public API, the way an engine would: tensors are bound
 * once, every step only changes their contents. Tokens are spread over the ranks as evenly as
 * possible, in order; with fewer tokens than ranks the last ranks have none. Of a group's layer
 * only the tokens of its own rank are loaded and collected. Rows no token uses hold NaN before each
 * step, so that reading or writing them shows. Owns the layer; one thread.
 */
public final class LayerHarness implements AutoCloseable {
    /**
     * CU_STREAM_PER_THREAD. why: ranks of one process that share a GPU wait for each other, each on
     * its thread, so they must not share stream 0.
     */
    private static final long STREAM_OF_THE_THREAD = 2;

    private final MoeLayer layer;
    private final long stream;
    private final List<StepTensors> ranks = new ArrayList<>();
    private final BoundStep step;
    private int[] counts;

    /**
     * What a step produced.
     *
     * @param routing experts and weights the backend chose; −1 for a dropped id
     * @param out [T, H]
     * @param paddingUntouched whether the rows past each rank's tokens kept their content
     */
    public record Output(Routing routing, float[] out, boolean paddingUntouched) {}

    private LayerHarness(MoeLayer layer) {
        this.layer = layer;
        this.stream = layer.config().group() == null ? 0 : STREAM_OF_THE_THREAD;
        for (int rank = 0; rank < layer.config().localRanks(); rank++) {
            ranks.add(allocate(layer));
        }
        this.step = layer.bind(ranks);
    }

    /**
     * Opens and prepares a layer that routes by its own router.
     *
     * @param config ranks, M and backend are used as given; the input is always the hidden states
     * @param progress hears about weights being packed
     * @return the harness, which owns the layer
     */
    public static LayerHarness open(MoeConfig config, ProgressListener progress) {
        return over(
                Moe.open(config.toBuilder().routingInput(RoutingInput.HIDDEN).build()), progress);
    }

    /**
     * Prepares a layer that routes by its own router, and takes it over.
     *
     * @param layer number of the layer
     * @param progress is told how far it is
     * @return the harness, which closes the layer
     */
    public static LayerHarness over(MoeLayer layer, ProgressListener progress) {
        try {
            layer.prepare(progress);
            return new LayerHarness(layer);
        } catch (RuntimeException | Error failure) {
            try {
                layer.close();
            } catch (RuntimeException closing) {
                failure.addSuppressed(closing);
            }
            throw failure;
        }
    }

    /**
     * {@return the smallest M that takes {@code tokens} tokens spread over {@code ranks} ranks}
     *
     * @param tokens T, number of tokens
     * @param ranks R, number of ranks
     */
    public static int maxTokensPerRank(int tokens, int ranks) {
        return Math.max(1, (tokens + ranks - 1) / ranks);
    }

    /**
     * {@return the tokens of each rank when {@code tokens} tokens are spread over {@code ranks}
     * ranks}
     *
     * @param tokens T, number of tokens
     * @param ranks R, number of ranks
     */
    public static int[] spread(int tokens, int ranks) {
        int[] counts = new int[ranks];
        Arrays.fill(counts, tokens / ranks);
        for (int rank = 0; rank < tokens % ranks; rank++) {
            counts[rank]++;
        }
        return counts;
    }

    /** {@return the layer} */
    public MoeLayer layer() {
        return layer;
    }

    /**
     * Writes the input of the next steps, [T, H], and poisons everything else.
     *
     * @param hidden hidden states [T, H], row-major
     * @param tokens T, number of tokens
     */
    public void load(float[] hidden, int tokens) {
        MoeConfig config = layer.config();
        int h = config.shape().hidden();
        int[] all = spread(tokens, config.ranks());
        int first = config.firstLocalRank();
        counts = Arrays.copyOfRange(all, first, first + config.localRanks());
        int from = Arrays.stream(all, 0, first).sum();
        for (int rank = 0; rank < counts.length; rank++) {
            StepTensors tensors = ranks.get(rank);
            Tensor input = nan(config.hiddenDType(), config);
            input.writeFloats(hidden, from * h, 0, counts[rank] * h);
            layer.memory().write(tensors.hidden(), input);
            layer.memory().write(tensors.tokenCount(), Tensor.ofInts(new int[] {counts[rank]}, 1));
            layer.memory().write(tensors.out(), nan(config.outDType(), config));
            from += counts[rank];
        }
    }

    /** Runs one step on the loaded input and waits for it. */
    public void step() {
        layer.enqueue(stream, step);
        layer.synchronize(stream);
        layer.check();
    }

    /**
     * Copies the result of the last step to the host.
     *
     * @return output and routing of the layer's ranks, in the order of the tokens
     */
    public Output collect() {
        MoeConfig config = layer.config();
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int m = config.maxTokensPerRank();
        int tokens = Arrays.stream(counts).sum();
        int[] ids = new int[tokens * k];
        float[] weights = new float[tokens * k];
        float[] out = new float[tokens * h];
        boolean paddingUntouched = true;
        int from = 0;
        for (int rank = 0; rank < counts.length; rank++) {
            int count = counts[rank];
            Tensor result = Tensor.allocateHost(config.outDType(), m, h);
            layer.memory().read(result, ranks.get(rank).out());
            result.readFloats(0, out, from * h, count * h);
            paddingUntouched &= isNan(result, (long) count * h);
            int[] rankIds = new int[m * k];
            float[] rankWeights = new float[m * k];
            layer.readRouting(rank, rankIds, rankWeights);
            System.arraycopy(rankIds, 0, ids, from * k, count * k);
            System.arraycopy(rankWeights, 0, weights, from * k, count * k);
            from += count;
        }
        return new Output(new Routing(tokens, k, ids, weights), out, paddingUntouched);
    }

    /** Closes the layer and with it the memory of the tensors. */
    @Override
    public void close() {
        layer.close();
    }

    private static StepTensors allocate(MoeLayer layer) {
        MoeConfig config = layer.config();
        BackendMemory memory = layer.memory();
        long m = config.maxTokensPerRank();
        long h = config.shape().hidden();
        return StepTensors.hidden(
                memory.allocate(config.outDType(), m, h),
                memory.allocate(config.hiddenDType(), m, h),
                memory.allocate(DType.I32, 1));
    }

    private static Tensor nan(DType dtype, MoeConfig config) {
        int h = config.shape().hidden();
        Tensor tensor = Tensor.allocateHost(dtype, config.maxTokensPerRank(), h);
        float[] row = new float[h];
        Arrays.fill(row, Float.NaN);
        for (int token = 0; token < config.maxTokensPerRank(); token++) {
            tensor.writeFloats(row, 0, (long) token * h, h);
        }
        return tensor;
    }

    private static boolean isNan(Tensor tensor, long from) {
        for (long i = from; i < tensor.elements(); i++) {
            if (!Float.isNaN(tensor.getFloat(i))) {
                return false;
            }
        }
        return true;
    }
}
