package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.micrometer.core.instrument.Meter;
import io.micrometer.core.instrument.simple.SimpleMeterRegistry;
import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Checker;
import io.moe4j.cli.Main;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.metrics.MoeMetrics;
import io.moe4j.model.Activation;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.weights.Checkpoint;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.lang.reflect.Field;
import java.lang.reflect.Modifier;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Set;
import java.util.TreeSet;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import jdk.jfr.DataAmount;
import jdk.jfr.Event;
import jdk.jfr.EventType;
import jdk.jfr.StackTrace;
import jdk.jfr.Timespan;
import jdk.jfr.ValueDescriptor;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestFactory;
import picocli.CommandLine;

/** What the documentation says about links, commands, tests, sizes and families is true. */
class DocsTest {
    private static final Pattern LINK = Pattern.compile("\\]\\(([^)\\s]+)\\)");
    private static final Pattern TEST_NAME = Pattern.compile("`(should[A-Z]\\w+)`");
    private static final Pattern OPTION = Pattern.compile("`(--[a-z][a-z-]*)");
    private static final Pattern INLINE_COMMAND = Pattern.compile("`moe4j ([a-z][^`]*)`");
    private static final Pattern INLINE_MAKE = Pattern.compile("`make ([a-z][a-z-]*)`");
    private static final Pattern PROPERTY =
            Pattern.compile(
                    "(?:getProperty|getBoolean|getInteger|getLong)\\(\\s*\"(moe4j\\.[\\w.]+)\"");
    private static final Pattern VARIABLE = Pattern.compile("(?:get|getenv)\\(\"(MOE4J_\\w+)\"");
    private static final Pattern SCRIPT_VARIABLE = Pattern.compile("\\$\\{(MOE4J_\\w+)");
    private static final Path MAIN = Path.of("src/main/java/io/moe4j");
    private static final Path CUDA = Path.of("src/main/cuda");
    private static final List<String> MAKEFILES =
            List.of(
                    "Makefile",
                    "kernels.mk",
                    "native.mk",
                    "bundle.mk",
                    "model.mk",
                    "artifact.mk",
                    "engines.mk");

    @TestFactory
    Stream<DynamicTest> shouldLinkOnlyToFilesAndHeadingsThatExist() {
        return pages().map(
                        page -> DynamicTest.dynamicTest(page.toString(), () -> checkLinks(page)));
    }

    @TestFactory
    Stream<DynamicTest> shouldShowOnlyCommandsThatTheCommandLineAccepts() {
        return pages().flatMap(page -> commands(page).map(c -> commandTest(page, c)));
    }

    @Test
    void shouldNameOnlyOptionsThatExist() {
        Set<String> known = new TreeSet<>();
        for (CommandLine command : Main.commandLine().getSubcommands().values()) {
            known.addAll(command.getCommandSpec().optionsMap().keySet());
            for (CommandLine nested : command.getSubcommands().values()) {
                known.addAll(nested.getCommandSpec().optionsMap().keySet());
            }
        }
        pages().forEach(
                        page ->
                                assertThat(known)
                                        .as(page.toString())
                                        .containsAll(groups(OPTION, withoutCode(page))));
    }

    @Test
    void shouldDocumentEveryOptionOfEveryCommand() {
        Main.commandLine()
                .getSubcommands()
                .forEach(
                        (name, command) -> {
                            if (command.getSubcommands().isEmpty()) {
                                assertDocumented("docs/checker.md", name, command);
                            }
                        });
        Main.commandLine()
                .getSubcommands()
                .get("bench")
                .getSubcommands()
                .forEach(
                        (name, command) ->
                                assertDocumented("docs/benchmarks.md", "bench " + name, command));
    }

    private static void assertDocumented(String page, String name, CommandLine command) {
        if (name.endsWith("help")) {
            return;
        }
        String section = section(read(Path.of(page)), "## moe4j " + name);
        command.getCommandSpec().options().stream()
                .map(option -> option.longestName())
                .filter(o -> !List.of("--help", "--version", "--stacktrace").contains(o))
                .forEach(o -> assertThat(section).as("%s, %s", page, name).contains("`" + o + "`"));
    }

    @Test
    void shouldCiteOnlyTestsThatExist() {
        String sources = sources(Path.of("src/test/java")) + sources(Path.of("engines"));
        pages().forEach(
                        page ->
                                groups(TEST_NAME, read(page))
                                        .forEach(
                                                name ->
                                                        assertThat(sources)
                                                                .as("%s cites %s", page, name)
                                                                .contains(" " + name + "(")));
    }

    @Test
    void shouldListEveryModelFamily() throws IOException {
        JsonNode root =
                new ObjectMapper()
                        .readTree(
                                Checkpoint.class.getResource(
                                        "/io/moe4j/weights/model-families.json"));
        String readme = section(read(Path.of("README.md")), "## Models");
        String page = read(Path.of("docs/checkpoints.md"));
        for (JsonNode family : root.get("families")) {
            String name = family.get("name").textValue();
            assertThat(readme).contains("| `" + name + "` |");
            assertThat(section(page, "## Families")).contains("| `" + name + "` |");
            for (JsonNode type : family.get("modelTypes")) {
                assertThat(readme).contains("`" + type.textValue() + "`");
            }
            if (family.has("blocks")) {
                for (JsonNode field : family.get("experts")) {
                    assertThat(page).contains("`" + field.get("arrangement").textValue() + "`");
                }
            }
        }
        root.get("refused")
                .fieldNames()
                .forEachRemaining(
                        type -> assertThat(page).contains(type.replaceFirst("_text$", "")));
    }

    @Test
    void shouldListEveryGoldenFolderAndPresetAndPhase() throws IOException {
        String checker = read(Path.of("docs/checker.md"));
        try (Stream<Path> folders = Files.list(Path.of("src/test/resources/golden"))) {
            folders.forEach(f -> assertThat(checker).contains("`" + f.getFileName() + "`"));
        }
        for (ModelPreset preset : ModelPreset.values()) {
            assertThat(checker).contains("`" + preset.id() + "`");
        }
        for (Phase phase : Phase.values()) {
            assertThat(read(Path.of("docs/architecture.md"))).contains(phase.name());
        }
        for (RoutingRule.Scoring scoring : RoutingRule.Scoring.values()) {
            assertThat(read(Path.of("docs/routing.md"))).contains("**" + scoring + "**");
        }
    }

    @Test
    void shouldGiveEveryBufferOfThePlanWithItsFormula() {
        String page = read(Path.of("docs/memory.md"));
        for (String backend : List.of("cpu", "cuda")) {
            MemoryPlan plan =
                    Moe.plan(
                            MoeConfig.builder()
                                    .shape(new MoeShape(64, 32, 8, 2, 16))
                                    .rule(RoutingRule.topKSoftmax())
                                    .activation(Activation.swiGlu())
                                    .expertBias(true)
                                    .routingInput(RoutingInput.HIDDEN)
                                    .backend(backend)
                                    .build());
            String part = section(page, "## " + backend.toUpperCase(Locale.ROOT) + " backend");
            for (MemoryPlan.Entry entry : plan.entries()) {
                assertThat(part).contains("| " + entry.name() + " | `" + entry.formula() + "` |");
            }
            long rows =
                    part.lines()
                            .filter(line -> line.matches("\\| [a-z_() ]+ \\| `.*` \\|.*"))
                            .count();
            assertThat(rows).as(backend).isEqualTo(plan.entries().size());
        }
    }

    /** Every program in the documentation is a marked region of a file that is compiled. */
    @TestFactory
    Stream<DynamicTest> shouldShowOnlyProgramsThatAreCompiled() {
        return pages().filter(page -> read(page).contains("```java"))
                .map(page -> DynamicTest.dynamicTest(page.toString(), () -> checkPrograms(page)));
    }

    private static void checkPrograms(Path page) {
        List<String> lines = read(page).lines().toList();
        for (int i = 0; i < lines.size(); i++) {
            if (!lines.get(i).equals("```java")) {
                continue;
            }
            String mark = lines.get(i - 1);
            assertThat(mark).as(page + " line " + i).matches("<!-- from: \\S+ \\S+ -->");
            String[] words = mark.split(" ");
            String source = read(Path.of(words[2]));
            String begin = "// docs: begin " + words[3] + "\n";
            int from = source.indexOf(begin);
            int to = source.indexOf("// docs: end " + words[3] + "\n");
            assertThat(from).as(mark).isNotNegative().isLessThan(to);
            String region = source.substring(from + begin.length(), source.lastIndexOf('\n', to));
            String shown =
                    lines.stream()
                            .skip(i + 1L)
                            .takeWhile(line -> !line.equals("```"))
                            .collect(Collectors.joining("\n"));
            assertThat(shown).as(mark).isEqualTo(region.stripTrailing().stripIndent().strip());
        }
    }

    @Test
    void shouldListEveryKernelAndPhaseOfAStep() {
        String page =
                section(read(Path.of("docs/architecture.md")), "## Kernels of a step on CUDA");
        List<String> kernels =
                read(CUDA.resolve("kernels.def"))
                        .lines()
                        .filter(line -> line.startsWith("moe_"))
                        .map(line -> line.split("\\s+")[0])
                        .toList();
        assertThat(kernels).isNotEmpty().allSatisfy(kernel -> assertThat(page).contains(kernel));
        Set<String> named = new TreeSet<>();
        pages().filter(other -> !other.endsWith("checkpoints.md")) // fields of config.json
                .forEach(
                        other ->
                                named.addAll(
                                        groups(Pattern.compile("`(moe_[a-z_]+)`"), read(other))));
        assertThat(kernels).containsAll(named);
    }

    @Test
    void shouldDescribeTheOrderingOfTheCode() {
        String page = read(Path.of("docs/ordering.md"));
        String instructions =
                read(CUDA.resolve("ptx/ld_st.cuh")) + read(CUDA.resolve("ptx/globaltimer.cuh"));
        String signal = read(CUDA.resolve("comm/signal.cuh"));
        for (String function :
                groups(Pattern.compile("__forceinline__ \\w+ (\\w+)\\("), instructions)) {
            assertThat(page).contains("`" + function + "`");
        }
        List<String> shown = groups(Pattern.compile("`((?:ld|st|fence)\\.[\\w.]+)`"), page);
        assertThat(shown).isNotEmpty().allMatch(text -> instructions.contains(text));
        for (String instruction :
                groups(
                        Pattern.compile("asm volatile\\(\"((?:ld|st|fence)\\S+?)[ ;]"),
                        instructions)) {
            assertThat(shown).contains(instruction);
        }
        for (String field : DeviceStructs.ERROR_RECORD.offsets().keySet()) {
            assertThat(section(page, "## Faults")).contains("`" + field + "`");
        }
        assertThat(signal)
                .contains("kPollsPerClockRead = 64")
                .contains(
                        "kDispatchSent = 0, kCombineSent = 1, kCombineDone = 2, kFaultClaimed = 7");
        assertThat(page).contains("read every 64 polls").contains("`arrivals[7]` u32");
        assertThat(page)
                .contains(MoeConfig.STEP_TIMEOUT.toSeconds() + " s unless `stepTimeout`")
                .contains(
                        MoeConfig.FIRST_STEP_TIMEOUT.toSeconds() + " s unless `firstStepTimeout`");
    }

    @Test
    void shouldListEveryPropertyAndVariable() {
        String table = section(read(Path.of("docs/gpu.md")), "## Properties and variables");
        String code = sources(Path.of("src/main/java")) + sources(Path.of("src/test/java"));
        Set<String> names = new TreeSet<>(groups(PROPERTY, code));
        names.addAll(groups(VARIABLE, code));
        for (String script : List.of("bin/moe4j", "src/main/bundle/run")) {
            names.addAll(groups(SCRIPT_VARIABLE, read(Path.of(script))));
        }
        assertThat(names).contains("moe4j.cuda.device", "MOE4J_CUDA_LIBS", "MOE4J_JAVA_OPTS");
        assertThat(names).allSatisfy(name -> assertThat(table).contains("`" + name + "`"));
        assertThat(groups(Pattern.compile("`(moe4j\\.[\\w.]+|MOE4J_\\w+)`"), table))
                .allSatisfy(name -> assertThat(names).contains(name));
    }

    /** Each event with each field and its type, and nothing else. */
    @Test
    void shouldListEveryEventWithItsFields() throws Exception {
        String page = section(read(Path.of("docs/observability.md")), "## Flight Recorder");
        Set<String> events = new TreeSet<>();
        for (Class<?> type : Class.forName("io.moe4j.observe.JfrEvents").getDeclaredClasses()) {
            if (!Event.class.isAssignableFrom(type)) {
                continue;
            }
            EventType event = EventType.getEventType(type.asSubclass(Event.class));
            events.add(event.getName());
            String heading = "### " + event.getName() + "\n";
            assertThat(page).contains(heading);
            int from = page.indexOf(heading) + heading.length();
            int to = page.indexOf("\n### ", from);
            String part = to < 0 ? page.substring(from) : page.substring(from, to);
            List<String> rows = new ArrayList<>();
            for (Field field : type.getDeclaredFields()) {
                if (Modifier.isStatic(field.getModifiers())
                        || List.of("startTime", "duration").contains(field.getName())) {
                    continue; // put there by the JVM
                }
                ValueDescriptor value = event.getField(field.getName());
                assertThat(value).as(field.toString()).isNotNull();
                String unit = "";
                if (value.getAnnotation(DataAmount.class) != null) {
                    unit = "bytes";
                } else if (value.getAnnotation(Timespan.class) != null) {
                    assertThat(value.getAnnotation(Timespan.class).value())
                            .isEqualTo(Timespan.NANOSECONDS);
                    unit = "nanoseconds";
                }
                String row = "| `" + field.getName() + "` | " + field.getType().getSimpleName();
                rows.add(row);
                assertThat(part.lines()).anyMatch(l -> l.startsWith(row + " | "));
                if (!unit.isEmpty()) {
                    assertThat(part).contains(row + " | " + unit + " | ");
                }
            }
            assertThat(part.lines().filter(line -> line.startsWith("| `")))
                    .as(event.getName())
                    .hasSameSizeAs(rows);
            boolean withStack =
                    type.getAnnotation(StackTrace.class) == null
                            || type.getAnnotation(StackTrace.class).value();
            assertThat(part.contains("With a stack trace.")).as(heading).isEqualTo(withStack);
        }
        assertThat(events).hasSize(6);
        assertThat(groups(Pattern.compile("(?m)^### (moe4j\\.\\w+)$"), page))
                .containsExactlyInAnyOrderElementsOf(events);
    }

    @Test
    void shouldListEveryMeterWithItsKindAndUnit() {
        String page = section(read(Path.of("docs/observability.md")), "## Micrometer");
        SimpleMeterRegistry registry = new SimpleMeterRegistry();
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(MoeShape.of(64, 32, 8, 2), 1))
                        .backend("cpu")
                        .build();
        List<String> rows = new ArrayList<>();
        try (MoeLayer layer = Moe.open(config)) {
            new MoeMetrics(layer, "any").bindTo(registry);
            for (Meter meter : registry.getMeters()) {
                Meter.Id id = meter.getId();
                String unit = id.getBaseUnit() == null ? "" : id.getBaseUnit() + " ";
                String kind = id.getType().name().toLowerCase(Locale.ROOT);
                rows.add("| `" + id.getName() + "` | " + kind + " | " + unit + "| ");
            }
        }
        assertThat(rows).hasSize(8).allSatisfy(row -> assertThat(page).contains("\n" + row));
        assertThat(page.lines().filter(line -> line.startsWith("| `moe4j."))).hasSize(8);
        String version = constantOf("pom.xml", "<micrometer.version>([^<]+)<");
        assertThat(page).contains("tested with " + version);
        assertThat(read(Path.of("docs/gpu.md")))
                .contains("`io.micrometer:micrometer-core:" + version + "`");
    }

    @Test
    void shouldNameTheRangesOfTheCode() {
        String page = section(read(Path.of("docs/observability.md")), "## NVTX");
        String code = read(MAIN.resolve("cuda/RangedLayer.java"));
        List<String> ranges =
                groups(Pattern.compile("(?m)^\\| `(moe4j: [^`]+), layer N` \\|"), page);
        assertThat(ranges).hasSize(5);
        for (String range : ranges) {
            String word = range.replace("ROUTE..DISPATCH_RECV", "");
            assertThat(code).contains("\"" + word);
        }
    }

    private static String constantOf(String file, String pattern) {
        return groups(Pattern.compile(pattern), read(Path.of(file))).get(0);
    }

    /** Messages in tables whose first column is a message; "…" stands for what varies. */
    @Test
    void shouldQuoteMessagesOfTheCode() {
        String code = sources(Path.of("src/main/java")).replaceAll("\"\\s*\\+\\s*\"", "");
        List<String> messages =
                new ArrayList<>(
                        groups(
                                Pattern.compile("(?m)^\\| `([^`]+)` \\|"),
                                section(read(Path.of("docs/gpu.md")), "## Troubleshooting")));
        messages.addAll(
                groups(
                        Pattern.compile("`([a-z][^`]* [^`]* [^`]*)`"),
                        String.join(
                                "\n",
                                section(
                                                read(Path.of("docs/graphs.md")),
                                                "## What breaks a capture, and how you hear of it")
                                        .lines()
                                        .filter(line -> line.contains("Exception"))
                                        .map(line -> line.substring(line.indexOf("Exception")))
                                        .toList())));
        messages.addAll(
                groups(
                        Pattern.compile("(?m)^\\| [^|`]+ \\| `([^`]+)`"),
                        section(
                                read(Path.of("docs/engines.md")),
                                "### What goes wrong, and what you hear")));
        assertThat(messages).hasSizeGreaterThan(40);
        for (String message : messages) {
            for (String part :
                    message.split(
                            "…|EXPERTS|ROUTE|hidden is|cuDNN: not|libcud\\S+|prepare was|rank 0: hidden")) {
                if (part.strip().length() > 3) {
                    assertThat(code).as(message).contains(part.strip());
                }
            }
        }
    }

    @Test
    void shouldGiveTheCoordinatesOfTheBuild() {
        String page = read(Path.of("docs/gpu.md"));
        String pom = read(Path.of("pom.xml"));
        for (String[] library :
                new String[][] {
                    {"org.jcuda", "jcuda", "jcuda.version"},
                    {"org.jcuda", "jcublas", "jcuda.version"},
                    {"org.jcuda", "jcudnn", "jcudnn.version"},
                    {"net.java.dev.jna", "jna", "jna.version"}
                }) {
            Pattern property = Pattern.compile("<" + library[2] + ">([^<]+)<");
            String version = groups(property, pom).get(0);
            assertThat(page).contains("`" + library[0] + ":" + library[1] + ":" + version + "`");
            if (library[0].equals("org.jcuda")) {
                assertThat(pom).contains("<artifactId>" + library[1] + "-natives</artifactId>");
                assertThat(page)
                        .contains(
                                "`org.jcuda:"
                                        + library[1]
                                        + "-natives:"
                                        + version
                                        + ":linux-x86_64`");
            }
        }
        String build = read(CUDA.resolve("build.sh"));
        List<String> images = groups(Pattern.compile("entry (moe4j-\\S+)"), build);
        assertThat(images).hasSize(3);
        assertThat(images).allSatisfy(image -> assertThat(page).contains("| `" + image + "` |"));
    }

    @Test
    void shouldGiveTheLimitsOfTheCode() {
        String architecture = read(Path.of("docs/architecture.md"));
        assertThat(architecture)
                .contains("1 to " + MoeConfig.MAX_RANKS)
                .contains("at most " + MoeShape.MAX_TOP_K)
                .contains("inputs in blocks of " + constant("cpu/PackedMatrix.java", "BLOCK"));
        assertThat(read(Path.of("docs/decisions/002-float32-cpu-order.md")))
                .contains("tiles of " + constant("cpu/PackedMatrix.java", "TILE") + " outputs")
                .contains("Up to " + constant("cpu/CpuMaskedGemm.java", "ROW_BLOCK") + " rows");
        assertThat(read(Path.of("docs/checker.md")))
                .contains("is 1e-5 on the CPU")
                .contains("it is 6e-3");
        assertThat(Checker.CPU_TOLERANCE).isEqualTo(1e-5);
        assertThat(Checker.CUDA_TOLERANCE).isEqualTo(6e-3);
        String memory = read(Path.of("docs/memory.md"));
        assertThat(memory)
                .contains(
                        DeviceStructs.STEP_PARAMS.size()
                                + " and "
                                + DeviceStructs.LOCAL_RANK.size()
                                + " bytes")
                .contains("R·" + DeviceStructs.LOCAL_RANK.size() + " bytes")
                .contains("up to a multiple of " + DeviceLayout.PAD)
                .contains("tiles of " + DeviceLayout.TILE_ROWS + " outputs × 64 inputs, 16 KiB")
                .contains("at most 1024 experts of a rank");
        assertThat(read(Path.of("docs/graphs.md")))
                .contains("the " + DeviceStructs.STEP_PARAMS.size() + " bytes of `StepParams`");
        assertThat(read(CUDA.resolve("layout/step_params.cuh")))
                .contains("kPad = " + DeviceLayout.PAD + ";")
                .contains("kTileRows = " + DeviceLayout.TILE_ROWS + ";")
                .contains("kTileCols = 64;");
        assertThat(read(CUDA.resolve("scheduler/masked.cuh")))
                .contains("kTokenBlock = 64;")
                .contains("kThreads = 256;")
                .contains("kMaxExperts = 4 * kThreads;");
        assertThat(read(Path.of("docs/checkpoints.md")))
                .contains(grouped(constant("weights/SafetensorsHeader.java", "MAX_HEADER_BYTES")))
                .contains(grouped(constant("weights/SafetensorsHeader.java", "MAX_TENSORS")))
                .contains(constant("weights/SafetensorsHeader.java", "MAX_RANK") + " dimensions");
    }

    @Test
    void shouldShowTheDemoAsItPrints() {
        String demo =
                run(
                        "demo",
                        "--checkpoint",
                        "src/test/resources/golden/qwen3_moe",
                        "--backend",
                        "cpu",
                        "--steps",
                        "1");
        List<String> shown =
                read(Path.of("README.md"))
                        .lines()
                        .dropWhile(line -> !line.equals("$ make demo"))
                        .skip(1)
                        .takeWhile(line -> !line.equals("```"))
                        .filter(line -> !line.startsWith("backend ") && !line.equals("..."))
                        .filter(line -> !line.contains("e-0")) // errors: exp differs by JVM
                        .toList();
        assertThat(demo.lines().toList()).containsSubsequence(shown);
    }

    @Test
    void shouldShowPlansAsTheyPrint() {
        int plans = 0;
        for (Path page : pages().toList()) {
            List<String> lines = read(page).lines().toList();
            for (int i = 0; i < lines.size(); i++) {
                if (lines.get(i).startsWith("$ bin/moe4j plan ")) {
                    String shownCall = lines.get(i).substring("$ bin/moe4j ".length());
                    boolean named = shownCall.contains(" --backend ");
                    String[] args = (shownCall + (named ? "" : " --backend cpu")).split(" ");
                    String shown =
                            lines.stream()
                                    .skip(i + 1L)
                                    .takeWhile(line -> !line.equals("```"))
                                    .collect(Collectors.joining("\n"));
                    assertThat(run(args).strip()).as(page + ": " + lines.get(i)).isEqualTo(shown);
                    plans++;
                }
            }
        }
        assertThat(plans).isPositive();
    }

    private static void checkLinks(Path page) {
        for (String link : groups(LINK, withoutCode(page))) {
            if (link.matches("https?://.*")) {
                continue;
            }
            String[] parts = link.split("#", 2);
            Path target =
                    parts[0].isEmpty()
                            ? page
                            : page.toAbsolutePath().getParent().resolve(parts[0]).normalize();
            assertThat(target).as("link %s", link).exists();
            if (parts.length == 2) {
                assertThat(anchors(target)).as("link %s", link).contains(parts[1]);
            }
        }
    }

    private static Set<String> anchors(Path page) {
        return read(page)
                .lines()
                .filter(line -> line.matches("#{1,6} .*"))
                .map(line -> line.replaceFirst("#+ ", "").toLowerCase(Locale.ROOT))
                .map(title -> title.replaceAll("[^\\p{L}\\p{N} _-]", "").replace(' ', '-'))
                .collect(Collectors.toCollection(TreeSet::new));
    }

    /** Commands in console blocks, and {@code moe4j ...} between backticks. */
    private static Stream<String> commands(Path page) {
        Stream<String> shown =
                read(page)
                        .lines()
                        .filter(line -> line.startsWith("$ "))
                        .map(line -> line.substring(2).replaceFirst("^bin/moe4j ", "moe4j "));
        Stream<String> inline =
                groups(INLINE_COMMAND, withoutCode(page)).stream().map(c -> "moe4j " + c);
        Stream<String> makes =
                groups(INLINE_MAKE, withoutCode(page)).stream().map(c -> "make " + c);
        return Stream.of(shown, inline, makes).flatMap(s -> s).distinct();
    }

    private static DynamicTest commandTest(Path page, String command) {
        return DynamicTest.dynamicTest(
                page + ": " + command,
                () -> {
                    String[] words = command.split(" ");
                    if (words[0].equals("make")) {
                        String targets =
                                MAKEFILES.stream()
                                        .map(file -> read(Path.of(file)))
                                        .collect(Collectors.joining("\n"));
                        assertThat(targets).contains("\n" + words[1] + ":");
                        return;
                    }
                    assertThat(words[0]).isEqualTo("moe4j");
                    CommandLine sub = Main.commandLine().getSubcommands().get(words[1]);
                    assertThat(sub).as("subcommand %s", words[1]).isNotNull();
                    boolean mention = words.length == 2 || command.matches(".* --[a-z-]+");
                    int named = 2;
                    if (words.length > 2 && sub.getSubcommands().containsKey(words[2])) {
                        sub = sub.getSubcommands().get(words[2]);
                        named = 3;
                    }
                    if (mention) { // names a command and perhaps one option, not a whole call
                        assertThat(sub.getCommandSpec().optionsMap().keySet())
                                .containsAll(Arrays.asList(words).subList(named, words.length));
                    } else {
                        Main.commandLine().parseArgs(Arrays.copyOfRange(words, 1, words.length));
                    }
                });
    }

    private static String run(String... args) {
        StringWriter out = new StringWriter();
        Main.commandLine().setOut(new PrintWriter(out)).execute(args);
        return out.toString();
    }

    private static Stream<Path> pages() {
        List<Path> pages = new ArrayList<>();
        for (Path folder : List.of(Path.of("."), Path.of("docs"), Path.of("docs/decisions"))) {
            try (Stream<Path> files = Files.list(folder)) {
                files.filter(f -> f.toString().endsWith(".md"))
                        .map(Path::normalize)
                        .forEach(pages::add);
            } catch (IOException e) {
                throw new AssertionError(e);
            }
        }
        return pages.stream().sorted();
    }

    private static String withoutCode(Path page) {
        StringBuilder text = new StringBuilder();
        boolean code = false;
        for (String line : read(page).lines().toList()) {
            if (line.startsWith("```")) {
                code = !code;
            } else if (!code) {
                text.append(line).append('\n');
            }
        }
        return text.toString();
    }

    private static String section(String page, String heading) {
        int from = ("\n" + page).indexOf("\n" + heading + "\n");
        assertThat(from).as("heading %s", heading).isNotNegative();
        int to = page.indexOf("\n## ", from + heading.length());
        return to < 0 ? page.substring(from) : page.substring(from, to);
    }

    private static String constant(String file, String name) {
        return constant(file, name, "");
    }

    private static String constant(String file, String name, String suffix) {
        List<String> found =
                groups(
                        Pattern.compile("\\b" + name + " = ([\\d_]+)" + suffix + ";"),
                        read(MAIN.resolve(file)));
        assertThat(found).as("%s in %s", name, file).hasSize(1);
        return found.get(0).replace("_", "");
    }

    private static String grouped(String digits) {
        return String.format(Locale.ROOT, "%,d", Long.parseLong(digits));
    }

    private static String sources(Path root) {
        try (Stream<Path> files = Files.walk(root)) {
            return files.filter(f -> f.toString().endsWith(".java"))
                    .map(DocsTest::read)
                    .collect(Collectors.joining("\n"));
        } catch (IOException e) {
            throw new AssertionError(e);
        }
    }

    private static List<String> groups(Pattern pattern, String text) {
        return pattern.matcher(text).results().map((MatchResult m) -> m.group(1)).toList();
    }

    private static String read(Path file) {
        try {
            return Files.readString(file);
        } catch (IOException e) {
            throw new AssertionError(e);
        }
    }
}
