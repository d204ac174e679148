package io.moe4j.weights;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.DirectoryStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.Map;

/**
 * An independent, slow reader of small checkpoints: element by element, from the definitions of the
 * formats and without the library's code. The expected values of the tests come from here.
 */
final class RawTensors {
    private record Entry(String dtype, long[] shape, ByteBuffer bytes) {}

    private final Map<String, Entry> tensors = new HashMap<>();

    static RawTensors read(Path folder) {
        RawTensors raw = new RawTensors();
        try (DirectoryStream<Path> files = Files.newDirectoryStream(folder, "model*.safetensors")) {
            for (Path file : files) {
                raw.add(Files.readAllBytes(file));
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        return raw;
    }

    private void add(byte[] file) throws IOException {
        ByteBuffer bytes = ByteBuffer.wrap(file).order(ByteOrder.LITTLE_ENDIAN);
        int length = (int) bytes.getLong(0);
        JsonNode header = new ObjectMapper().readTree(file, 8, length);
        header.properties()
                .forEach(
                        e -> {
                            JsonNode node = e.getValue();
                            if (!e.getKey().equals("__metadata__")) {
                                long[] shape = new long[node.get("shape").size()];
                                for (int i = 0; i < shape.length; i++) {
                                    shape[i] = node.get("shape").get(i).asLong();
                                }
                                int begin = 8 + length + node.get("data_offsets").get(0).asInt();
                                int end = 8 + length + node.get("data_offsets").get(1).asInt();
                                ByteBuffer data =
                                        bytes.slice(begin, end - begin)
                                                .order(ByteOrder.LITTLE_ENDIAN);
                                tensors.put(
                                        e.getKey(),
                                        new Entry(node.get("dtype").asText(), shape, data));
                            }
                        });
    }

    boolean has(String name) {
        return tensors.containsKey(name);
    }

    /** One element; FP8 is multiplied with its block's scale. */
    float at(String name, int blockSize, long... index) {
        Entry e = tensors.get(name);
        float value = (float) element(e, flat(e.shape, index));
        Entry scale = tensors.get(name + "_scale_inv");
        if (scale != null) {
            long[] block = index.clone();
            block[index.length - 2] /= blockSize;
            block[index.length - 1] /= blockSize;
            value *= (float) element(scale, flat(scale.shape, block));
        }
        return value;
    }

    /** One element of a pair {@code _blocks}, {@code _scales}: [expert, row, col]. */
    double mxfp4(String name, int expert, int row, int col) {
        Entry blocks = tensors.get(name + "_blocks");
        Entry scales = tensors.get(name + "_scales");
        int pair =
                blocks.bytes.get((int) flat(blocks.shape, expert, row, col / 32, (col % 32) / 2))
                        & 0xff;
        int nibble = col % 2 == 0 ? pair % 16 : pair / 16;
        int exponent = (nibble % 8) / 2;
        int fraction = nibble % 2;
        double magnitude =
                exponent == 0 ? fraction * 0.5 : (1 + fraction * 0.5) * Math.pow(2, exponent - 1);
        int scale = scales.bytes.get((int) flat(scales.shape, expert, row, col / 32)) & 0xff;
        return (nibble < 8 ? magnitude : -magnitude) * Math.pow(2, scale - 127);
    }

    private static long flat(long[] shape, long... index) {
        long at = 0;
        for (int d = 0; d < shape.length; d++) {
            if (index[d] < 0 || index[d] >= shape[d]) {
                throw new IndexOutOfBoundsException("dimension " + d + ": " + index[d]);
            }
            at = at * shape[d] + index[d];
        }
        return at;
    }

    private static double element(Entry e, long index) {
        int i = (int) index;
        return switch (e.dtype) {
            case "F32" -> e.bytes.getFloat(4 * i);
            case "BF16" -> floating(e.bytes.getShort(2 * i) & 0xffff, 8, 7);
            case "F16" -> floating(e.bytes.getShort(2 * i) & 0xffff, 5, 10);
            case "F8_E4M3" -> floating(e.bytes.get(i) & 0xff, 4, 3);
            default -> throw new IllegalArgumentException(e.dtype);
        };
    }

    /** Sign, exponent, fraction; finite values only. */
    private static double floating(int bits, int exponentBits, int fractionBits) {
        int fraction = bits & ((1 << fractionBits) - 1);
        int exponent = (bits >> fractionBits) & ((1 << exponentBits) - 1);
        int bias = (1 << (exponentBits - 1)) - 1;
        double unit = fraction / (double) (1 << fractionBits);
        double magnitude =
                exponent == 0
                        ? unit * Math.pow(2, 1 - bias)
                        : (1 + unit) * Math.pow(2, exponent - bias);
        boolean negative = (bits >> (exponentBits + fractionBits)) != 0;
        return negative ? -magnitude : magnitude;
    }
}
