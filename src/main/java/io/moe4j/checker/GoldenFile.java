package io.moe4j.checker;

import io.moe4j.model.MoeShape;
import io.moe4j.weights.CheckpointException;
import io.moe4j.weights.SafetensorsFile;
import io.moe4j.weights.TensorInfo;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Recorded input and float64 output of a checkpoint's Mixture-of-Experts layers: a safetensors file
 * with the tensors {@code hidden}, {@code router_logits}, {@code topk_ids}, {@code topk_weights},
 * {@code routed_out} and {@code out} under {@code layerN.tT.} for layer N and T tokens. Owns the
 * open file; not thread-safe.
 */
public final class GoldenFile implements AutoCloseable {
    private static final Pattern CASE_NAME =
            Pattern.compile("layer(\\d{1,9})\\.t(\\d{1,9})\\.hidden");

    private final Path path;
    private final SafetensorsFile file;
    private final List<Entry> entries;

    /**
     * One recorded case.
     *
     * @param layer N
     * @param tokens T
     */
    public record Entry(int layer, int tokens) {
        /** For example {@code layer 1 with 37 tokens}. */
        @Override
        public String toString() {
            return "layer " + layer + " with " + tokens + " tokens";
        }

        String prefix() {
            return "layer" + layer + ".t" + tokens + ".";
        }
    }

    private GoldenFile(Path path, SafetensorsFile file, List<Entry> entries) {
        this.path = path;
        this.file = file;
        this.entries = entries;
    }

    /**
     * Opens a file and lists its cases.
     *
     * @param path the file
     * @return the file, read anew for each case
     * @throws CheckpointException if it is not a safetensors file or holds no case
     */
    public static GoldenFile open(Path path) {
        SafetensorsFile file = SafetensorsFile.open(path);
        List<Entry> entries = new ArrayList<>();
        for (String name : file.names()) {
            Matcher matcher = CASE_NAME.matcher(name);
            if (matcher.matches()) {
                entries.add(
                        new Entry(
                                Integer.parseInt(matcher.group(1)),
                                Integer.parseInt(matcher.group(2))));
            }
        }
        if (entries.isEmpty()) {
            file.close();
            throw new CheckpointException(
                    path + " has no golden case: expected tensors named layerN.tT.hidden");
        }
        entries.sort(Comparator.comparingInt(Entry::layer).thenComparingInt(Entry::tokens));
        return new GoldenFile(path, file, List.copyOf(entries));
    }

    /** {@return where the file lies} */
    public Path path() {
        return path;
    }

    /** {@return all cases, by layer and number of tokens} */
    public List<Entry> entries() {
        return entries;
    }

    /**
     * Reads a case and checks its tensors against the layer's shape.
     *
     * @param entry which case
     * @param shape the layer's sizes
     * @return the case
     * @throws CheckpointException if a tensor is missing or has another shape
     */
    public ReferenceCase read(Entry entry, MoeShape shape) {
        int t = entry.tokens();
        int k = shape.topK();
        Routing routing =
                new Routing(
                        t, k, ints(entry, "topk_ids", t, k), floats(entry, "topk_weights", t, k));
        requireShape(entry, "router_logits", t, shape.experts());
        return new ReferenceCase(
                entry.layer(),
                "golden",
                t,
                floats(entry, "hidden", t, shape.hidden()),
                routing,
                widen(floats(entry, "routed_out", t, shape.hidden())),
                widen(floats(entry, "out", t, shape.hidden())));
    }

    @Override
    public void close() {
        file.close();
    }

    private float[] floats(Entry entry, String tensor, long... shape) {
        String name = requireShape(entry, tensor, shape);
        float[] values = new float[Math.toIntExact(shape[0] * shape[1])];
        file.readFloats(name, 0, values, 0, values.length);
        return values;
    }

    private int[] ints(Entry entry, String tensor, long... shape) {
        String name = requireShape(entry, tensor, shape);
        int[] values = new int[Math.toIntExact(shape[0] * shape[1])];
        file.readInts(name, 0, values, 0, values.length);
        return values;
    }

    private String requireShape(Entry entry, String tensor, long... expected) {
        String name = entry.prefix() + tensor;
        if (!file.names().contains(name)) {
            throw new CheckpointException(path + " lacks " + name + ": record it again");
        }
        TensorInfo info = file.info(name);
        if (!info.hasShape(expected)) {
            throw new CheckpointException(
                    path
                            + ": "
                            + name
                            + " has shape "
                            + info.shape()
                            + " but the layer needs "
                            + Arrays.toString(expected)
                            + ": is this the golden file of another checkpoint?");
        }
        return name;
    }

    private static double[] widen(float[] values) {
        double[] wide = new double[values.length];
        for (int i = 0; i < wide.length; i++) {
            wide[i] = values[i];
        }
        return wide;
    }
}
