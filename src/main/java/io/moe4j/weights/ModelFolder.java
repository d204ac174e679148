package io.moe4j.weights;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.InvalidPathException;
import java.nio.file.LinkOption;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Set;

/**
 * The files of one model folder: config.json and the weights, either one {@code model.safetensors}
 * or the shards that {@code model.safetensors.index.json} lists. Owns the open shards.
 *
 * <p>A name is opened only if it is a plain file name and the file behind it, links resolved, lies
 * in the folder. The one exception is the cache of the Hugging Face hub, where {@code
 * models--X/snapshots/REV/file} links to {@code models--X/blobs/HASH} of the same model.
 */
final class ModelFolder implements AutoCloseable {
    private static final String CONFIG = "config.json";
    private static final String SINGLE = "model.safetensors";
    private static final String INDEX = "model.safetensors.index.json";
    private static final long MAX_CONFIG_BYTES = 16L << 20;
    private static final long MAX_INDEX_BYTES = 64L << 20;

    private final Path folder;
    private final Path real;
    private final Map<String, SafetensorsFile> shards = new LinkedHashMap<>();
    private final Map<String, StoredTensor> tensors = new HashMap<>();
    private ModelConfig config;

    private ModelFolder(Path folder, Path real) {
        this.folder = folder;
        this.real = real;
    }

    /**
     * Reads the configuration and opens every shard.
     *
     * @throws CheckpointException if a file is missing, damaged or outside the folder
     */
    static ModelFolder open(Path path) {
        if (!Files.isDirectory(path)) {
            throw new CheckpointException(
                    path
                            + (Files.exists(path)
                                    ? ": is not a folder: give the folder that holds config.json"
                                    : ": no such folder: check the path"));
        }
        ModelFolder folder;
        try {
            folder = new ModelFolder(path, path.toRealPath());
        } catch (IOException e) {
            throw new CheckpointException(path + ": cannot be resolved (" + e + ")", e);
        }
        try {
            folder.readConfig();
            folder.openWeights();
            return folder;
        } catch (RuntimeException e) {
            folder.close();
            throw e;
        }
    }

    /** The folder as the caller named it. */
    Path path() {
        return folder;
    }

    /** The model's configuration. */
    ModelConfig config() {
        return config;
    }

    /** Names of all tensors the index lists, or all of the single file. */
    Set<String> names() {
        return Collections.unmodifiableSet(tensors.keySet());
    }

    /** A tensor by name, or null. */
    StoredTensor tensor(String name) {
        return tensors.get(name);
    }

    @Override
    public void close() {
        shards.values().forEach(SafetensorsFile::close);
    }

    private void readConfig() {
        Path file = locate(CONFIG);
        if (file == null) {
            throw new CheckpointException(
                    folder.resolve(CONFIG)
                            + ": no such file: a model folder holds config.json beside its"
                            + " weights");
        }
        String label = folder.resolve(CONFIG).toString();
        try (InputStream in = openCapped(file, label, MAX_CONFIG_BYTES)) {
            config = ModelConfig.of(StrictJson.tree(in), label);
        } catch (IOException e) {
            throw badJson(label, e);
        }
    }

    private void openWeights() {
        if (locate(SINGLE) != null) {
            SafetensorsFile file = openShard(SINGLE);
            file.names().forEach(name -> tensors.put(name, StoredTensor.of(file, name)));
            return;
        }
        if (locate(INDEX) == null) {
            throw new CheckpointException(
                    folder
                            + ": holds neither "
                            + SINGLE
                            + " nor "
                            + INDEX
                            + ": download the model's safetensors files");
        }
        Map<String, String> shardOf = readIndex();
        new ArrayList<>(shardOf.values()).stream().distinct().sorted().forEach(this::openShard);
        shardOf.forEach(this::addListedTensor);
    }

    private Map<String, String> readIndex() {
        String label = folder.resolve(INDEX).toString();
        Map<String, String> shardOf = new LinkedHashMap<>();
        Map<String, String> shardNames = new HashMap<>();
        boolean found = false;
        try (InputStream in = openCapped(locate(INDEX), label, MAX_INDEX_BYTES);
                JsonParser parser = StrictJson.parser(in)) {
            requireToken(parser.nextToken(), JsonToken.START_OBJECT, label, "the index");
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                boolean isMap = parser.currentName().equals("weight_map");
                JsonToken value = parser.nextToken();
                if (!isMap) {
                    parser.skipChildren();
                    continue;
                }
                if (found) {
                    throw new CheckpointException(label + ": weight_map is listed twice");
                }
                found = true;
                requireToken(value, JsonToken.START_OBJECT, label, "weight_map");
                readWeightMap(parser, label, shardOf, shardNames);
            }
            if (parser.nextToken() != null) {
                throw new CheckpointException(label + ": content follows the JSON document");
            }
        } catch (IOException e) {
            throw badJson(label, e);
        }
        if (!found) {
            throw new CheckpointException(
                    label + ": has no weight_map: use the model's own index file");
        }
        return shardOf;
    }

    private static void readWeightMap(
            JsonParser parser,
            String label,
            Map<String, String> shardOf,
            Map<String, String> shardNames)
            throws IOException {
        while (parser.nextToken() == JsonToken.FIELD_NAME) {
            String tensor = parser.currentName();
            requireToken(parser.nextToken(), JsonToken.VALUE_STRING, label, tensor);
            String shard = shardNames.computeIfAbsent(parser.getText(), name -> name);
            if (shardOf.put(tensor, shard) != null) {
                throw new CheckpointException(
                        label
                                + ": tensor "
                                + CheckpointException.quote(tensor)
                                + " is listed twice: use the model's own index file");
            }
        }
    }

    private SafetensorsFile openShard(String name) {
        Path file = locate(name);
        if (file == null) {
            throw new CheckpointException(
                    folder.resolve(name)
                            + ": no such file, but "
                            + INDEX
                            + " lists it: download the missing shard");
        }
        SafetensorsFile shard = SafetensorsFile.open(file, folder.resolve(name).toString());
        shards.put(name, shard);
        return shard;
    }

    private void addListedTensor(String name, String shardName) {
        SafetensorsFile shard = shards.get(shardName);
        if (!shard.names().contains(name)) {
            throw new CheckpointException(
                    shard.label()
                            + ": has no tensor "
                            + CheckpointException.quote(name)
                            + ", but "
                            + INDEX
                            + " says so: download shard and index again");
        }
        tensors.put(name, StoredTensor.of(shard, name));
    }

    /** The real path of a file in the folder, or null if there is none of that name. */
    private Path locate(String name) {
        requirePlainName(name);
        Path file = real.resolve(name);
        if (!Files.exists(file, LinkOption.NOFOLLOW_LINKS)) {
            return null;
        }
        Path target;
        try {
            target = file.toRealPath();
        } catch (IOException e) {
            throw new CheckpointException(
                    folder.resolve(name)
                            + ": is a link to a file that cannot be reached ("
                            + e
                            + "): download the model again",
                    e);
        }
        if (!target.startsWith(real) && !isHubBlob(target)) {
            throw new CheckpointException(
                    folder.resolve(name)
                            + ": is a link to "
                            + target
                            + ", outside the model folder: copy the file into the folder");
        }
        if (!Files.isRegularFile(target)) {
            throw new CheckpointException(folder.resolve(name) + ": is not a regular file");
        }
        return target;
    }

    private void requirePlainName(String name) {
        boolean plain =
                !name.isBlank()
                        && !name.equals(".")
                        && !name.equals("..")
                        && name.length() <= 255
                        && name.chars().noneMatch(c -> c < ' ' || "/\\:".indexOf(c) >= 0);
        if (!plain || !isExpressible(name)) {
            throw new CheckpointException(
                    folder.resolve(INDEX)
                            + ": the shard name "
                            + CheckpointException.quote(name)
                            + " is not a plain file name: shards lie beside the index");
        }
    }

    /** Whether the platform's file names can hold these characters. */
    private boolean isExpressible(String name) {
        try {
            return real.resolve(name).getFileName() != null;
        } catch (InvalidPathException e) {
            return false;
        }
    }

    private boolean isHubBlob(Path target) {
        Path snapshots = real.getParent();
        Path model = snapshots == null ? null : snapshots.getParent();
        return model != null
                && model.getFileName() != null
                && snapshots.endsWith("snapshots")
                && model.getFileName().toString().startsWith("models--")
                && model.resolve("blobs").equals(target.getParent());
    }

    private static InputStream openCapped(Path file, String label, long limit) throws IOException {
        long bytes = Files.size(file);
        if (bytes > limit) {
            throw new CheckpointException(
                    label
                            + ": has "
                            + bytes
                            + " bytes, more than the "
                            + limit
                            + " such a file can need: use the model's own file");
        }
        return Files.newInputStream(file);
    }

    private static void requireToken(
            JsonToken found, JsonToken expected, String label, String what) {
        if (found != expected) {
            throw new CheckpointException(
                    label
                            + ": "
                            + CheckpointException.quote(what)
                            + (expected == JsonToken.START_OBJECT
                                    ? " is not an object"
                                    : " is not mapped to a file name")
                            + ": use the model's own index file");
        }
    }

    private static CheckpointException badJson(String label, IOException cause) {
        return new CheckpointException(
                label
                        + ": is not valid JSON ("
                        + StrictJson.reason(cause)
                        + "): use the model's own file",
                cause);
    }
}
