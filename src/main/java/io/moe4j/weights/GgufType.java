package io.moe4j.weights;

import io.moe4j.tensor.Bf16;
import io.moe4j.tensor.Fp16;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * Element types of an {@link EngineTensor}: those of GGUF files that the library reads, which
 * include the plain ones. All are little-endian. Stateless.
 */
public enum GgufType {
    /** IEEE-754 binary32. */
    F32(0, 1, 4) {
        @Override
        void decode(ByteBuffer from, float[] to, int at, int count) {
            from.asFloatBuffer().get(to, at, count);
        }
    },
    /** IEEE-754 binary16. */
    F16(1, 1, 2) {
        @Override
        void decode(ByteBuffer from, float[] to, int at, int count) {
            for (int i = 0; i < count; i++) {
                to[at + i] = Fp16.toFloat(from.getShort(2 * i));
            }
        }
    },
    /** Blocks of 32 signed bytes behind one binary16 scale: 34 bytes; value = scale · byte. */
    Q8_0(8, 32, 34) {
        @Override
        void decode(ByteBuffer from, float[] to, int at, int count) {
            for (int block = 0; block < count / 32; block++) {
                float scale = Fp16.toFloat(from.getShort(34 * block));
                for (int i = 0; i < 32; i++) {
                    to[at + 32 * block + i] = scale * from.get(34 * block + 2 + i);
                }
            }
        }
    },
    /** bfloat16. */
    BF16(30, 1, 2) {
        @Override
        void decode(ByteBuffer from, float[] to, int at, int count) {
            for (int i = 0; i < count; i++) {
                to[at + i] = Bf16.toFloat(from.getShort(2 * i));
            }
        }
    };

    private final int id;
    private final int blockElements;
    private final int blockBytes;

    GgufType(int id, int blockElements, int blockBytes) {
        this.id = id;
        this.blockElements = blockElements;
        this.blockBytes = blockBytes;
    }

    /** {@return the number a GGUF file has for this type ({@code ggml_type})} */
    public int id() {
        return id;
    }

    /** {@return the elements that share a scale; 1 for the plain types} */
    public int blockElements() {
        return blockElements;
    }

    /**
     * {@return the type with that number in a GGUF file}
     *
     * @param id a {@code ggml_type}
     * @throws IllegalArgumentException if the library does not read it
     */
    public static GgufType ofId(int id) {
        for (GgufType type : values()) {
            if (type.id == id) {
                return type;
            }
        }
        throw new IllegalArgumentException(
                "GGUF type "
                        + id
                        + " is not one of F32 (0), F16 (1), Q8_0 (8), BF16 (30): convert the"
                        + " experts, or decode them in a WeightMatrix of your own");
    }

    /**
     * {@return the bytes of a row}
     *
     * @param cols elements of the row
     * @throws IllegalArgumentException if the row does not end with a block
     */
    public long rowBytes(int cols) {
        if (cols % blockElements != 0) {
            throw new IllegalArgumentException(
                    "cols="
                            + cols
                            + " is not a multiple of "
                            + blockElements
                            + ", the block of "
                            + this
                            + ": give the tensor's own row length");
        }
        return (long) cols / blockElements * blockBytes;
    }

    /** Decodes {@code count} elements, whole blocks, from position 0 on. */
    abstract void decode(ByteBuffer from, float[] to, int at, int count);

    /** Decodes whole blocks of any buffer, whatever its byte order. */
    void decodeRow(ByteBuffer row, float[] to, int at, int count) {
        decode(row.slice().order(ByteOrder.LITTLE_ENDIAN), to, at, count);
    }
}
