package io.moe4j.cpu;

import io.moe4j.MoeConfig;
import io.moe4j.model.Activation;
import java.util.Arrays;

/**
 * The masked grouped GEMMs: gate/up with the activation in its epilogue, and down. Work is cut into
 * (hit expert, tile of outputs, block of rows); an expert without rows costs nothing. Every dot
 * product is summed in the same order whatever the tile or the number of rows.
 */
final class CpuMaskedGemm {
    /** Rows that share a tile of weights while it is in the cache. */
    private static final int ROW_BLOCK = 16;

    private final CpuWorkers workers;
    private final Activation activation;
    private final int hidden;
    private final int intermediate;
    private final int maxTokens;
    private final ThreadLocal<Scratch> scratch = ThreadLocal.withInitial(Scratch::new);
    private int[] unitExpert = new int[0];
    private int[] unitPart = new int[0];

    CpuMaskedGemm(MoeConfig config, CpuWorkers workers) {
        this.workers = workers;
        this.activation = config.activation();
        this.hidden = config.shape().hidden();
        this.intermediate = config.shape().intermediate();
        this.maxTokens = config.maxTokensPerRank();
    }

    /** activated[row] = activation(gate · x[slot], up · x[slot]), rows gathered by slot. */
    void gateUp(RowBuffer activated, CpuRank rank, CpuExpert[] experts) {
        int tiles = experts.length == 0 ? 0 : experts[0].gate().tileCount();
        workers.forEach(
                units(rank, tiles),
                unit -> {
                    int expert = unitExpert[unit];
                    int tile = unitPart[unit] % tiles;
                    int first = rank.expertOffsets[expert] + unitPart[unit] / tiles * ROW_BLOCK;
                    int end = Math.min(first + ROW_BLOCK, rank.expertOffsets[expert + 1]);
                    Scratch s = scratch.get();
                    for (int row = first; row < end; row++) {
                        int slot = rank.expertRows[row];
                        s.source(
                                row - first,
                                rank.recvRows[slot / maxTokens],
                                slot % maxTokens * hidden);
                        s.target(row - first, activated.chunk(row), activated.offset(row));
                    }
                    gateUpTile(s, end - first, experts[expert], tile);
                });
    }

    /** Debug: the rows that {@link #gateUp} makes, bit for bit, from {@code firstRow} on. */
    void gateUpRows(float[] to, CpuRank rank, CpuExpert[] experts, int firstRow, int count) {
        workers.forEach(
                count,
                i -> {
                    int row = firstRow + i;
                    int expert = 0;
                    while (row >= rank.expertOffsets[expert + 1]) {
                        expert++;
                    }
                    int slot = rank.expertRows[row];
                    Scratch s = scratch.get();
                    s.source(0, rank.recvRows[slot / maxTokens], slot % maxTokens * hidden);
                    s.target(0, to, i * intermediate);
                    for (int tile = 0; tile < experts[expert].gate().tileCount(); tile++) {
                        gateUpTile(s, 1, experts[expert], tile);
                    }
                });
    }

    /** out[row] = down · activated[row] (+ bias). */
    void down(CpuRank rank, RowBuffer activated, CpuExpert[] experts) {
        int tiles = experts.length == 0 ? 0 : experts[0].down().tileCount();
        workers.forEach(
                units(rank, tiles),
                unit -> {
                    int expert = unitExpert[unit];
                    int tile = unitPart[unit] % tiles;
                    int first = rank.expertOffsets[expert] + unitPart[unit] / tiles * ROW_BLOCK;
                    int end = Math.min(first + ROW_BLOCK, rank.expertOffsets[expert + 1]);
                    Scratch s = scratch.get();
                    for (int row = first; row < end; row++) {
                        s.source(row - first, activated.chunk(row), activated.offset(row));
                        s.target(
                                row - first, rank.expertOut.chunk(row), rank.expertOut.offset(row));
                    }
                    downTile(s, end - first, experts[expert], tile);
                });
    }

    /** The shared expert over a rank's own tokens: dense, no gather. */
    void shared(CpuRank rank, CpuExpert expert) {
        int blocks = (rank.tokens + ROW_BLOCK - 1) / ROW_BLOCK;
        int width = expert.gate().outputs();
        dense(
                blocks * expert.gate().tileCount(),
                blocks,
                rank,
                (s, row, token) -> {
                    s.source(row, rank.homeRows, token * hidden);
                    s.target(row, rank.sharedActivations, token * width);
                },
                (s, rows, tile) -> gateUpTile(s, rows, expert, tile));
        dense(
                blocks * expert.down().tileCount(),
                blocks,
                rank,
                (s, row, token) -> {
                    s.source(row, rank.sharedActivations, token * width);
                    s.target(row, rank.sharedOut, token * hidden);
                },
                (s, rows, tile) -> downTile(s, rows, expert, tile));
    }

    private interface RowBinder {
        void bind(Scratch scratch, int row, int token);
    }

    private interface TileTask {
        void run(Scratch scratch, int rows, int tile);
    }

    private void dense(int units, int blocks, CpuRank rank, RowBinder rows, TileTask task) {
        workers.forEach(
                units,
                unit -> {
                    Scratch s = scratch.get();
                    int first = unit % blocks * ROW_BLOCK;
                    int count = Math.min(ROW_BLOCK, rank.tokens - first);
                    for (int row = 0; row < count; row++) {
                        rows.bind(s, row, first + row);
                    }
                    task.run(s, count, unit / blocks);
                });
    }

    /** Lists (expert, row block × tile) units of all hit experts; returns their number. */
    private int units(CpuRank rank, int tiles) {
        int count = 0;
        for (int expert = 0; expert < rank.localExperts; expert++) {
            int blocks = (rank.expertCounts[expert] + ROW_BLOCK - 1) / ROW_BLOCK;
            int wanted = count + blocks * tiles;
            if (wanted > unitExpert.length) {
                int size = Math.max(wanted, 2 * unitExpert.length);
                unitExpert = Arrays.copyOf(unitExpert, size);
                unitPart = Arrays.copyOf(unitPart, size);
            }
            for (int part = 0; part < blocks * tiles; part++) {
                unitExpert[count] = expert;
                unitPart[count++] = part;
            }
        }
        return count;
    }

    private void gateUpTile(Scratch s, int rows, CpuExpert expert, int tile) {
        int width = expert.gate().width(tile);
        int column = tile * PackedMatrix.TILE;
        multiply(s, s.gate, rows, expert.gate(), tile);
        multiply(s, s.up, rows, expert.up(), tile);
        for (int row = 0; row < rows; row++) {
            addBias(s.gate[row], expert.gateBias(), column, width);
            addBias(s.up[row], expert.upBias(), column, width);
            CpuSwiGlu.apply(
                    s.targets[row],
                    s.targetAt[row] + column,
                    s.gate[row],
                    s.up[row],
                    width,
                    activation);
        }
    }

    private static void downTile(Scratch s, int rows, CpuExpert expert, int tile) {
        int width = expert.down().width(tile);
        int column = tile * PackedMatrix.TILE;
        multiply(s, s.gate, rows, expert.down(), tile);
        for (int row = 0; row < rows; row++) {
            addBias(s.gate[row], expert.downBias(), column, width);
            System.arraycopy(s.gate[row], 0, s.targets[row], s.targetAt[row] + column, width);
        }
    }

    private static void multiply(
            Scratch s, float[][] sums, int rows, PackedMatrix matrix, int tile) {
        int inputs = matrix.inputs();
        for (int row = 0; row < rows; row++) {
            Arrays.fill(sums[row], 0f);
        }
        for (int from = 0; from < inputs; from += PackedMatrix.BLOCK) {
            int to = Math.min(inputs, from + PackedMatrix.BLOCK);
            for (int row = 0; row < rows; row++) {
                matrix.addBlock(
                        sums[row], s.partial, s.sources[row], s.sourceAt[row], tile, from, to);
            }
        }
    }

    private static void addBias(float[] sums, float[] bias, int column, int width) {
        if (bias != null) {
            for (int j = 0; j < width; j++) {
                sums[j] += bias[column + j];
            }
        }
    }

    /** Accumulators and row addresses of one thread. */
    private static final class Scratch {
        final float[][] gate = new float[ROW_BLOCK][PackedMatrix.TILE];
        final float[][] up = new float[ROW_BLOCK][PackedMatrix.TILE];
        final float[] partial = new float[PackedMatrix.TILE];
        final float[][] sources = new float[ROW_BLOCK][];
        final int[] sourceAt = new int[ROW_BLOCK];
        final float[][] targets = new float[ROW_BLOCK][];
        final int[] targetAt = new int[ROW_BLOCK];

        void source(int row, float[] array, int at) {
            sources[row] = array;
            sourceAt[row] = at;
        }

        void target(int row, float[] array, int at) {
            targets[row] = array;
            targetAt[row] = at;
        }
    }
}
