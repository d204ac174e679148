package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.Phase;
import io.moe4j.RoutingInput;
import io.moe4j.checker.Checker;
import io.moe4j.cli.Main;
import io.moe4j.model.Activation;
import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.weights.Checkpoint;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
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
    private static final Path MAIN = Path.of("src/main/java/io/moe4j");

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
        String sources = sources(Path.of("src/test/java"));
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
        MemoryPlan plan =
                Moe.plan(
                        MoeConfig.builder()
                                .shape(new MoeShape(64, 32, 8, 2, 16))
                                .rule(RoutingRule.topKSoftmax())
                                .activation(Activation.swiGlu())
                                .expertBias(true)
                                .routingInput(RoutingInput.HIDDEN)
                                .backend("cpu")
                                .build());
        String page = read(Path.of("docs/memory.md"));
        for (MemoryPlan.Entry entry : plan.entries()) {
            assertThat(page).contains("| " + entry.name() + " | `" + entry.formula() + "` |");
        }
        long rows = page.lines().filter(line -> line.matches("\\| [a-z ]+ \\| `.*` \\|.*")).count();
        assertThat(rows).isEqualTo(plan.entries().size());
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
                .contains("6e-3 is set aside");
        assertThat(Checker.CPU_TOLERANCE).isEqualTo(1e-5);
        assertThat(Checker.CUDA_TOLERANCE).isEqualTo(6e-3);
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
                    String[] args = (shownCall + " --backend cpu").split(" ");
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
        return Stream.concat(shown, inline).distinct();
    }

    private static DynamicTest commandTest(Path page, String command) {
        return DynamicTest.dynamicTest(
                page + ": " + command,
                () -> {
                    String[] words = command.split(" ");
                    if (words[0].equals("make")) {
                        assertThat(read(Path.of("Makefile"))).contains("\n" + words[1] + ":");
                        return;
                    }
                    assertThat(words[0]).isEqualTo("moe4j");
                    CommandLine sub = Main.commandLine().getSubcommands().get(words[1]);
                    assertThat(sub).as("subcommand %s", words[1]).isNotNull();
                    boolean mention = words.length == 2 || command.matches(".* --[a-z-]+");
                    if (mention) { // names a command and perhaps one option, not a whole call
                        Arrays.stream(words)
                                .skip(2)
                                .forEach(
                                        o ->
                                                assertThat(sub.getCommandSpec().optionsMap())
                                                        .containsKey(o));
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
        List<String> found =
                groups(Pattern.compile("\\b" + name + " = ([\\d_]+);"), read(MAIN.resolve(file)));
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
