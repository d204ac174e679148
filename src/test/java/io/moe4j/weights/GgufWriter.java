package io.moe4j.weights;

import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.Bf16;
import io.moe4j.tensor.Fp16;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/** Writes matrices in the types of GGUF files, and says what numbers come out again. */
public final class GgufWriter {
    private GgufWriter() {}

    /** The matrix in bytes. */
    public static ByteBuffer encode(GgufType type, WeightMatrix matrix) {
        ByteBuffer to =
                ByteBuffer.allocateDirect((int) type.rowBytes(matrix.cols()) * matrix.rows())
                        .order(ByteOrder.LITTLE_ENDIAN);
        encode(to, type, values(matrix));
        return to.flip();
    }

    /** Appends values, whole blocks. */
    public static void encode(ByteBuffer to, GgufType type, float[] values) {
        for (int i = 0; i < values.length; i++) {
            switch (type) {
                case F32 -> to.putFloat(values[i]);
                case F16 -> to.putShort(Fp16.fromFloat(values[i]));
                case BF16 -> to.putShort(Bf16.fromFloat(values[i]));
                case Q8_0 -> {
                    float scale = scale(values, i - i % 32);
                    if (i % 32 == 0) {
                        to.putShort(Fp16.fromFloat(scale));
                    }
                    to.put((byte) Math.round(values[i] / scale));
                }
            }
        }
    }

    /** The numbers that {@link #encode} keeps, by a decoder of the tests' own. */
    public static WeightMatrix round(WeightMatrix matrix, GgufType type) {
        float[] values = values(matrix);
        float[] rounded = new float[values.length];
        for (int i = 0; i < values.length; i++) {
            float scale = scale(values, i - i % 32);
            rounded[i] =
                    switch (type) {
                        case F32 -> values[i];
                        case F16 -> Fp16.toFloat(Fp16.fromFloat(values[i]));
                        case BF16 -> Bf16.toFloat(Bf16.fromFloat(values[i]));
                        case Q8_0 -> Math.round(values[i] / scale) * scale;
                    };
        }
        return WeightMatrix.of(rounded, matrix.rows(), matrix.cols());
    }

    /** The scale of a block, as GGUF tools choose it: largest magnitude / 127, in binary16. */
    private static float scale(float[] values, int block) {
        float largest = 0;
        for (int i = block; i < Math.min(values.length, block + 32); i++) {
            largest = Math.max(largest, Math.abs(values[i]));
        }
        return Fp16.toFloat(Fp16.fromFloat(largest / 127));
    }

    /** All values of a matrix. */
    public static float[] values(WeightMatrix matrix) {
        float[] values = new float[matrix.rows() * matrix.cols()];
        matrix.read(values);
        return values;
    }
}
