package io.moe4j.cli;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.checker.CaseResult;
import io.moe4j.checker.CheckReport;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.GoldenFile;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.ep.Group;
import io.moe4j.weights.Checkpoint;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.OptionalDouble;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;

/** {@code moe4j check}: a checkpoint's layers on a backend against recorded or computed output. */
@Command(
        name = "check",
        description = {
            "Runs a checkpoint's Mixture-of-Experts layers on a backend and compares routing and"
                    + " outputs, token by token, with a golden file or with a float64 reference."
        },
        footer = {
            "",
            "Without a golden file, seeded random hidden states go through the backend and"
                    + " through the float64 reference. An error is the relative L2 distance of the worst token."
        })
final class CheckCommand extends BaseCommand {
    private static final int ORACLE_TOKENS = 32;
    private static final List<Integer> DEFAULT_RANKS = List.of(1, 4);

    @Option(
            names = "--checkpoint",
            paramLabel = "DIR",
            required = true,
            description = "Hugging Face folder with config.json and safetensors files.")
    private Path folder;

    @Option(
            names = "--golden",
            paramLabel = "FILE",
            description = "Recorded cases (default: golden.safetensors in the folder, if there).")
    private Path goldenPath;

    @Option(
            names = "--oracle",
            description = "Compare with the float64 reference even if there is a golden file.")
    private boolean oracle;

    @Option(
            names = "--layer",
            paramLabel = "N",
            description = "Check this layer only (default: all Mixture-of-Experts layers).")
    private Integer layer;

    @Option(
            names = "--ranks",
            paramLabel = "R",
            split = ",",
            description = {
                "Numbers of ranks to check, comma-separated (default: 1,4). With --gpus one number:"
                        + " ranks of the group (default: one on each GPU)."
            })
    private List<Integer> ranks;

    @Option(
            names = "--backend",
            defaultValue = "auto",
            description = "One of ${COMPLETION-CANDIDATES} (default: ${DEFAULT-VALUE}).")
    private BackendName backend;

    @Option(
            names = "--tokens",
            paramLabel = "T",
            description = {
                "With a golden file: only the cases with T tokens. Otherwise the number of tokens"
                        + " (default: "
                        + ORACLE_TOKENS
                        + ")."
            })
    private Integer tokens;

    @Option(
            names = "--seed",
            paramLabel = "S",
            defaultValue = "1",
            description = "Seed of the random hidden states (default: ${DEFAULT-VALUE}).")
    private long seed;

    @Option(
            names = "--tolerance",
            paramLabel = "X",
            description = {
                "Largest relative L2 error of a token (default: cpu "
                        + Checker.CPU_TOLERANCE
                        + ", cuda "
                        + Checker.CUDA_TOLERANCE
                        + ")."
            })
    private Double tolerance;

    @Option(
            names = "--debug-sync",
            description = {
                "Also run every case phase by phase, wait after each, compare all that it wrote with"
                        + " the CPU backend and name the first stage that differs. Needs the"
                        + " weights in the heap as well."
            })
    private boolean debugSync;

    @Option(
            names = "--host-sync",
            description = {
                "Also run every case with the host-sync checker: names driver calls inside a step"
                        + " that may wait, allocate or copy pageable memory (cuda only)."
            })
    private boolean hostSync;

    @Option(
            names = "--gpus",
            paramLabel = "N",
            description = {
                "Run on N GPUs, a rank on each, or --ranks R on GPU r modulo N, which share GPUs;"
                        + " also compares every bit with as many virtual ranks on one GPU."
            })
    private Integer gpus;

    @Option(
            names = "--processes",
            description = "With --gpus: a process for each GPU instead of a thread for each rank.")
    private boolean processes;

    @Option(
            names = "--rank",
            paramLabel = "R",
            split = ",",
            description = {
                "With --gpus: be rank R only, or several, comma-separated, and meet the other"
                        + " processes in --group. Rank 0 prints."
            })
    private List<Integer> rank;

    @Option(
            names = "--group",
            paramLabel = "DIR",
            description = "With --rank: directory of mode 700 in which the processes meet.")
    private Path groupFolder;

    @Option(names = "--json", description = "Print JSON.")
    private boolean json;

    @Override
    public Integer call() {
        requireUsable();
        if (gpus != null && processes && rank == null) {
            return RankProcesses.run(gpus, groupRanks(), commandLine());
        }
        Moe.Choice choice = Moe.choose(backend.toString());
        try (Checkpoint checkpoint = Checkpoint.open(LayerSource.folder(folder))) {
            Map<Integer, List<ReferenceCase>> cases =
                    usesGolden() ? goldenCases(checkpoint) : oracleCases(checkpoint);
            if (rank != null && !rank.contains(0)) {
                inGroup(checkpoint, cases); // why silent: rank 0 has all results
                return ExitCodes.OK;
            }
            List<DebugRun.Case> debugged =
                    gpus == null ? debug(checkpoint, cases) : new ArrayList<>();
            CheckReport report = gpus == null ? run(checkpoint, cases) : inGroup(checkpoint, cases);
            if (json) {
                out().println(DebugRun.addTo(report.toJson(), debugged));
            } else {
                out().printf("%s%n%s%n%n", folder, choice.reason());
                out().print(report.table());
                DebugRun.print(out(), debugged);
                out().printf("%n%s%n", report.verdict());
                DebugRun.printVerdict(out(), debugged);
            }
            out().flush();
            boolean pass = report.pass() && debugged.stream().allMatch(DebugRun.Case::pass);
            return pass ? ExitCodes.OK : ExitCodes.MISMATCH;
        }
    }

    private void requireUsable() {
        if (oracle && goldenPath != null) {
            throw new IllegalArgumentException("--oracle and --golden exclude each other");
        }
        if (tokens != null && tokens < 1) {
            throw new IllegalArgumentException("--tokens=" + tokens + " is not positive");
        }
        boolean inGroup = gpus != null;
        if (!inGroup && (processes || rank != null) || (rank == null) != (groupFolder == null)) {
            throw new IllegalArgumentException(
                    "--processes and --rank need --gpus, and --rank and --group each other");
        }
        if (inGroup && (debugSync || hostSync || backend == BackendName.CPU)) {
            throw new IllegalArgumentException(
                    "--gpus excludes --debug-sync, --host-sync and --backend cpu");
        }
        if (inGroup && ranks != null && ranks.size() != 1) {
            throw new IllegalArgumentException("--gpus takes one number of --ranks, got " + ranks);
        }
        if (tolerance != null && !(tolerance >= 0)) {
            throw new IllegalArgumentException("--tolerance=" + tolerance + " is not 0 or more");
        }
    }

    /** Numbers of virtual ranks. */
    private List<Integer> ranks() {
        return ranks == null ? DEFAULT_RANKS : ranks;
    }

    private int groupRanks() {
        return ranks == null ? gpus : ranks.get(0);
    }

    private boolean usesGolden() {
        if (goldenPath == null && !oracle) {
            Path beside = folder.resolve("golden.safetensors");
            goldenPath = Files.exists(beside) ? beside : null;
        }
        return goldenPath != null;
    }

    private Map<Integer, List<ReferenceCase>> goldenCases(Checkpoint checkpoint) {
        Map<Integer, List<ReferenceCase>> cases = new TreeMap<>();
        try (GoldenFile golden = GoldenFile.open(goldenPath)) {
            for (GoldenFile.Entry entry : golden.entries()) {
                if ((layer == null || layer == entry.layer())
                        && (tokens == null || tokens == entry.tokens())) {
                    cases.computeIfAbsent(entry.layer(), n -> new ArrayList<>())
                            .add(golden.read(entry, checkpoint.layer(entry.layer()).shape()));
                }
            }
            if (cases.isEmpty()) {
                throw new IllegalArgumentException(
                        goldenPath
                                + " has no case with that layer and token count; it has "
                                + golden.entries()
                                + ": choose one of them, or use --oracle");
            }
        }
        return cases;
    }

    private Map<Integer, List<ReferenceCase>> oracleCases(Checkpoint checkpoint) {
        Map<Integer, List<ReferenceCase>> cases = new TreeMap<>();
        List<Integer> layers = layer == null ? checkpoint.moeLayers() : List.of(layer);
        int count = tokens == null ? ORACLE_TOKENS : tokens;
        try (ConsoleProgress progress = new ConsoleProgress("reference")) {
            for (int number : layers) {
                MoeConfig config = checkpoint.layer(number).config().build();
                float[] hidden = Checker.randomHidden(seed, number, count, config.shape().hidden());
                ReferenceCase expected = Float64Oracle.of(config).expect(number, hidden, count);
                cases.put(number, List.of(expected));
                progress.progress(cases.size(), layers.size());
            }
        }
        return cases;
    }

    private List<DebugRun.Case> debug(
            Checkpoint checkpoint, Map<Integer, List<ReferenceCase>> cases) {
        List<DebugRun.Case> results = new ArrayList<>();
        if (!debugSync && !hostSync) {
            return results;
        }
        DebugRun run = new DebugRun(tolerance(), this::repeat);
        try (ConsoleProgress progress = new ConsoleProgress("debugging")) {
            int part = 0;
            int parts = 2 * cases.size() * ranks().size();
            for (Map.Entry<Integer, List<ReferenceCase>> entry : cases.entrySet()) {
                MoeConfig config = onBackend(checkpoint, entry.getKey());
                for (int count : ranks()) {
                    if (hostSync) {
                        ProgressListener packing = progress.part(part, parts);
                        results.addAll(run.hostSync(config, entry.getValue(), count, packing));
                    }
                    if (debugSync) {
                        ProgressListener packing = progress.part(part + 1, parts);
                        results.addAll(run.stages(config, entry.getValue(), count, packing));
                    }
                    part += 2;
                }
            }
        }
        return results;
    }

    private MoeConfig onBackend(Checkpoint checkpoint, int number) {
        return checkpoint.layer(number).config().backend(backend.toString()).build();
    }

    private OptionalDouble tolerance() {
        return tolerance == null ? OptionalDouble.empty() : OptionalDouble.of(tolerance);
    }

    private CheckReport run(Checkpoint checkpoint, Map<Integer, List<ReferenceCase>> cases) {
        Checker checker = new Checker(tolerance());
        List<CaseResult> results = new ArrayList<>();
        int parts = cases.size() * ranks().size();
        int part = 0;
        try (ConsoleProgress progress = new ConsoleProgress("checking")) {
            for (Map.Entry<Integer, List<ReferenceCase>> entry : cases.entrySet()) {
                MoeConfig config = onBackend(checkpoint, entry.getKey());
                for (int count : ranks()) {
                    ProgressListener packing = progress.part(part++, parts);
                    results.addAll(
                            checker.check(config, entry.getValue(), count, this::repeat, packing));
                }
            }
        }
        return new CheckReport(folder.toString(), results);
    }

    private CheckReport inGroup(Checkpoint checkpoint, Map<Integer, List<ReferenceCase>> cases) {
        List<Group> groups = rank == null ? Group.inProcess(groupRanks()) : join();
        List<CaseResult> results = Collections.synchronizedList(new ArrayList<>());
        Checker checker = new Checker(tolerance());
        try (ConsoleProgress progress = new ConsoleProgress("checking")) {
            Group.together(
                    groups,
                    group -> {
                        // why: a rank that fails leaves, so that the others need not wait for it
                        try (group) {
                            int part = 0;
                            for (Map.Entry<Integer, List<ReferenceCase>> entry : cases.entrySet()) {
                                MoeConfig config =
                                        checkpoint
                                                .layer(entry.getKey())
                                                .config()
                                                .device(group.rank() % gpus)
                                                .build();
                                ProgressListener packing =
                                        group.rank() == 0
                                                ? progress.part(part++, cases.size())
                                                : ProgressListener.NONE;
                                results.addAll(
                                        checker.checkGroup(
                                                config,
                                                entry.getValue(),
                                                group,
                                                this::repeat,
                                                packing));
                            }
                        }
                    });
        }
        return new CheckReport(folder.toString(), results);
    }

    /** The ranks of this process, which wait for each other and for those of others. */
    private List<Group> join() {
        Map<Integer, Group> joined = new ConcurrentHashMap<>();
        Group.together(
                rank,
                r -> {
                    Group group = Group.join(groupFolder, r, groupRanks(), Group.DEFAULT_LIMIT);
                    joined.put(r, group);
                });
        return List.copyOf(new TreeMap<>(joined).values());
    }

    private String repeat(ReferenceCase reference, int count, String backendName) {
        StringBuilder command = new StringBuilder();
        command.append(LayerSource.shellQuote(toolName())).append(" check --checkpoint ");
        command.append(LayerSource.shellQuote(folder.toString()));
        if (goldenPath != null) {
            command.append(" --golden ").append(LayerSource.shellQuote(goldenPath.toString()));
        } else {
            command.append(" --oracle --seed ").append(seed);
        }
        command.append(" --layer ").append(reference.layer());
        if (gpus != null) {
            command.append(" --gpus ").append(gpus);
        }
        if (gpus == null || gpus != count) {
            command.append(" --ranks ").append(count);
        }
        if (gpus != null && rank != null) {
            command.append(" --processes");
        }
        command.append(" --tokens ").append(reference.tokens());
        command.append(" --backend ").append(backendName);
        if (tolerance != null) {
            command.append(" --tolerance ").append(tolerance);
        }
        if (debugSync) {
            command.append(" --debug-sync");
        }
        if (hostSync) {
            command.append(" --host-sync");
        }
        return command.toString();
    }
}
