package io.moe4j.weights;

import io.moe4j.model.Activation;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import java.nio.file.Path;
import java.util.Collection;
import java.util.List;
import java.util.Optional;
import java.util.stream.Collectors;

/**
 * A model folder opened for its Mixture-of-Experts layers: config.json and safetensors files as
 * published on the Hugging Face hub. Owns the open files; {@link CheckpointLayer}s read from them
 * until {@link #close}. Safe for concurrent use.
 *
 * <p>The family of a model is known by its model_type or, for a new model_type, found from tensor
 * names and configuration fields; then every field that decides the routing must be given, as the
 * defaults of an unknown model are unknown too.
 */
public final class Checkpoint implements AutoCloseable {
    /** Java arrays end a little before 2^31 elements. */
    private static final long MAX_MATRIX_ELEMENTS = Integer.MAX_VALUE - 8L;

    private final ModelFolder folder;
    private final ModelFamily family;
    private final LayerStack stack;
    private final MoeShape shape;
    private final RoutingRule rule;
    private final Activation activation;
    private final List<LayerInfo> layers;

    private Checkpoint(ModelFolder folder) {
        this.folder = folder;
        Collection<LayerStack> stacks = LayerStack.discover(folder.names());
        this.family = recognise(folder, stacks);
        this.stack =
                LayerStack.main(stacks, family, folder.path().toString())
                        .orElseThrow(() -> noMoeLayers(family));
        ModelConfig config = folder.config();
        this.shape = family.shape(config);
        requireReadable(shape);
        this.rule = family.rule(config, shape);
        this.activation = family.activation(config);
        int layerCount = config.countOr("num_hidden_layers", Integer.MAX_VALUE);
        String summary = shape.experts() + " experts, top-" + shape.topK();
        this.layers =
                stack.layers().keySet().stream()
                        .map(n -> stack.describe(n, family, summary, layerCount))
                        .toList();
    }

    /**
     * Opens a model folder: reads its configuration and the headers of all its weight files.
     *
     * @param path the model folder
     * @return the checkpoint; the caller closes it after its layers are prepared
     * @throws CheckpointException if anything in the folder is missing, damaged or not supported
     */
    public static Checkpoint open(Path path) {
        ModelFolder folder = ModelFolder.open(path);
        try {
            return new Checkpoint(folder);
        } catch (RuntimeException e) {
            folder.close();
            throw e;
        }
    }

    /** {@return the name of the model family whose rules are applied, such as {@code qwen3_moe}} */
    public String family() {
        return family.name();
    }

    /** {@return the configuration's model_type, or {@code unknown}} */
    public String modelType() {
        return folder.config().modelTypes().stream().findFirst().orElse("unknown");
    }

    /** {@return all layers in order} */
    public List<LayerInfo> layers() {
        return layers;
    }

    /** {@return the numbers of the Mixture-of-Experts layers, ascending} */
    public List<Integer> moeLayers() {
        return layers.stream()
                .filter(layer -> layer.kind() == LayerInfo.Kind.MOE)
                .map(LayerInfo::index)
                .toList();
    }

    /**
     * Opens one layer: finds all its tensors and checks their shapes and types, reading none.
     *
     * @param index number of the layer, from 0
     * @return the layer, which is readable until this checkpoint is closed
     * @throws CheckpointException if the layer is absent, not a Mixture-of-Experts layer, or has a
     *     tensor that is missing, unexpected or does not fit
     */
    public CheckpointLayer layer(int index) {
        LayerInfo info =
                layers.stream()
                        .filter(layer -> layer.index() == index)
                        .findFirst()
                        .orElseThrow(() -> noSuchLayer("layer " + index + " is absent"));
        if (info.kind() != LayerInfo.Kind.MOE) {
            throw noSuchLayer(info.description());
        }
        String block = stack.block(family, index);
        LayerTensors tensors =
                new LayerTensors(folder, stack.fullName(index, block), stack.namesIn(index, block));
        return new CheckpointLayer(
                folder.path() + " (" + modelType() + "), layer " + index,
                index,
                family,
                shape,
                rule,
                activation,
                tensors);
    }

    /** Closes the files. Calling it again does nothing. */
    @Override
    public void close() {
        folder.close();
    }

    private static ModelFamily recognise(ModelFolder folder, Collection<LayerStack> stacks) {
        ModelConfig config = folder.config();
        for (String type : config.modelTypes()) {
            String refusal = ModelFamily.refusal(type);
            if (refusal != null) {
                throw new CheckpointException(
                        config.file() + ": model_type=" + type + " is not supported: " + refusal);
            }
        }
        return config.modelTypes().stream()
                .map(ModelFamily::ofType)
                .flatMap(Optional::stream)
                .findFirst()
                .or(() -> recogniseByContent(folder, stacks))
                .orElseThrow(() -> unknownFamily(config));
    }

    private static Optional<ModelFamily> recogniseByContent(
            ModelFolder folder, Collection<LayerStack> stacks) {
        for (ModelFamily family : ModelFamily.all()) {
            Optional<LayerStack> stack =
                    LayerStack.main(stacks, family, folder.path().toString())
                            .filter(s -> s.speaks(family));
            if (stack.isPresent()
                    && family.fits(folder.config(), hasCorrectionBias(stack.get(), family))) {
                return Optional.of(family);
            }
        }
        return Optional.empty();
    }

    private static boolean hasCorrectionBias(LayerStack stack, ModelFamily family) {
        int first = stack.moeLayers(family).get(0);
        return family.correctionBias() != null
                && stack.namesIn(first, stack.block(family, first))
                        .contains(family.correctionBias());
    }

    private static CheckpointException unknownFamily(ModelConfig config) {
        String known =
                ModelFamily.all().stream()
                        .map(
                                f ->
                                        f.name()
                                                + " (layers.N."
                                                + String.join("|", f.blocks())
                                                + "."
                                                + f.router()
                                                + "; "
                                                + f.fields()
                                                + ")")
                        .collect(Collectors.joining("; "));
        return new CheckpointException(
                config.file()
                        + ": model_type="
                        + CheckpointException.quote(String.join(", ", config.modelTypes()))
                        + " is not known, and tensor names and configuration fields fit no known"
                        + " family. Looked for: "
                        + known
                        + ". Convert the model to one of these forms");
    }

    private CheckpointException noMoeLayers(ModelFamily wanted) {
        return new CheckpointException(
                folder.path()
                        + ": has no MoE layers: looked for PREFIXlayers.N."
                        + String.join("|", wanted.blocks())
                        + "."
                        + wanted.router()
                        + " in "
                        + folder.names().size()
                        + " tensors: check that all shards are there");
    }

    private CheckpointException noSuchLayer(String found) {
        return new CheckpointException(
                folder.path() + ": " + found + "; its MoE layers are " + ranges(moeLayers()));
    }

    private void requireReadable(MoeShape sizes) {
        long widest =
                Math.max(
                        Math.max(2L * sizes.intermediate(), sizes.sharedIntermediate()),
                        sizes.experts());
        if (widest * sizes.hidden() > MAX_MATRIX_ELEMENTS) {
            throw new CheckpointException(
                    folder.config().file()
                            + ": "
                            + sizes
                            + " means a matrix of more than 2^31 elements: use the model's own"
                            + " config.json");
        }
    }

    private static String ranges(List<Integer> numbers) {
        StringBuilder text = new StringBuilder();
        for (int i = 0; i < numbers.size(); i++) {
            int first = numbers.get(i);
            while (i + 1 < numbers.size() && numbers.get(i + 1) == numbers.get(i) + 1) {
                i++;
            }
            int last = numbers.get(i);
            text.append(text.isEmpty() ? "" : ", ").append(first);
            if (last > first) {
                text.append("..").append(last);
            }
        }
        return text.toString();
    }
}
