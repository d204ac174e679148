package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.BoundStep;
import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.Recovery;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.CheckedDriver;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.DeviceAttribute;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.ep.Group;
import io.moe4j.ep.GroupException;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.RoutingRule;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import java.util.function.UnaryOperator;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/** Layers of a group, without GPUs: what they ask of the driver, and how opening fails. */
@Timeout(60)
class GroupRecordingTest {
    private static final MoeShape SHAPE = new MoeShape(64, 48, 11, 4, 32);
    private static final long MIB = 1 << 20;
    private final RecordingDriver recording = new RecordingDriver(3, 141L << 30);

    @BeforeEach
    void needsKernels() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    private static MoeConfig.Builder config() {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 1))
                .rule(RoutingRule.softmaxTopK(true))
                .routingInput(RoutingInput.HIDDEN)
                .maxTokensPerRank(16)
                .threads(1)
                .handles(2);
    }

    private static CudaLayer open(Driver driver, MoeConfig config) {
        return CudaBackendProvider.open(driver, KernelCatalog.choose(driver, 0), config, "test");
    }

    private List<CudaLayer> open(int ranks, Duration limit) {
        List<CudaLayer> layers = new ArrayList<>();
        for (Group group : Group.inProcess(ranks, limit)) {
            layers.add(open(recording, config().group(group).build()));
        }
        return layers;
    }

    private StepTensors tensors(int device) {
        return tensors(device, recording, 16);
    }

    private static StepTensors tensors(int device, RecordingDriver driver, int tokens) {
        long context = driver.primaryContextRetain(device);
        driver.primaryContextRelease(device);
        return StepTensors.hidden(
                Tensor.device(driver.foreignMemory(1 << 16, context), DType.F32, tokens, 64),
                Tensor.device(driver.foreignMemory(1 << 16, context), DType.BF16, tokens, 64),
                Tensor.device(driver.foreignMemory(1 << 16, context), DType.I32, 1));
    }

    private static long bytes(MemoryPlan plan, String name) {
        return plan.entries().stream()
                .filter(entry -> entry.name().equals(name))
                .mapToLong(MemoryPlan.Entry::bytes)
                .sum();
    }

    @Test
    void shouldPlanForTheExpertsAndBuffersOfOneRank() {
        MoeConfig virtual = config().ranks(3).backend("cuda").build();
        MemoryPlan all = Moe.plan(virtual);
        long held = 0;
        for (Group group : Group.inProcess(3)) {
            MoeConfig one = virtual.toBuilder().group(group).build();
            MemoryPlan plan = Moe.plan(one);
            assertThat(plan.toString()).contains("rank " + group.rank() + " of a group, Er=");
            assertThat(bytes(plan, "recv_rows")).isEqualTo(bytes(all, "recv_rows") / 3);
            held += bytes(plan, "w_gate_up");
            long shared = bytes(plan, "self_test") + symmetric(plan);
            assertThat(Math.floorMod(-shared, 2 * MIB))
                    .as("pages of its own")
                    .isLessThan(9 * 256 * 2L);
        }
        assertThat(held).as("every expert lies on one rank").isEqualTo(bytes(all, "w_gate_up"));
    }

    private static long symmetric(MemoryPlan plan) {
        return List.of(
                        "dispatch_flags",
                        "combine_flags",
                        "abort_words",
                        "recv_tokens",
                        "recv_ids",
                        "recv_weights",
                        "recv_rows",
                        "combine_rows",
                        "dispatch_lines",
                        "combine_lines")
                .stream()
                .mapToLong(name -> bytes(plan, name))
                .sum();
    }

    @Test
    void shouldOpenOnAGpuEachAndGiveEverythingBackWhenTheLastRankCloses() {
        List<CudaLayer> layers = open(3, Duration.ofSeconds(20));
        Group.together(layers, CudaLayer::prepare);
        assertThat(recording.calls(Call.CTX_ENABLE_PEER_ACCESS)).hasSize(6);
        assertThat(recording.calls(Call.IPC_GET_MEM_HANDLE)).as("one process").isEmpty();
        long planned = layers.stream().mapToLong(layer -> layer.plan().totalBytes()).sum();
        assertThat(recording.allocatedBytes())
                .isBetween(planned, planned + 3 * (256L * 60 * 2 + (64 << 10)));
        long regions = 3 * 2 * (2 * MIB);
        layers.get(0).close();
        layers.get(2).close();
        assertThat(recording.allocatedBytes()).as("peers may still write").isGreaterThan(regions);
        layers.get(1).close();
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldLaunchEveryKernelOfAStepOnceBeforeAnyRankMayWait() {
        List<CudaLayer> layers = open(2, Duration.ofSeconds(20));
        Group.together(layers, CudaLayer::prepare);
        Set<String> warm = new HashSet<>();
        for (RecordingDriver.Launch launch : recording.launches()) {
            warm.add(launch.kernel());
            if (launch.kernel().equals("moe_dispatch_recv")) {
                ByteBuffer params = launch.paramBytes();
                int ranks = params.getInt(DeviceStructs.STEP_PARAMS.offset("num_ranks"));
                assertThat(ranks).as("alone").isEqualTo(1);
            }
        }
        recording.clearCalls();
        for (CudaLayer layer : layers) {
            BoundStep step = layer.bind(List.of(tensors(layer.config().group().rank())));
            long stream = recording.foreignStream();
            layer.enqueue(stream, step);
            try (MoeGraph graph = layer.capture(stream, step)) {
                graph.launch(stream);
            }
        }
        assertThat(recording.launches()).isNotEmpty();
        for (RecordingDriver.Launch launch : recording.launches()) {
            assertThat(warm).contains(launch.kernel());
            ByteBuffer params = launch.paramBytes();
            assertThat(launch.gridY()).as("one local rank").isEqualTo(1);
            assertThat(params.getInt(DeviceStructs.STEP_PARAMS.offset("num_ranks"))).isEqualTo(2);
            assertThat(params.getInt(DeviceStructs.STEP_PARAMS.offset("num_local_ranks")))
                    .isEqualTo(1);
        }
        assertThat(recording.calls(Call.MEM_FREE))
                .as("a free waits for a GPU that waits")
                .isEmpty();
        assertThatThrownBy(() -> layers.get(1).bind(List.of(tensors(1), tensors(1))))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("the layer has rank 1 of the group alone");
        layers.forEach(CudaLayer::close);
    }

    @Test
    void shouldEnqueueWithoutWaitingInAGroupToo() {
        CheckedDriver checked = new CheckedDriver(recording, CheckedDriver.Mode.THROW);
        List<CudaLayer> layers = new ArrayList<>();
        for (Group group : Group.inProcess(2)) {
            layers.add(open(checked, config().group(group).build()));
        }
        Group.together(layers, CudaLayer::prepare);
        for (CudaLayer layer : layers) {
            BoundStep step = layer.bind(List.of(tensors(layer.config().group().rank())));
            try (CheckedDriver.Zone zone = checked.noSyncZone("enqueue")) {
                layer.enqueue(recording.foreignStream(), step);
            }
        }
        layers.forEach(CudaLayer::close);
    }

    @Test
    void shouldNameFieldValuesAndRanksOfADifferenceOnEveryRank() {
        List<Group> groups = Group.inProcess(3, Duration.ofSeconds(20));
        List<CudaLayer> layers = new ArrayList<>();
        for (Group group : groups) {
            int tokens = group.rank() == 2 ? 32 : 16;
            layers.add(open(recording, config().maxTokensPerRank(tokens).group(group).build()));
        }
        Group.together(
                layers,
                layer -> {
                    int rank = layer.config().group().rank();
                    assertThatThrownBy(layer::prepare)
                            .isInstanceOf(IllegalArgumentException.class)
                            .hasMessageContaining(
                                    rank == 2
                                            ? "maxTokensPerRank=32 on rank 2 but maxTokensPerRank=16"
                                                    + " on rank 0"
                                            : "maxTokensPerRank=16 on rank "
                                                    + rank
                                                    + " but maxTokensPerRank=32 on rank 2");
                });
        assertThat(recording.allocatedBytes()).as("nothing was allocated").isZero();
        layers.forEach(CudaLayer::close);
        assertThat(recording.leaks()).isEmpty();

        CudaLayer one = open(recording, config().group(groups.get(0)).build());
        CudaLayer other =
                open(
                        recording,
                        config().weights(RandomWeights.of(SHAPE, 2)).group(groups.get(1)).build());
        CudaLayer third = open(recording, config().group(groups.get(2)).build());
        assertThatThrownBy(() -> Group.together(List.of(one, other, third), CudaLayer::prepare))
                .as("layers of equal sizes in another order")
                .hasMessageContaining("router weights=crc ");
    }

    @Test
    void shouldLetRanksOfOneProcessShareAGpuAndLeaveRoomForThoseThatAreWaitedFor() {
        for (String wire : List.of("rows", "lines")) {
            System.setProperty("moe4j.cuda.wire", wire);
            try {
                RecordingDriver two = new RecordingDriver(2, 141L << 30);
                List<CudaLayer> layers = new ArrayList<>();
                for (Group group : Group.inProcess(4, Duration.ofSeconds(20))) {
                    // why 128 tokens: grids would be larger than what a rank may take
                    MoeConfig.Builder config = config().maxTokensPerRank(128);
                    layers.add(open(two, config.group(group).build()));
                }
                Group.together(layers, CudaLayer::prepare);
                assertThat(two.calls(Call.CTX_ENABLE_PEER_ACCESS))
                        .as("four ranks, two peers on the other GPU")
                        .hasSize(8);
                assertThat(layers)
                        .allMatch(
                                layer ->
                                        layer.backendReason()
                                                .endsWith("2 ranks of the group share the GPU"));
                BoundStep step = layers.get(0).bind(List.of(tensors(0, two, 128)));
                assertThatThrownBy(() -> layers.get(0).enqueue(0, step))
                        .isInstanceOf(IllegalArgumentException.class)
                        .hasMessageContaining("stream=0 is one stream for all ranks of the GPU");
                layers.get(0).enqueue(two.foreignStream(), step);
                int sms = two.deviceAttribute(0, DeviceAttribute.MULTIPROCESSOR_COUNT);
                assertThat(two.launches())
                        .filteredOn(
                                launch ->
                                        launch.kernel()
                                                .matches(
                                                        ".*_(recv|lines)|moe_(dispatch|combine)_.*_lines"))
                        .isNotEmpty()
                        .allMatch(launch -> launch.gridX() <= sms / (2 * 2 * 2));
                layers.forEach(CudaLayer::close);
                assertThat(two.leaks()).isEmpty();
            } finally {
                System.clearProperty("moe4j.cuda.wire");
            }
        }
    }

    @Test
    void shouldRefuseRanksOfTwoProcessesOrContextsOnOneGpu() {
        UnaryOperator<byte[]> otherProcess =
                mine -> {
                    byte[] theirs = mine.clone();
                    theirs[1] ^= 1;
                    return theirs;
                };
        CudaLayer here =
                open(
                        recording,
                        config().group(new Mirror(otherProcess, new ArrayList<>())).build());
        assertThatThrownBy(here::prepare)
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining(
                        "ranks 0 and 1 are both on GPU 0000:01:00.0 but in two processes");
        here.close();

        List<CudaLayer> layers = new ArrayList<>();
        for (Group group : Group.inProcess(2)) {
            long context = recording.foreignContext(1);
            layers.add(open(recording, config().cudaContext(context).group(group).build()));
        }
        assertThatThrownBy(() -> Group.together(layers, CudaLayer::prepare))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining(
                        "ranks 0 and 1 are both on GPU 0000:02:00.0 but in two contexts");
        layers.forEach(CudaLayer::close);
        MoeConfig missing = config().device(3).build();
        assertThatThrownBy(() -> open(recording, missing))
                .hasMessageContaining("device=3 but there are 3 GPUs");
    }

    @Test
    void shouldTellAllRanksOfOneThatFailsAndLetThemTryAgain() {
        for (int nth = 1; nth < 40; nth += 3) {
            RecordingDriver failing = new RecordingDriver(2, 141L << 30);
            List<CudaLayer> layers = new ArrayList<>();
            for (Group group : Group.inProcess(2, Duration.ofSeconds(20))) {
                layers.add(open(failing, config().group(group).build()));
            }
            failing.failNth(Call.MEM_ALLOC, nth, 2);
            List<RuntimeException> thrown = new ArrayList<>(Arrays.asList(null, null));
            Group.together(
                    layers,
                    layer -> {
                        try {
                            layer.prepare();
                        } catch (RuntimeException e) {
                            thrown.set(layer.config().group().rank(), e);
                        }
                    });
            if (thrown.get(0) == null && thrown.get(1) == null) {
                assertThat(nth).as("allocations of two ranks").isGreaterThan(10);
            } else {
                int culprit = thrown.get(0) instanceof CudaException ? 0 : 1;
                assertThat(thrown.get(culprit))
                        .as("allocation %d", nth)
                        .isInstanceOf(CudaException.class);
                assertThat(thrown.get(1 - culprit))
                        .isInstanceOf(GroupException.class)
                        .hasMessageContaining("rank " + culprit + " failed while the layer")
                        .hasMessageContaining("memory");
                assertThat(failing.allocatedBytes()).as("allocation %d", nth).isZero();
                Group.together(layers, CudaLayer::prepare);
            }
            layers.forEach(CudaLayer::close);
            assertThat(failing.leaks()).isEmpty();
        }
    }

    @Test
    void shouldNotWaitForeverForARankThatNeverPrepares() {
        List<CudaLayer> layers = open(2, Duration.ofMillis(300));
        assertThatThrownBy(() -> layers.get(0).prepare())
                .isInstanceOf(GroupException.class)
                .hasMessageContaining("rank 0 waited 0.3 s in configuration for rank 1");
        layers.forEach(CudaLayer::close);
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldEndPrepareWhenTheGroupIsClosedMeanwhile() throws Exception {
        List<CudaLayer> layers = open(2, Duration.ofSeconds(20));
        CompletableFuture<Void> preparing =
                CompletableFuture.runAsync(() -> layers.get(0).prepare());
        Thread.sleep(100);
        assertThat(preparing).isNotDone();
        layers.get(1).config().group().close();
        assertThatThrownBy(() -> preparing.get(5, TimeUnit.SECONDS))
                .hasCauseInstanceOf(GroupException.class)
                .hasMessageContaining("rank 1 has closed its group");
        layers.forEach(CudaLayer::close);
        assertThat(recording.leaks()).isEmpty();
    }

    @Test
    void shouldSayWhoseWritesDidNotArrive() {
        int[] reads = {0};
        Driver broken =
                forwarding(
                        recording,
                        (method, arguments) -> {
                            if (method.equals("memcpyDtoH") && ++reads[0] % 2 == 0) {
                                ByteBuffer to = (ByteBuffer) arguments[0];
                                to.put(to.limit() - 1, (byte) 1);
                            }
                        });
        List<CudaLayer> layers = new ArrayList<>();
        List<Group> groups = Group.inProcess(2);
        layers.add(open(recording, config().group(groups.get(0)).build()));
        layers.add(open(broken, config().group(groups.get(1)).build()));
        List<String> messages = new ArrayList<>(Arrays.asList("", ""));
        Group.together(
                layers,
                layer -> {
                    try {
                        layer.prepare();
                    } catch (RuntimeException e) {
                        messages.set(layer.config().group().rank(), e.getMessage());
                    }
                });
        assertThat(messages.get(1))
                .contains("what ranks [0, 1] wrote did not arrive in the memory of rank 1");
        assertThat(messages.get(0)).contains("rank 1 failed while the layer was prepared");
        layers.forEach(CudaLayer::close);
        assertThat(recording.leaks()).isEmpty();
    }

    /** What the test of lines finds, instead of what the recording driver says. */
    private Driver finding(int source, long torn, long missing) {
        int size = DeviceStructs.LINE_FINDING.size();
        return forwarding(
                recording,
                (method, arguments) -> {
                    if (method.equals("memcpyDtoH")
                            && ((ByteBuffer) arguments[0]).capacity() == 3 * size) {
                        ByteBuffer to = (ByteBuffer) arguments[0];
                        to.putLong(source * size + DeviceStructs.LINE_FINDING.offset("torn"), torn);
                        to.putLong(
                                source * size + DeviceStructs.LINE_FINDING.offset("missing"),
                                missing);
                    }
                });
    }

    @Test
    void shouldUseRowsOnAllRanksWhereOneDoesNotSeeLinesArriveWhole() {
        for (int[] found : new int[][] {{0, 0}, {7, 0}, {0, 3}}) {
            List<CudaLayer> layers = new ArrayList<>();
            for (Group group : Group.inProcess(3, Duration.ofSeconds(20))) {
                Driver driver = group.rank() == 2 ? finding(1, found[0], found[1]) : recording;
                layers.add(open(driver, config().group(group).build()));
            }
            Group.together(layers, CudaLayer::prepare);
            Set<String> warm = new HashSet<>();
            recording.launches().forEach(launch -> warm.add(launch.kernel()));
            assertThat(warm).contains("moe_line_test", "moe_dispatch_lines", "moe_dispatch_recv");
            boolean whole = found[0] + found[1] == 0;
            for (CudaLayer layer : layers) {
                assertThat(layer.backendReason())
                        .endsWith(
                                whole
                                        ? ", rows travel in lines"
                                        : String.format(
                                                ", rows travel as rows: lines of rank 1 do not arrive"
                                                        + " whole at rank 2 (torn %d times in 0"
                                                        + " changes, %d lines missing)",
                                                found[0], found[1]));
                recording.clearCalls();
                BoundStep step = layer.bind(List.of(tensors(layer.config().group().rank())));
                layer.enqueue(recording.foreignStream(), step);
                assertThat(recording.launches())
                        .extracting(RecordingDriver.Launch::kernel)
                        .contains(whole ? "moe_dispatch_lines" : "moe_dispatch_recv")
                        .doesNotContain(whole ? "moe_dispatch_recv" : "moe_dispatch_lines")
                        .isSubsetOf(warm);
                ByteBuffer params = recording.launches().get(1).paramBytes();
                assertThat(params.getInt(DeviceStructs.STEP_PARAMS.offset("wire")))
                        .isEqualTo(whole ? 1 : 0);
            }
            layers.forEach(CudaLayer::close);
            assertThat(recording.leaks()).isEmpty();
        }
    }

    @Test
    void shouldNotLetTheRouterOfAGroupStandBesideACombineThatWaits() {
        for (Group group : Arrays.asList(null, Group.inProcess(1).get(0))) {
            try (CudaLayer layer = open(recording, config().group(group).build())) {
                layer.prepare();
                BoundStep step = layer.bind(List.of(tensors(0)));
                recording.clearCalls();
                layer.enqueue(recording.foreignStream(), step);
                List<RecordingDriver.Launch> launches = recording.launches();
                assertThat(launches.get(0).kernel()).isEqualTo("moe_route_logits");
                assertThat(launches.get(0).pdl()).isEqualTo(group == null);
                assertThat(launches.get(1).kernel()).isEqualTo("moe_route_topk");
                assertThat(launches.get(1).pdl()).isTrue();
            }
        }
    }

    private interface After {
        void call(String method, Object[] arguments);
    }

    private static Driver forwarding(Driver driver, After after) {
        return (Driver)
                Proxy.newProxyInstance(
                        Driver.class.getClassLoader(),
                        new Class<?>[] {Driver.class},
                        (proxy, method, arguments) -> {
                            try {
                                Object result = method.invoke(driver, arguments);
                                after.call(method.getName(), arguments);
                                return result;
                            } catch (InvocationTargetException e) {
                                throw e.getCause();
                            }
                        });
    }

    /** Rank 1 is said to be another process on another GPU, and does what rank 0 does. */
    private record Mirror(UnaryOperator<byte[]> peer, List<String> said) implements Group {
        @Override
        public int rank() {
            return 0;
        }

        @Override
        public int ranks() {
            return 2;
        }

        @Override
        public List<byte[]> exchange(String what, byte[] mine) {
            said.add(what);
            return List.of(mine, what.equals("configuration") ? peer.apply(mine) : mine);
        }

        @Override
        public List<byte[]> meet(String what, byte[] mine, Set<Integer> members) {
            return exchange(what, mine);
        }

        @Override
        public CompletableFuture<Void> announce(String what) {
            said.add(what);
            return CompletableFuture.completedFuture(null);
        }

        @Override
        public void close() {}
    }

    @Test
    void shouldMapTheMemoryOfOtherProcessesAndUnmapItBeforeItsOwnGoes() {
        UnaryOperator<byte[]> elsewhere =
                mine -> {
                    byte[] theirs = mine.clone();
                    theirs[1] ^= 1; // the process
                    String text = new String(theirs, StandardCharsets.ISO_8859_1);
                    return text.replace("0000:01:00.0", "0000:02:00.0")
                            .getBytes(StandardCharsets.ISO_8859_1);
                };
        Mirror group = new Mirror(elsewhere, new ArrayList<>());
        CudaLayer layer = open(recording, config().group(group).build());
        layer.prepare();
        assertThat(recording.calls(Call.IPC_GET_MEM_HANDLE)).as("handles").hasSize(2);
        assertThat(recording.calls(Call.IPC_OPEN_MEM_HANDLE)).hasSize(2);
        assertThat(recording.calls(Call.CTX_ENABLE_PEER_ACCESS)).isEmpty();
        recording.clearCalls();
        layer.close();
        List<Call> order =
                recording.calls(Call.IPC_CLOSE_MEM_HANDLE, Call.MEM_FREE).stream()
                        .map(RecordingDriver.Recorded::call)
                        .toList();
        assertThat(order.lastIndexOf(Call.IPC_CLOSE_MEM_HANDLE)).isLessThan(order.size() - 2);
        assertThat(order.subList(order.size() - 2, order.size()))
                .as("the two regions go last")
                .containsOnly(Call.MEM_FREE);
        assertThat(group.said().get(group.said().size() - 1)).startsWith("closed of layer ");
        assertThat(recording.leaks()).isEmpty();
    }

    private static List<RuntimeException> recoverAll(List<CudaLayer> layers, Set<Integer> lost) {
        List<RuntimeException> thrown = new ArrayList<>(Arrays.asList(null, null, null));
        Group.together(
                layers,
                layer -> {
                    try {
                        layer.recover(lost);
                    } catch (RuntimeException e) {
                        thrown.set(layer.config().group().rank(), e);
                    }
                });
        return thrown;
    }

    @Test
    void shouldBeginTheSameGenerationOnAllRanksAndTellPeersThatStillWait() {
        List<CudaLayer> layers = open(3, Duration.ofSeconds(20));
        Group.together(layers, CudaLayer::prepare);
        BoundStep step = layers.get(1).bind(List.of(tensors(1)));
        long stream = recording.foreignStream();
        layers.get(1).enqueue(stream, step, Phase.ROUTE, Phase.DISPATCH_SEND);
        recording.clearCalls();
        Set<Recovery> agreed = ConcurrentHashMap.newKeySet();
        Group.together(layers, layer -> agreed.add(layer.recover()));
        assertThat(agreed)
                .containsExactly(new Recovery(1, Set.of(0, 1, 2), 1L << 48, List.of(0L, 0L)));
        assertThat(recording.calls(Call.MEMCPY_D_TO_D_ASYNC))
                .as("3 ranks tell 2 peers on 2 handles")
                .hasSize(12);
        layers.get(1).enqueue(stream, step); // the step that was begun is over
        Recovery second = recoverTwo(layers);
        assertThat(second.generation()).isEqualTo(2);
        assertThat(second.members()).containsExactlyInAnyOrder(0, 2);
        assertThat(recoverAll(layers, Set.of())).containsOnlyNulls();
        Group.together(layers, layer -> agreed.add(layer.recover()));
        assertThat(agreed).anyMatch(recovery -> recovery.generation() == 4).hasSize(2);
        layers.forEach(CudaLayer::close);
        assertThat(recording.leaks()).isEmpty();
    }

    private static Recovery recoverTwo(List<CudaLayer> layers) {
        Set<Recovery> agreed = ConcurrentHashMap.newKeySet();
        Group.together(
                List.of(layers.get(0), layers.get(2)),
                layer -> agreed.add(layer.recover(Set.of(1))));
        assertThat(agreed).hasSize(1);
        return agreed.iterator().next();
    }

    @Test
    void shouldStayAsItIsWhenARankDoesNotComeAndRecoverWhenItDoes() {
        List<CudaLayer> layers = open(3, Duration.ofMillis(400));
        Group.together(layers, CudaLayer::prepare);
        for (int attempt = 0; attempt < 2; attempt++) {
            List<RuntimeException> thrown =
                    recoverAll(List.of(layers.get(0), layers.get(1)), Set.of());
            assertThat(thrown.get(0))
                    .isInstanceOf(GroupException.class)
                    .hasMessageContaining("waited 0.4 s in recovery of layer")
                    .hasMessageEndingWith("for rank 2");
        }
        Set<Integer> generations = ConcurrentHashMap.newKeySet();
        Group.together(layers, layer -> generations.add(layer.recover().generation()));
        assertThat(generations).as("in spite of what the failed ones left").containsExactly(1);
        layers.forEach(CudaLayer::close);
    }

    @Test
    void shouldRefuseToRecoverWithDifferentRanks() {
        List<CudaLayer> layers = open(3, Duration.ofMillis(400));
        Group.together(layers, CudaLayer::prepare);
        List<RuntimeException> thrown = new ArrayList<>(Arrays.asList(null, null));
        Group.together(
                List.of(0, 1),
                rank -> {
                    try {
                        layers.get(rank).recover(rank == 0 ? Set.of(2) : Set.of());
                    } catch (RuntimeException e) {
                        thrown.set(rank, e);
                    }
                });
        assertThat(thrown).allSatisfy(e -> assertThat(e).isInstanceOf(GroupException.class));
        assertThat(thrown.get(1)).hasMessageContaining("for rank 2");
        layers.forEach(CudaLayer::close);
    }

    @Test
    void shouldRefuseAGroupOnTheCpu() {
        MoeConfig config = config().group(Group.inProcess(2).get(1)).backend("cpu").build();
        assertThatThrownBy(() -> Moe.open(config))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("the CPU backend runs all ranks in one process");
        assertThatThrownBy(() -> config.toBuilder().ranks(3).build())
                .hasMessageContaining("ranks=3 but the group has 2");
    }
}
