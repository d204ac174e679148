package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.catchThrowable;

import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.cuda.GroupMismatch;
import io.moe4j.ep.Group;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import io.moe4j.weights.Checkpoint;
import io.moe4j.weights.EngineTensor;
import io.moe4j.weights.EngineWeights;
import io.moe4j.weights.GgufType;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import org.assertj.core.api.ThrowableAssert.ThrowingCallable;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/**
 * The messages of docs/troubleshooting.md are those that a program gets which makes the mistake.
 */
class TroubleshootingTest {
    private static final Pattern ROW = Pattern.compile("(?m)^\\| `([^`]+)` \\| .+ \\|$");
    private static final MoeShape SHAPE = MoeShape.of(64, 32, 8, 2);
    private static final LayerWeights WEIGHTS = RandomWeights.of(SHAPE, 1);

    private final Tensor hidden = Tensor.allocateHost(DType.BF16, 4, 64);
    private final Tensor out = Tensor.allocateHost(DType.F32, 4, 64);
    private final Tensor ids = Tensor.allocateHost(DType.I32, 4, 2);
    private final Tensor weights = Tensor.allocateHost(DType.F32, 4, 2);
    private final Tensor count = Tensor.allocateHost(DType.I32, 1);
    private final List<MoeLayer> layers = new ArrayList<>();

    @AfterEach
    void closeLayers() {
        layers.forEach(MoeLayer::close);
    }

    @Test
    void shouldListEveryMessageAsItReallyIs(@TempDir Path folder) throws IOException {
        String page = Files.readString(Path.of("docs/troubleshooting.md"));
        assertTold(page, "## Opening a layer", opening());
        assertTold(page, "## Binding memory", binding());
        assertTold(page, "## Running steps", running());
        assertTold(page, "## Several GPUs", inGroups(folder));
        assertTold(page, "## Reading a checkpoint", reading(folder));
        assertTold(page, "## Weights of an engine", engine());
    }

    @Test
    void shouldListMessagesOfTheScripts() throws IOException {
        StringBuilder scripts = new StringBuilder();
        for (String script :
                List.of(
                        "bin/moe4j",
                        "src/main/cuda/build.sh",
                        "src/main/native/build-bridges.sh",
                        "engines.mk")) {
            scripts.append(Files.readString(Path.of(script)));
        }
        List<String> rows =
                rows(Files.readString(Path.of("docs/troubleshooting.md")), "## Command line");
        assertThat(rows).hasSize(6);
        for (String row : rows) {
            assertThat(row.split("…"))
                    .allSatisfy(part -> assertThat(scripts.toString()).contains(part.strip()));
        }
    }

    private List<ThrowingCallable> opening() {
        return List.of(
                () -> Moe.open(MoeConfig.builder().shape(SHAPE).build()),
                () -> MoeConfig.builder().build(),
                () -> config().backend("gpu").build(),
                () -> Moe.choose("gpu"),
                () -> config().ranks(0).build(),
                () -> config().maxTokensPerRank(0).build(),
                () -> config().outDType(DType.F16).build(),
                () -> config().rule(null).routingInput(RoutingInput.HIDDEN).build(),
                () ->
                        config().weights(
                                        EngineWeights.of(SHAPE, "an engine", WEIGHTS::expert)
                                                .build())
                                .routingInput(RoutingInput.HIDDEN)
                                .build(),
                () -> MoeShape.of(64, 8, 2, 32));
    }

    private List<ThrowingCallable> binding() {
        MoeLayer layer = open();
        Tensor small = Tensor.allocateHost(DType.BF16, 3, 64);
        Tensor device = Tensor.device(4096, DType.BF16, 4, 64);
        MoeLayer unprepared = Moe.open(config().build());
        layers.add(unprepared);
        return List.of(
                () -> unprepared.bind(List.of(tensors(hidden))),
                () -> layer.bind(List.of(tensors(small))),
                () -> layer.bind(List.of(StepTensors.hidden(out, hidden, count))),
                () -> layer.bind(List.of(tensors(device))),
                () -> layer.bind(List.of(tensors(hidden), tensors(hidden))),
                () -> layer.bind(List.of(tensors(hidden)), 1),
                () -> Tensor.device(0, DType.F32, 1),
                () -> Tensor.device(4097, DType.F32, 1),
                () -> Tensor.allocateHost(DType.F32, 1L << 30),
                device::toFloats);
    }

    private List<ThrowingCallable> running() {
        MoeLayer layer = open();
        BoundStep step = layer.bind(List.of(tensors(hidden)));
        MoeLayer other = open();
        MoeLayer closed = open();
        BoundStep late = closed.bind(List.of(tensors(hidden)));
        closed.close();
        Tensor moved = Tensor.allocateHost(DType.BF16, 4, 64);
        layer.handles().claim();
        return List.of(
                () -> layer.enqueue(0, step, Phase.EXPERTS, Phase.EXPERTS),
                () -> other.enqueue(0, step),
                () -> step.requireUnmoved(List.of(tensors(moved))),
                () -> layer.handles().claim(),
                () -> layer.result(0, 1),
                () -> closed.enqueue(0, late));
    }

    private List<ThrowingCallable> inGroups(Path folder) throws IOException {
        Duration soon = Duration.ofMillis(100);
        List<Group> two = Group.inProcess(2, soon);
        List<Group> left = Group.inProcess(2);
        left.get(1).close();
        Path shared = Files.createDirectory(folder.resolve("shared"));
        Files.setPosixFilePermissions(shared, PosixFilePermissions.fromString("rwxrwx---"));
        return List.of(
                () -> two.get(0).exchange("configuration", new byte[0]),
                () -> GroupMismatch.prepare(SHAPE),
                () -> GroupMismatch.prepareOnOneGpu(SHAPE),
                () -> config().group(two.get(0)).ranks(3).build(),
                () -> Moe.open(config().group(two.get(0)).build()),
                () -> {
                    List<Group> apart = Group.inProcess(2);
                    Group.together(
                            apart,
                            group -> {
                                if (group.rank() == 0) {
                                    group.exchange("one layer", new byte[0]);
                                } else {
                                    assertThat(
                                                    catchThrowable(
                                                            () ->
                                                                    group.exchange(
                                                                            "another",
                                                                            new byte[0])))
                                            .isNotNull();
                                }
                            });
                },
                () -> left.get(0).exchange("configuration", new byte[0]),
                () -> Group.join(shared, 0, 2, soon),
                () -> Group.join(folder.resolve("new"), 0, 2, soon));
    }

    private static List<ThrowingCallable> reading(Path folder) throws IOException {
        Path empty = Files.createDirectory(folder.resolve("empty"));
        Path bare = Files.createDirectory(folder.resolve("bare"));
        Files.writeString(bare.resolve("config.json"), "{\"model_type\":\"mixtral\"}");
        return List.of(
                () -> Checkpoint.open(folder.resolve("missing")),
                () -> Checkpoint.open(empty),
                () -> Checkpoint.open(bare));
    }

    private static List<ThrowingCallable> engine() {
        return List.of(
                () -> GgufType.ofId(12),
                () -> EngineTensor.of(ByteBuffer.allocate(10), GgufType.F32, 8, 8),
                () -> WeightMatrix.of(new float[3], 2, 2));
    }

    /** Row i of the section is what mistake i says, and there are no others. */
    private static void assertTold(String page, String section, List<ThrowingCallable> mistakes) {
        List<String> rows = rows(page, section);
        assertThat(rows).as(section).hasSameSizeAs(mistakes);
        for (int i = 0; i < rows.size(); i++) {
            Throwable thrown = catchThrowable(mistakes.get(i));
            assertThat(thrown).as(rows.get(i)).isNotNull();
            String pattern =
                    Arrays.stream(rows.get(i).split("…", -1))
                            .map(Pattern::quote)
                            .collect(Collectors.joining(".+"));
            assertThat(thrown.getMessage()).matches(pattern);
        }
    }

    private static List<String> rows(String page, String heading) {
        int from = page.indexOf("\n" + heading);
        assertThat(from).as(heading).isPositive();
        int to = page.indexOf("\n## ", from + heading.length());
        return ROW.matcher(page.substring(from, to))
                .results()
                .map((MatchResult row) -> row.group(1))
                .toList();
    }

    private MoeLayer open() {
        MoeLayer layer = Moe.open(config().build());
        layers.add(layer);
        layer.prepare();
        return layer;
    }

    private static MoeConfig.Builder config() {
        return MoeConfig.builder()
                .weights(WEIGHTS)
                .rule(RoutingRule.softmaxTopK(true))
                .backend("cpu")
                .maxTokensPerRank(4);
    }

    private StepTensors tensors(Tensor in) {
        return StepTensors.topk(out, in, ids, weights, count);
    }
}
