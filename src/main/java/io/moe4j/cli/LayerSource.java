package io.moe4j.cli;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.ModelPreset;
import io.moe4j.weights.Checkpoint;
import java.nio.file.Files;
import java.nio.file.Path;

/** Finds what commands name: presets and checkpoint folders, with messages that help. */
final class LayerSource {
    private LayerSource() {}

    /** The preset of that name. @throws IllegalArgumentException listing the known ones */
    static ModelPreset preset(String id) {
        return ModelPreset.find(id)
                .orElseThrow(
                        () ->
                                new IllegalArgumentException(
                                        "unknown preset "
                                                + id
                                                + ": choose one of "
                                                + ModelPreset.ids()));
    }

    /** A configuration of a preset's layer with random weights that routes by its own router. */
    static MoeConfig.Builder configOf(ModelPreset preset, long seed) {
        return MoeConfig.builder()
                .weights(preset.randomWeights(seed))
                .rule(preset.rule())
                .activation(preset.activation())
                .routingInput(RoutingInput.HIDDEN);
    }

    /** The folder itself. @throws IllegalArgumentException if there is none */
    static Path folder(Path checkpoint) {
        if (!Files.isDirectory(checkpoint)) {
            throw new IllegalArgumentException(
                    "checkpoint folder "
                            + checkpoint
                            + " does not exist: give the folder that holds config.json");
        }
        return checkpoint;
    }

    /**
     * The number of the first Mixture-of-Experts layer.
     *
     * @param folder where the checkpoint is, for the message
     */
    static int firstMoeLayer(Checkpoint checkpoint, Path folder) {
        return checkpoint.moeLayers().stream()
                .findFirst()
                .orElseThrow(
                        () ->
                                new IllegalArgumentException(
                                        folder
                                                + " ("
                                                + checkpoint.modelType()
                                                + ") has no Mixture-of-Experts layer: choose the"
                                                + " checkpoint of an MoE model"));
    }

    /** A word for a shell: quoted if it has to be. */
    static String shellQuote(String word) {
        return word.matches("[\\w@%+=:,./-]+") ? word : "'" + word.replace("'", "'\\''") + "'";
    }
}
