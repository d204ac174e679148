package io.moe4j.weights;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.IOException;
import java.io.OutputStream;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Collection;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Writes small safetensors files for tests. Collects tensors in memory; one thread. */
public final class SafetensorsWriter {
    private record Entry(String dtype, long[] shape, byte[] bytes) {}

    private final Map<String, Entry> tensors = new LinkedHashMap<>();

    /** Adds a tensor. */
    public SafetensorsWriter add(String name, String dtype, byte[] bytes, long... shape) {
        tensors.put(name, new Entry(dtype, shape, bytes));
        return this;
    }

    /** Adds a tensor of type F32. */
    public SafetensorsWriter addFloats(String name, float[] values, long... shape) {
        ByteBuffer bytes = ByteBuffer.allocate(values.length * 4).order(ByteOrder.LITTLE_ENDIAN);
        bytes.asFloatBuffer().put(values);
        return add(name, "F32", bytes.array(), shape);
    }

    /** Names added so far, in order. */
    public Collection<String> names() {
        return tensors.keySet();
    }

    /** The file's bytes: length, header padded to 8 bytes, data. */
    public byte[] toBytes() {
        ObjectNode header = new ObjectMapper().createObjectNode();
        header.putObject("__metadata__").put("format", "pt");
        int at = 0;
        for (Map.Entry<String, Entry> e : tensors.entrySet()) {
            ObjectNode node = header.putObject(e.getKey());
            node.put("dtype", e.getValue().dtype());
            for (long extent : e.getValue().shape()) {
                node.withArray("shape").add(extent);
            }
            node.withArray("shape");
            node.withArray("data_offsets").add(at).add(at + e.getValue().bytes().length);
            at += e.getValue().bytes().length;
        }
        return file(header.toString(), at, tensors.values().stream().map(Entry::bytes).toList());
    }

    /** Writes the file. */
    public void write(Path path) {
        try (OutputStream out = Files.newOutputStream(path)) {
            out.write(toBytes());
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** A file with any header text and zeros as data, for hostile input. */
    public static byte[] raw(String header, int dataBytes) {
        return file(header, dataBytes, List.of());
    }

    private static byte[] file(String header, int dataBytes, Collection<byte[]> data) {
        byte[] json = header.getBytes(StandardCharsets.UTF_8);
        ByteBuffer file =
                ByteBuffer.allocate(8 + json.length + dataBytes).order(ByteOrder.LITTLE_ENDIAN);
        file.putLong(json.length).put(json);
        data.forEach(file::put);
        return file.array();
    }
}
