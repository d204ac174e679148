package io.moe4j.weights;

import java.nio.ByteBuffer;
import java.util.Arrays;

/**
 * One tensor of one shard, with reads that need no name. Does not own the file.
 *
 * @param file the shard
 * @param name the tensor's full name
 * @param info what the header says about it
 */
record StoredTensor(SafetensorsFile file, String name, TensorInfo info) {
    static StoredTensor of(SafetensorsFile file, String name) {
        return new StoredTensor(file, name, file.info(name));
    }

    /** File and tensor, for messages. */
    String label() {
        return file.label() + ": tensor " + CheckpointException.quote(name);
    }

    /** Fails unless the shape is the expected one. */
    StoredTensor requireShape(long... expected) {
        if (!info.hasShape(expected)) {
            throw new CheckpointException(
                    label()
                            + " has shape "
                            + info.shape()
                            + ", expected "
                            + Arrays.toString(expected)
                            + ": config.json and weights do not belong together");
        }
        return this;
    }

    /** Fails unless the type is one of those allowed. */
    StoredTensor requireType(String cure, StoredType... allowed) {
        if (!Arrays.asList(allowed).contains(info.type())) {
            throw new CheckpointException(
                    label()
                            + " has dtype "
                            + info.type()
                            + ", expected one of "
                            + Arrays.toString(allowed)
                            + ": "
                            + cure);
        }
        return this;
    }

    /** Decodes {@code count} elements from element {@code from} on. */
    void readFloats(long from, float[] to, int toOffset, int count) {
        file.readFloats(name, from, to, toOffset, count);
    }

    /** Decodes {@code count} elements from element {@code from} on to a new array. */
    float[] floats(long from, int count) {
        float[] values = new float[count];
        readFloats(from, values, 0, count);
        return values;
    }

    /** A view of part of the bytes. */
    ByteBuffer slice(long byteOffset, int byteCount) {
        return file.slice(name, byteOffset, byteCount);
    }
}
