package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Closing a layer while others use it, using it afterwards, and misuse between threads. */
@EnabledIfCuda
class CloseGpuTest {
    private static final MoeShape SHAPE = MoeShape.of(256, 128, 12, 4);
    private static final int ROUNDS = Integer.getInteger("moe4j.closes", 40);
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    private static Harness harness() {
        MoeConfig config =
                MoeConfig.builder()
                        .weights(RandomWeights.of(SHAPE, 3))
                        .backend("cuda")
                        .maxTokensPerRank(32)
                        .ranks(2)
                        .build();
        return new Harness(config, false, gpu.stream());
    }

    private static List<Batch> batches() {
        return List.of(Harness.random(SHAPE, 32, 1), Harness.random(SHAPE, 7, 2));
    }

    @Test
    void shouldRefuseEverythingAfterClose() {
        Harness harness = harness();
        harness.run(batches());
        MoeGraph graph = harness.layer.capture(gpu.stream(), harness.step());
        UseAfterClose.check(harness.layer, harness.tensors(), harness.step(), gpu.stream());
        assertThatThrownBy(() -> graph.launch(gpu.stream()))
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("closed");
        graph.close();
        assertThatThrownBy(() -> graph.launch(gpu.stream()))
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("the graph is closed");
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void shouldSurviveACloseFromAnotherThreadDuringSteps(boolean replay) throws Exception {
        try (Harness warmUp = harness();
                MoeGraph graph = warmUp.layer.capture(gpu.stream(), warmUp.step())) {
            warmUp.run(batches());
            graph.launch(gpu.stream());
        }
        long before = gpu.freeBytes();
        AtomicLong steps = new AtomicLong();
        for (int round = 0; round < ROUNDS; round++) {
            Harness harness = harness();
            MoeLayer layer = harness.layer;
            harness.write(batches());
            MoeGraph graph = replay ? layer.capture(gpu.stream(), harness.step()) : null;
            CountDownLatch running = new CountDownLatch(200 + 37 * round);
            List<CompletableFuture<Throwable>> users = new ArrayList<>();
            users.add(
                    untilItThrows(
                            () -> {
                                if (replay) {
                                    graph.launch(gpu.stream());
                                } else {
                                    layer.enqueue(gpu.stream(), harness.step());
                                }
                                steps.incrementAndGet();
                                running.countDown();
                            }));
            users.add(untilItThrows(layer::check));
            users.add(untilItThrows(layer::counters));
            users.add(untilItThrows(() -> layer.validEpoch(0)));
            users.add(untilItThrows(() -> layer.inspect(0, 1).expertCounts()));
            users.add(untilItThrows(() -> layer.synchronize(gpu.stream())));
            assertThat(running.await(60, TimeUnit.SECONDS)).as("the steps run").isTrue();
            layer.close();
            for (CompletableFuture<Throwable> user : users) {
                assertThat(user.get(60, TimeUnit.SECONDS))
                        .as("round %d", round)
                        .isInstanceOf(IllegalStateException.class);
            }
            if (replay) {
                graph.close();
            }
        }
        assertThat(gpu.freeBytes()).as("all memory came back").isEqualTo(before);
        System.out.println("CLOSES " + ROUNDS + " replay=" + replay + " steps=" + steps);
    }

    private static CompletableFuture<Throwable> untilItThrows(Runnable use) {
        return CompletableFuture.supplyAsync(
                () -> {
                    while (true) {
                        try {
                            use.run();
                        } catch (Throwable t) {
                            return t;
                        }
                    }
                },
                task -> new Thread(task, "user").start());
    }

    @Test
    void shouldRefuseASecondThreadThatEnqueuesAtTheSameTime() throws Exception {
        try (Harness harness = harness()) {
            harness.write(batches());
            AtomicInteger done = new AtomicInteger();
            AtomicInteger refused = new AtomicInteger();
            List<CompletableFuture<Void>> threads = new ArrayList<>();
            for (int t = 0; t < 2; t++) {
                threads.add(
                        CompletableFuture.runAsync(
                                () -> {
                                    for (int i = 0; i < 20_000; i++) {
                                        try {
                                            harness.layer.enqueue(gpu.stream(), harness.step());
                                            done.incrementAndGet();
                                        } catch (IllegalStateException e) {
                                            assertThat(e)
                                                    .hasMessageContaining("one step at a time");
                                            refused.incrementAndGet();
                                        }
                                    }
                                },
                                task -> new Thread(task, "enqueuer").start()));
            }
            for (CompletableFuture<Void> thread : threads) {
                thread.get(120, TimeUnit.SECONDS);
            }
            harness.layer.synchronize(gpu.stream());
            harness.layer.check();
            assertThat(refused).hasPositiveValue();
            assertThat(harness.layer.validEpoch(0)).isEqualTo(done.get());
            harness.layer.result(0, done.get());
            assertThatThrownBy(() -> harness.layer.result(0, done.get() + 1))
                    .isInstanceOf(MoeFaultException.class);
        }
    }

    @Test
    void shouldReportStreamsThatCannotBeUsed() {
        try (Harness harness = harness()) {
            float[][][] expected = harness.run(batches());
            assertThatThrownBy(() -> harness.layer.capture(0L, harness.step()))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("legacy default stream");
            try (Stream capturing = new Stream(gpu.context);
                    Scope scope = gpu.context.enter()) {
                gpu.driver.streamBeginCapture(capturing.handle());
                assertThatThrownBy(() -> harness.layer.capture(capturing.handle(), harness.step()))
                        .isInstanceOf(IllegalStateException.class)
                        .hasMessageContaining("capturing already");
                assertThatThrownBy(() -> harness.layer.synchronize(capturing.handle()))
                        .isInstanceOf(CudaException.class)
                        .hasMessageContaining("cuStreamSynchronize");
                assertThatThrownBy(() -> gpu.driver.streamEndCapture(capturing.handle()))
                        .isInstanceOf(CudaException.class);
            }
            assertThat(harness.run(batches())).as("the layer goes on").isDeepEqualTo(expected);
        }
    }

    @Test
    @EnabledIfCuda(devices = 2)
    void shouldReportAStreamOfAnotherContext() {
        try (Harness harness = harness();
                Context other = new Context(gpu.driver, 1);
                Stream foreign = new Stream(other)) {
            float[][][] expected = harness.run(batches());
            assertThatThrownBy(() -> harness.layer.enqueue(foreign.handle(), harness.step()))
                    .isInstanceOf(CudaException.class)
                    .hasMessageContaining("cuLaunchKernel");
            assertThat(harness.run(batches())).as("the layer goes on").isDeepEqualTo(expected);
        }
    }

    @Test
    void shouldRefuseAStepOfAnotherLayer() {
        try (Harness one = harness();
                Harness other = harness()) {
            assertThatThrownBy(() -> one.layer.enqueue(gpu.stream(), other.step()))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("another layer");
        }
    }

    @Test
    void shouldRunWhateverContextIsCurrentAndLeaveItCurrent() {
        try (Harness harness = harness()) {
            long before = gpu.driver.contextCurrent(); // whatever earlier tests left
            float[][][] expected = harness.run(batches());
            assertThat(gpu.driver.contextCurrent()).isEqualTo(before);
            assertThat(harness.run(batches())).isDeepEqualTo(expected);
            try (Scope scope = gpu.context.enter()) {
                assertThat(harness.run(batches())).isDeepEqualTo(expected);
                assertThat(gpu.driver.contextCurrent()).isEqualTo(gpu.context.handle());
            }
            assertThat(gpu.driver.contextCurrent()).isEqualTo(before);
        }
    }
}
