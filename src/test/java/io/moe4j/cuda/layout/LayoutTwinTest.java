package io.moe4j.cuda.layout;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.ChildJvm;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The Java twins of the device structs have the compiler's sizes and offsets, and all fields. */
class LayoutTwinTest {
    private static final Path CUDA = Path.of("src/main/cuda");
    private static final Path LAYOUT = CUDA.resolve("layout");

    /** Structs of device code only. */
    private static final List<String> DEVICE_ONLY = List.of("Symmetric", "ReceivedTokens");

    @TempDir Path temp;

    @Test
    void shouldLayOutEveryStructAsTheCompilerDoes() throws Exception {
        assumeTrue(hasNvcc(), "nvcc is not installed, so sizes and offsets cannot be compiled");
        Map<String, Integer> java = new TreeMap<>();
        for (CStruct struct : DeviceStructs.ALL) {
            java.put(struct.name(), struct.size());
            struct.offsets().forEach((field, at) -> java.put(struct.name() + "." + field, at));
        }
        assertThat(compiled(program())).isEqualTo(java);
    }

    @Test
    void shouldNameTheFieldsOfTheSourcesInOrder() throws IOException {
        Map<String, List<String>> sources = structsOfTheSources();
        Map<String, List<String>> java = new TreeMap<>();
        for (CStruct struct : DeviceStructs.ALL) {
            java.put(struct.name(), List.copyOf(struct.offsets().keySet()));
        }
        sources.keySet().removeAll(DEVICE_ONLY);
        assertThat(sources).isEqualTo(java);
    }

    @Test
    void shouldKnowTheLimitsOfTheKernels() throws Exception {
        assumeTrue(hasNvcc(), "nvcc is not installed, so constants cannot be compiled");
        String names = "kPad kTileRows kMaxTopK kMaxRanks kMaxGroups scheduler::kMaxExperts";
        StringBuilder main = new StringBuilder(includes());
        main.append("#include \"scheduler/masked.cuh\"\n#include \"kernels/route_topk.cu\"\n");
        main.append("int main() {\n");
        for (String name : names.split(" ")) {
            main.append("printf(\"").append(name).append(" %d\\n\", moe::").append(name);
            main.append(");\n");
        }
        assertThat(compiled(main.append("return 0; }\n").toString()))
                .isEqualTo(
                        new TreeMap<>(
                                Map.of(
                                        "kPad", DeviceLayout.PAD,
                                        "kTileRows", DeviceLayout.TILE_ROWS,
                                        "kMaxTopK", MoeShape.MAX_TOP_K,
                                        "kMaxRanks", MoeConfig.MAX_RANKS,
                                        "kMaxGroups", DeviceLayout.MAX_GROUPS,
                                        "scheduler::kMaxExperts",
                                                DeviceLayout.MAX_EXPERTS_PER_RANK)));
    }

    @Test
    void shouldRefuseWhatTheKernelsCannotRun() {
        MoeConfig.Builder many =
                MoeConfig.builder().shape(MoeShape.of(64, 64, 2050, 4)).maxTokensPerRank(4);
        assertThatThrownBy(() -> new DeviceLayout(many.ranks(2).build()))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("experts per rank=1025")
                .hasMessageContaining("limit 1024: use more ranks");
        new DeviceLayout(many.ranks(3).build());
        MoeConfig grouped =
                many.routingInput(RoutingInput.LOGITS)
                        .rule(RoutingRule.sigmoidGrouped(1025, 2, true, 1f))
                        .build();
        assertThatThrownBy(() -> new DeviceLayout(grouped))
                .hasMessageContaining("groups=1025 exceeds the CUDA backend's limit 1024");
        MoeConfig rows =
                MoeConfig.builder()
                        .shape(MoeShape.of(64, 64, 128, 32))
                        .ranks(4)
                        .maxTokensPerRank(33_000_000)
                        .build();
        assertThatThrownBy(() -> new DeviceLayout(rows))
                .hasMessageContaining("packed rows")
                .hasMessageContaining("lower maxTokensPerRank");
    }

    /** Prints "Struct size" and "Struct.field offset" for all that Java describes. */
    private static String program() throws IOException {
        StringBuilder main = new StringBuilder(includes()).append("int main() {\n");
        for (CStruct struct : DeviceStructs.ALL) {
            main.append("printf(\"").append(struct.name()).append(" %zu\\n\", sizeof(moe::");
            main.append(struct.name()).append("));\n");
            for (String field : struct.offsets().keySet()) {
                main.append("printf(\"").append(struct.name()).append('.').append(field);
                main.append(" %zu\\n\", offsetof(moe::").append(struct.name()).append(", ");
                main.append(field.replaceFirst("^reserved(\\d)$", "reserved[$1]")).append("));\n");
            }
        }
        return main.append("return 0; }\n").toString();
    }

    private static String includes() throws IOException {
        StringBuilder includes = new StringBuilder("#include <cstddef>\n#include <cstdio>\n");
        try (Stream<Path> files = Files.list(LAYOUT)) {
            files.sorted()
                    .forEach(
                            file ->
                                    includes.append("#include \"layout/")
                                            .append(file.getFileName())
                                            .append("\"\n"));
        }
        return includes.toString();
    }

    private Map<String, Integer> compiled(String source) throws Exception {
        Path file = Files.writeString(temp.resolve("layout.cu"), source);
        Path binary = temp.resolve("layout");
        ChildJvm.Result build =
                ChildJvm.execute(
                        List.of(
                                "nvcc",
                                "-std=c++17",
                                "-gencode",
                                "arch=compute_80,code=compute_80",
                                "-I" + CUDA.toAbsolutePath(),
                                "-o",
                                binary.toString(),
                                file.toString()),
                        Map.of());
        assertThat(build.exit()).as(build.output()).isZero();
        ChildJvm.Result run = ChildJvm.execute(List.of(binary.toString()), Map.of());
        assertThat(run.exit()).as(run.output()).isZero();
        Map<String, Integer> values = new TreeMap<>();
        run.output()
                .lines()
                .map(line -> line.split(" "))
                .forEach(words -> values.put(words[0], Integer.parseInt(words[1])));
        return values;
    }

    /** Field names by struct; an array field appears once per element. */
    private static Map<String, List<String>> structsOfTheSources() throws IOException {
        Pattern struct =
                Pattern.compile("(?ms)^struct (?:alignas\\(\\d+\\) )?(\\w+) \\{(.*?)^\\};");
        Pattern field = Pattern.compile("(?m)^    [^(]*?(\\w+)(?:\\[(\\d+)\\])?;");
        Map<String, List<String>> found = new TreeMap<>();
        try (Stream<Path> files = Files.list(LAYOUT)) {
            for (Path file : files.toList()) {
                Matcher structs = struct.matcher(Files.readString(file));
                while (structs.find()) {
                    List<String> names = new ArrayList<>();
                    Matcher fields = field.matcher(structs.group(2));
                    while (fields.find()) {
                        if (fields.group(2) == null) {
                            names.add(fields.group(1));
                        }
                        for (int i = 0;
                                fields.group(2) != null && i < Integer.parseInt(fields.group(2));
                                i++) {
                            names.add(fields.group(1) + i);
                        }
                    }
                    found.put(structs.group(1), names);
                }
            }
        }
        return found;
    }

    private static boolean hasNvcc() {
        try {
            return ChildJvm.execute(List.of("nvcc", "--version"), Map.of()).exit() == 0;
        } catch (IOException e) {
            return false;
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            return false;
        }
    }
}
