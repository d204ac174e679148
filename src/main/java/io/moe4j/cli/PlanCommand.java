package io.moe4j.cli;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.SerializationFeature;
import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.ep.Group;
import io.moe4j.weights.Checkpoint;
import java.io.IOException;
import java.nio.file.Path;
import java.util.List;
import java.util.OptionalInt;
import picocli.CommandLine.ArgGroup;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;

/** {@code moe4j plan}: every buffer a layer would allocate, before anything is allocated. */
@Command(
        name = "plan",
        description = {
            "Shows every buffer a layer would allocate, with its formula and size, and with"
                    + " --budget the largest maxTokensPerRank that fits. Allocates nothing."
        })
final class PlanCommand extends BaseCommand {
    @ArgGroup(exclusive = true, multiplicity = "1")
    private Source source;

    @Option(
            names = "--layer",
            paramLabel = "N",
            description = "Layer of the checkpoint; the first Mixture-of-Experts layer if not set.")
    private Integer layer;

    @Option(
            names = "--ranks",
            paramLabel = "R",
            defaultValue = "1",
            description = "Ranks (default: ${DEFAULT-VALUE}).")
    private int ranks;

    @Option(
            names = "--gpus",
            paramLabel = "N",
            description = {
                "Ranks on a GPU each: the plan is that of one of them (CUDA; instead of --ranks)."
            })
    private Integer gpus;

    @Option(
            names = "--max-tokens",
            paramLabel = "M",
            defaultValue = "128",
            description = "Most tokens a rank brings to a step (default: ${DEFAULT-VALUE}).")
    private int maxTokens;

    @Option(
            names = "--budget",
            paramLabel = "SIZE",
            converter = ByteSize.class,
            description = "Also find the largest M whose plan fits, for example 4GiB.")
    private Long budgetBytes;

    @Option(
            names = "--backend",
            defaultValue = "auto",
            description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
    private BackendName backend;

    @Option(names = "--json", description = "Print JSON.")
    private boolean json;

    private static final class Source {
        @Option(
                names = "--preset",
                paramLabel = "NAME",
                description = "A well-known model's layer.")
        private String preset;

        @Option(names = "--checkpoint", paramLabel = "DIR", description = "A Hugging Face folder.")
        private Path checkpoint;
    }

    /** The result as JSON. */
    record Report(
            String title,
            List<MemoryPlan.Entry> entries,
            long totalBytes,
            Long budgetBytes,
            Integer largestMaxTokensPerRank) {}

    @Override
    public Integer call() throws IOException {
        if (source.preset != null) {
            return plan(LayerSource.configOf(LayerSource.preset(source.preset), 0));
        }
        try (Checkpoint checkpoint = Checkpoint.open(LayerSource.folder(source.checkpoint))) {
            int number =
                    layer == null
                            ? LayerSource.firstMoeLayer(checkpoint, source.checkpoint)
                            : layer;
            return plan(checkpoint.layer(number).config());
        }
    }

    private int plan(MoeConfig.Builder layerConfig) throws IOException {
        layerConfig
                .routingInput(RoutingInput.HIDDEN)
                .maxTokensPerRank(maxTokens)
                .backend(backend.toString());
        if (gpus == null) {
            layerConfig.ranks(ranks);
        } else if (ranks != 1) {
            throw new IllegalArgumentException(
                    "--gpus=" + gpus + " and --ranks=" + ranks + ": give one of them");
        } else {
            layerConfig.backend("cuda").group(Group.inProcess(gpus).get(0));
        }
        MoeConfig config = layerConfig.build();
        MemoryPlan plan = Moe.plan(config);
        OptionalInt largest =
                budgetBytes == null
                        ? OptionalInt.empty()
                        : Moe.largestMaxTokensPerRank(config, budgetBytes);
        if (json) {
            printJson(plan, largest);
        } else {
            print(plan, largest);
        }
        return ExitCodes.OK;
    }

    private void printJson(MemoryPlan plan, OptionalInt largest) throws IOException {
        Report report =
                new Report(
                        plan.title(),
                        plan.entries(),
                        plan.totalBytes(),
                        budgetBytes,
                        budgetBytes == null ? null : largest.orElse(0));
        out().println(
                        new ObjectMapper()
                                .enable(SerializationFeature.INDENT_OUTPUT)
                                .writeValueAsString(report));
    }

    private void print(MemoryPlan plan, OptionalInt largest) {
        out().print(plan);
        if (budgetBytes != null) {
            String budget = MemoryPlan.human(budgetBytes);
            if (largest.isPresent()) {
                out().printf("%nlargest maxTokensPerRank in %s: %d%n", budget, largest.getAsInt());
            } else {
                out().printf("%nnot even one token per rank fits into %s%n", budget);
            }
        }
        out().flush();
    }
}
