package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.StepInspection;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.tensor.Bf16;
import java.nio.ByteBuffer;

/**
 * Copies ranges of one rank's buffers to the host and widens bfloat16. Only the rows asked for are
 * copied, so that a buffer of any size can be read in parts. Owns nothing.
 */
final class CudaInspection implements StepInspection {
    private final MoeConfig config;
    private final CudaHandle handle;
    private final int rank;
    private final DeviceReader reader;

    /** Waits for the device and copies; throws once the layer is closed. */
    @FunctionalInterface
    interface DeviceReader {
        ByteBuffer read(long address, int bytes);
    }

    CudaInspection(MoeConfig config, CudaHandle handle, int rank, DeviceReader reader) {
        this.config = config;
        this.handle = handle;
        this.rank = rank;
        this.reader = reader;
    }

    /**
     * Refuses a handle or a local rank that the layer does not have.
     *
     * @throws IllegalArgumentException naming what it has
     */
    static void requireThere(MoeConfig config, int handle, int rank) {
        if (handle < 0 || handle >= config.handles() || rank < 0 || rank >= config.localRanks()) {
            throw new IllegalArgumentException(
                    "there is no handle "
                            + handle
                            + " with rank "
                            + rank
                            + ": the layer has handles="
                            + config.handles()
                            + " and ranks="
                            + config.localRanks());
        }
    }

    @Override
    public int tokens() {
        return ints(handle.workspace(rank, "home_tokens"), 0, 1)[0];
    }

    @Override
    public int[] routedIds(int firstToken, int count) {
        return headerInts(handle.workspace(rank, "home_ids"), firstToken, count);
    }

    @Override
    public float[] routedWeights(int firstToken, int count) {
        return headerFloats(handle.workspace(rank, "home_weights"), firstToken, count);
    }

    @Override
    public int receivedTokens(int source) {
        return ints(handle.symmetric(rank, "recv_tokens"), source, 1)[0];
    }

    @Override
    public int[] receivedIds(int source, int firstToken, int count) {
        return headerInts(handle.symmetric(rank, "recv_ids"), slot(source, firstToken), count);
    }

    @Override
    public float[] receivedWeights(int source, int firstToken, int count) {
        return headerFloats(
                handle.symmetric(rank, "recv_weights"), slot(source, firstToken), count);
    }

    @Override
    public float[] receivedRows(int source, int firstToken, int count) {
        return rows(
                handle.symmetric(rank, "recv_rows"),
                slot(source, firstToken),
                count,
                config.shape().hidden());
    }

    @Override
    public int[] expertCounts() {
        return ints(handle.workspace(rank, "expert_counts"), 0, config.expertsOn(rank));
    }

    @Override
    public int[] expertOffsets() {
        return ints(handle.workspace(rank, "expert_offsets"), 0, config.expertsOn(rank) + 1);
    }

    @Override
    public int[] rowSlots(int firstRow, int count) {
        return ints(handle.workspace(rank, "expert_rows"), firstRow, count);
    }

    @Override
    public int[] packedRows(int source, int firstToken, int count) {
        int[] ids = receivedIds(source, firstToken, count);
        int[] rows =
                headerInts(
                        handle.workspace(rank, "packed_row_of"), slot(source, firstToken), count);
        for (int i = 0; i < rows.length; i++) {
            rows[i] = ids[i] < 0 ? -1 : rows[i]; // why: entries without an expert are not written
        }
        return rows;
    }

    @Override
    public float[] activatedRows(int firstRow, int count) {
        return rows(
                handle.workspace(rank, "activated"),
                firstRow,
                count,
                config.shape().intermediate());
    }

    @Override
    public float[] expertOutputs(int firstRow, int count) {
        return rows(handle.workspace(rank, "expert_out"), firstRow, count, config.shape().hidden());
    }

    @Override
    public float[] combinedRows(int expertRank, int firstToken, int count) {
        return rows(
                handle.symmetric(rank, "combine_rows"),
                slot(expertRank, firstToken),
                count,
                config.shape().hidden());
    }

    @Override
    public float[] sharedOutputs(int firstToken, int count) {
        if (!config.usesSharedExpert()) {
            throw new IllegalStateException("the layer computes no shared expert");
        }
        return rows(
                handle.workspace(rank, "shared_out"), firstToken, count, config.shape().hidden());
    }

    private long slot(int source, int token) {
        return (long) source * config.maxTokensPerRank() + token;
    }

    private int[] headerInts(long base, long firstSlot, int count) {
        int k = config.shape().topK();
        return ints(base, firstSlot * k, Math.multiplyExact(count, k));
    }

    private float[] headerFloats(long base, long firstSlot, int count) {
        int k = config.shape().topK();
        float[] values = new float[Math.multiplyExact(count, k)];
        read(base, firstSlot * k * 4, values.length * 4L).asFloatBuffer().get(values);
        return values;
    }

    private int[] ints(long base, long first, int count) {
        int[] values = new int[count];
        read(base, first * 4, count * 4L).asIntBuffer().get(values);
        return values;
    }

    /** bfloat16 rows of a padded pitch, without their pad columns. */
    private float[] rows(long base, long firstRow, int count, int width) {
        int pitch = DeviceLayout.pad(width);
        ByteBuffer bytes = read(base, firstRow * pitch * 2, (long) count * pitch * 2);
        float[] values = new float[Math.multiplyExact(count, width)];
        for (int row = 0; row < count; row++) {
            for (int column = 0; column < width; column++) {
                values[row * width + column] =
                        Bf16.toFloat(bytes.getShort((row * pitch + column) * 2));
            }
        }
        return values;
    }

    private ByteBuffer read(long base, long offset, long bytes) {
        return reader.read(base + offset, Math.toIntExact(bytes));
    }
}
