package io.moe4j.cuda;

import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.Bf16;

/**
 * For benchmarks only: random matrices that a kernel writes straight into the packed buffers, so
 * that a layer of any size opens at once. The host computes the same numbers when a matrix is read,
 * so results can be checked. Router and vectors are those of {@link RandomWeights}. Immutable.
 */
final class DeviceRandomWeights implements LayerWeights {
    private static final long GAMMA = 0x9e3779b97f4a7c15L;
    private static final int TILE_CHUNKS = DeviceLayout.TILE_ROWS * DeviceLayout.PAD / 8;

    private final MoeShape shape;
    private final RandomWeights vectors;
    private final long seed;

    /**
     * One packed buffer: all experts' gate/up or down matrices.
     *
     * @param seed of the buffer
     * @param experts in it
     * @param rows features: I for gate/up, H for down
     * @param cols inputs
     * @param gateUp whether gate and up are interleaved
     */
    record Buffer(long seed, int experts, int rows, int cols, boolean gateUp) {
        /** Largest value. */
        float scale() {
            return (float) Math.sqrt(3.0 / cols);
        }

        /** Some of the experts, with the numbers they have in the whole. */
        Buffer part(int first, int count) {
            long values = (long) first * rowTiles() * columnBlocks() * TILE_CHUNKS * 8;
            return new Buffer(seed + GAMMA * values, count, rows, cols, gateUp);
        }

        int rowTiles() {
            int packed =
                    gateUp
                            ? 2 * DeviceLayout.pad(rows)
                            : (rows + DeviceLayout.TILE_ROWS - 1)
                                    / DeviceLayout.TILE_ROWS
                                    * DeviceLayout.TILE_ROWS;
            return packed / DeviceLayout.TILE_ROWS;
        }

        int columnBlocks() {
            return DeviceLayout.pad(cols) / DeviceLayout.PAD;
        }

        /** Rows of one expert's gate (0), up (1) or down (0) matrix, as the kernel made them. */
        private WeightMatrix matrix(int expert, int second) {
            return new WeightMatrix() {
                @Override
                public int rows() {
                    return rows;
                }

                @Override
                public int cols() {
                    return cols;
                }

                @Override
                public void read(float[] to) {
                    for (int row = 0; row < rows; row++) {
                        readRow(to, row * cols, expert, packedRow(row, second));
                    }
                }
            };
        }

        private int packedRow(int row, int second) {
            return gateUp ? row / 8 * 16 + row % 8 + 8 * second : row;
        }

        private void readRow(float[] to, int at, int expert, int packedRow) {
            float scale = scale();
            long tile =
                    ((long) expert * rowTiles() + packedRow / DeviceLayout.TILE_ROWS)
                            * columnBlocks();
            for (int column = 0; column < cols; column++) {
                int chunk = (packedRow % DeviceLayout.TILE_ROWS) * 8;
                chunk += (column % DeviceLayout.PAD / 8) ^ (packedRow & 7);
                long position = 8 * ((tile + column / DeviceLayout.PAD) * TILE_CHUNKS + chunk);
                long bits = mix(seed + GAMMA * (position + column % 8));
                float unit = (int) (bits >>> 40) * 0x1p-23f - 1f;
                to[at + column] = Bf16.toFloat(Bf16.fromFloat(unit * scale));
            }
        }
    }

    DeviceRandomWeights(MoeShape shape, RandomWeights vectors, long seed) {
        this.shape = shape;
        this.vectors = vectors;
        this.seed = seed;
    }

    Buffer gateUp() {
        return buffer(1, shape.experts(), shape.intermediate(), shape.hidden(), true);
    }

    Buffer down() {
        return buffer(2, shape.experts(), shape.hidden(), shape.intermediate(), false);
    }

    Buffer sharedGateUp() {
        return buffer(3, 1, shape.sharedIntermediate(), shape.hidden(), true);
    }

    Buffer sharedDown() {
        return buffer(4, 1, shape.hidden(), shape.sharedIntermediate(), false);
    }

    private Buffer buffer(int number, int experts, int rows, int cols, boolean gateUp) {
        return new Buffer(mix(seed * GAMMA + number), experts, rows, cols, gateUp);
    }

    @Override
    public MoeShape shape() {
        return shape;
    }

    @Override
    public ExpertWeights expert(int expert) {
        ExpertWeights biases = vectors.expert(expert);
        return new ExpertWeights(
                gateUp().matrix(expert, 0),
                gateUp().matrix(expert, 1),
                down().matrix(expert, 0),
                biases.gateBias(),
                biases.upBias(),
                biases.downBias());
    }

    @Override
    public boolean hasBias() {
        return vectors.hasBias();
    }

    @Override
    public WeightMatrix router() {
        return vectors.router();
    }

    @Override
    public float[] routerBias() {
        return vectors.routerBias();
    }

    @Override
    public float[] correctionBias() {
        return vectors.correctionBias();
    }

    @Override
    public ExpertWeights sharedExpert() {
        return shape.sharedIntermediate() == 0
                ? null
                : ExpertWeights.of(
                        sharedGateUp().matrix(0, 0),
                        sharedGateUp().matrix(0, 1),
                        sharedDown().matrix(0, 0));
    }

    @Override
    public float[] sharedExpertGate() {
        return vectors.sharedExpertGate();
    }

    @Override
    public String description() {
        return "random weights filled on the device, seed " + seed;
    }

    /** The finaliser of splitmix64, as in {@code moe_fill_random}. */
    private static long mix(long z) {
        z = (z ^ (z >>> 30)) * 0xbf58476d1ce4e5b9L;
        z = (z ^ (z >>> 27)) * 0x94d049bb133111ebL;
        return z ^ (z >>> 31);
    }
}
