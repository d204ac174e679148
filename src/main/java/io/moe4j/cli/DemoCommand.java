package io.moe4j.cli;

import java.nio.file.Path;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;

/**
 * {@code moe4j demo}: one layer, stage by stage, on a small checkpoint or at a model's full size.
 */
@Command(
        name = "demo",
        description = {
            "Runs one layer and shows what happens. Without --preset: a checkpoint's layer over"
                    + " several ranks, compared with its recorded output. With --preset: a"
                    + " full-size layer with random weights, timed and spot-checked."
        })
final class DemoCommand extends BaseCommand {
    @Option(
            names = "--checkpoint",
            paramLabel = "DIR",
            description = "Hugging Face folder (default: the tiny Qwen3-MoE of moe4j's own tests).")
    private Path checkpoint;

    @Option(
            names = "--preset",
            paramLabel = "NAME",
            description = "A well-known model's layer, for example qwen3-30b-a3b.")
    private String preset;

    @Option(
            names = "--ranks",
            paramLabel = "R",
            description = "Ranks (default: 4; 1 with --preset).")
    private Integer ranks;

    @Option(
            names = "--tokens",
            paramLabel = "T",
            description = "Tokens over all ranks (default: the most recorded; 16 with --preset).")
    private Integer tokens;

    @Option(
            names = "--steps",
            paramLabel = "N",
            defaultValue = "10",
            description = "Timed steps (default: ${DEFAULT-VALUE}).")
    private int steps;

    @Option(
            names = "--backend",
            defaultValue = "auto",
            description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
    private BackendName backend;

    @Option(
            names = "--debug-sync",
            description = {
                "Also compare every stage with the CPU backend and name the first that differs."
            })
    private boolean debugSync;

    @Override
    public Integer call() {
        requirePositive("--tokens", tokens);
        requirePositive("--steps", steps);
        requirePositive("--ranks", ranks);
        if (preset == null) {
            Path folder = checkpoint == null ? ownCheckpoint() : checkpoint;
            int rankCount = ranks == null ? 4 : ranks;
            return new CheckpointDemo(out(), folder, rankCount, tokens, steps, backend, debugSync)
                    .run();
        }
        if (checkpoint != null) {
            throw new IllegalArgumentException("--preset and --checkpoint exclude each other");
        }
        return new PresetDemo(
                        out(),
                        LayerSource.preset(preset),
                        ranks == null ? 1 : ranks,
                        tokens == null ? 16 : tokens,
                        steps,
                        backend,
                        debugSync)
                .run();
    }

    private static Path ownCheckpoint() {
        return Path.of(
                System.getProperty("moe4j.home", ""),
                "src",
                "test",
                "resources",
                "golden",
                "qwen3_moe");
    }

    private static void requirePositive(String option, Integer value) {
        if (value != null && value < 1) {
            throw new IllegalArgumentException(option + "=" + value + " is not positive");
        }
    }
}
