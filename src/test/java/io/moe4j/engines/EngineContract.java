package io.moe4j.engines;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.BoundStep;
import io.moe4j.Harness;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.examples.LibraryProviderExample;
import io.moe4j.model.Activation;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * What a layer promises an engine that owns everything else: context, stream, memory and graphs,
 * through raw addresses, in the order in which TornadoVM calls a library. Run over the recording
 * driver, and on a GPU with an engine in plain JCuda and one in plain FFM.
 */
public abstract class EngineContract {
    protected static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    protected static final int M = 16;
    protected static final RandomWeights WEIGHTS = RandomWeights.of(SHAPE, 5);
    protected EngineCuda cuda;

    /** A new engine with its own context. */
    protected abstract EngineCuda engine();

    /** Opens a layer on the CUDA backend. */
    protected abstract MoeLayer open(MoeConfig config);

    /** Whether kernels run, so that results can be looked at. */
    protected abstract boolean computes();

    protected static MoeConfig.Builder config() {
        return MoeConfig.builder()
                .weights(WEIGHTS)
                .backend("cuda")
                .hiddenDType(DType.F32)
                .maxTokensPerRank(M);
    }

    @BeforeEach
    void startEngine() {
        cuda = engine();
    }

    @AfterEach
    void stopEngine() {
        if (cuda != null) {
            cuda.close();
        }
    }

    @ParameterizedTest
    @ValueSource(ints = {8, 16, 256})
    void shouldServeAnEngineInTheOrderOfItsLibraryCalls(int alignment) {
        LibraryProviderExample library = new LibraryProviderExample(this::open);
        library.createContext(config(), cuda.context(), cuda.stream());
        try (EngineBuffers buffers = new EngineBuffers(cuda, library.layer().config(), alignment)) {
            assertThat(buffers.hidden.address() % (2L * alignment)).isEqualTo(alignment);
            library.prepare();
            library.prepare();
            assertThat(library.step()).as("no address is known yet").isNull();

            cuda.beginCapture();
            library.dispatch(buffers.step());
            long graph = cuda.endCapture();
            long epoch = 0;
            for (int tokens : new int[] {1, M, 0, 3}) {
                Harness.Batch batch = Harness.random(SHAPE, tokens, 100 + tokens);
                write(buffers, batch, tokens);
                cuda.launch(graph);
                cuda.synchronize();
                float[] replayed = buffers.readOut();
                write(buffers, batch, tokens);
                library.dispatch(buffers.step());
                cuda.synchronize();
                assertThat(buffers.readOut()).as("eager as replayed").isEqualTo(replayed);
                library.layer().check();
                if (computes()) {
                    library.layer().result(0, epoch += 2);
                    assertRight(replayed, batch, tokens);
                }
                assertThat(cuda.current()).isEqualTo(cuda.context());
            }
            cuda.destroyGraph(graph);
            library.destroyContext();
            library.destroyContext();
            assertThatThrownBy(() -> library.dispatch(buffers.step()))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("the layer is closed: open a new one");
            assertThat(cuda.current()).isEqualTo(cuda.context());
        }
    }

    private void write(EngineBuffers buffers, Harness.Batch batch, int tokens) {
        float[] hidden = new float[M * SHAPE.hidden()];
        float[] weights = new float[M * SHAPE.topK()];
        int[] ids = new int[M * SHAPE.topK()];
        Arrays.fill(hidden, Float.NaN);
        for (int t = 0; t < tokens; t++) {
            System.arraycopy(
                    batch.hidden()[t], 0, hidden, t * SHAPE.hidden(), batch.hidden()[t].length);
            System.arraycopy(batch.ids()[t], 0, ids, t * SHAPE.topK(), SHAPE.topK());
            System.arraycopy(batch.weights()[t], 0, weights, t * SHAPE.topK(), SHAPE.topK());
        }
        buffers.write(buffers.hidden, hidden);
        buffers.write(buffers.ids, ids);
        buffers.write(buffers.weights, weights);
        buffers.write(buffers.count, new int[] {tokens});
        buffers.write(buffers.out, new float[M * SHAPE.hidden()]);
    }

    private static void assertRight(float[] got, Harness.Batch batch, int tokens) {
        int h = SHAPE.hidden();
        float[] hidden = new float[tokens * h];
        int[] ids = new int[tokens * SHAPE.topK()];
        float[] weights = new float[ids.length];
        for (int t = 0; t < tokens; t++) {
            System.arraycopy(batch.hidden()[t], 0, hidden, t * h, h);
            System.arraycopy(batch.ids()[t], 0, ids, t * SHAPE.topK(), SHAPE.topK());
            System.arraycopy(batch.weights()[t], 0, weights, t * SHAPE.topK(), SHAPE.topK());
        }
        double[] want =
                new Float64Oracle(WEIGHTS, null, Activation.swiGlu())
                        .routed(hidden, new Routing(tokens, SHAPE.topK(), ids, weights));
        assertThat(TokenErrors.of(Arrays.copyOf(got, tokens * h), want, tokens, h).max())
                .isLessThan(6e-3);
        assertThat(Arrays.copyOfRange(got, tokens * h, got.length))
                .as("rows past T")
                .isEqualTo(new float[got.length - tokens * h]);
    }

    @Test
    void shouldWorkOnThreadsWithoutAContextAndLeaveNone() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build());
                EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
            layer.prepare();
            BoundStep step = layer.bind(List.of(buffers.step()));
            write(buffers, Harness.random(SHAPE, 2, 1), 2);
            CompletableFuture.runAsync(
                            () -> {
                                assertThat(cuda.current()).isZero();
                                layer.enqueue(cuda.stream(), step);
                                layer.synchronize(cuda.stream());
                                assertThat(cuda.current()).isZero();
                            })
                    .join();
            layer.check();
            if (computes()) {
                layer.result(0, 1);
            }
        }
    }

    @Test
    void shouldLeaveAnotherContextCurrent() {
        try (EngineCuda other = engine();
                MoeLayer layer = open(config().cudaContext(cuda.context()).build())) {
            cuda.makeCurrent(cuda.context());
            try (EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
                cuda.makeCurrent(other.context());
                layer.prepare();
                BoundStep step = layer.bind(List.of(buffers.step()));
                layer.enqueue(cuda.stream(), step);
                layer.synchronize(cuda.stream());
                try (MoeGraph graph = layer.capture(cuda.stream(), step)) {
                    graph.launch(cuda.stream());
                    layer.synchronize(cuda.stream());
                }
                assertThat(cuda.current()).isEqualTo(other.context());
                cuda.makeCurrent(cuda.context());
            }
            layer.close();
            assertThat(cuda.current()).isEqualTo(cuda.context());
        }
    }

    @Test
    void shouldRefuseToDispatchOrCaptureBeforePrepare() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build());
                EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
            assertThatThrownBy(() -> layer.bind(List.of(buffers.step())))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessage("the layer is not prepared: call prepare() first");
            cuda.beginCapture();
            assertThatThrownBy(layer::prepare)
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessage(
                            "prepare was called while this thread captures a stream: prepare before the"
                                    + " capture begins; this one is broken, end it and start anew");
            assertThatThrownBy(cuda::endCapture).isInstanceOf(RuntimeException.class);

            layer.prepare(); // the same layer, now in the right order
            BoundStep step = layer.bind(List.of(buffers.step()));
            cuda.beginCapture();
            layer.enqueue(cuda.stream(), step);
            long graph = cuda.endCapture();
            write(buffers, Harness.random(SHAPE, 2, 1), 2);
            cuda.launch(graph);
            cuda.synchronize();
            layer.check();
            cuda.destroyGraph(graph);
        }
    }

    @Test
    void shouldNameATensorThatMoved() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build());
                EngineBuffers bound = new EngineBuffers(cuda, layer.config(), 16);
                EngineBuffers moved = new EngineBuffers(cuda, layer.config(), 16)) {
            layer.prepare();
            StepTensors before = bound.step();
            BoundStep step = layer.bind(List.of(before));
            step.requireUnmoved(List.of(bound.step()));
            StepTensors now =
                    StepTensors.topk(
                            before.out(),
                            moved.hidden,
                            before.topkIds(),
                            before.topkWeights(),
                            before.tokenCount());
            assertThatThrownBy(() -> step.requireUnmoved(List.of(now)))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessage(
                            String.format(
                                    "rank 0: hidden was F32[16, 64] device at 0x%x when bound and"
                                            + " is F32[16, 64] device at 0x%x now: bind again and"
                                            + " capture again, or keep one buffer",
                                    bound.hidden.address(), moved.hidden.address()));
            assertThatThrownBy(() -> step.requireUnmoved(List.of(before.accumulating())))
                    .hasMessageContaining("accumulate was false when bound and is true");
        }
    }

    @Test
    void shouldNameMemoryThatWasFreed() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build())) {
            layer.prepare();
            EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16);
            BoundStep step = layer.bind(List.of(buffers.step()));
            step.requireAlive();
            buffers.close();
            String hidden = String.format("hidden=0x%x, F32[16, 64] device,", hiddenOf(buffers));
            assertThatThrownBy(step::requireAlive)
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("bound memory is gone, rank 0: " + hidden)
                    .hasMessageContaining("it was freed, is host memory, or is smaller");
            assertThatThrownBy(() -> layer.bind(List.of(buffers.step())))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("rank 0: " + hidden);
        }
    }

    private static long hiddenOf(EngineBuffers buffers) {
        return buffers.hidden.address();
    }

    @Test
    void shouldNameHostMemoryThatIsPassedAsADeviceAddress() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build());
                EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
            layer.prepare();
            StepTensors good = buffers.step();
            StepTensors bad =
                    StepTensors.topk(
                            Tensor.device(0x10000, DType.F32, M, SHAPE.hidden()),
                            good.hidden(),
                            good.topkIds(),
                            good.topkWeights(),
                            good.tokenCount());
            assertThatThrownBy(() -> layer.bind(List.of(bad)))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining("out=0x10000, F32[16, 64] device, is not in device");
        }
    }

    @Test
    void shouldNameMemoryAndStreamsOfAnotherContext() {
        try (MoeLayer layer = open(config().build()); // the primary context, not the engine's
                EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
            layer.prepare();
            assertThatThrownBy(() -> layer.bind(List.of(buffers.step())))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining(
                            String.format("is memory of context 0x%x", cuda.context()))
                    .hasMessageContaining("the device's primary context")
                    .hasMessageContaining(
                            String.format("open it with cudaContext(0x%x)", cuda.context()));
            StepTensors own =
                    StepTensors.topk(
                            layer.memory().allocate(DType.F32, M, SHAPE.hidden()),
                            layer.memory().allocate(DType.F32, M, SHAPE.hidden()),
                            layer.memory().allocate(DType.I32, M, SHAPE.topK()),
                            layer.memory().allocate(DType.F32, M, SHAPE.topK()),
                            layer.memory().allocate(DType.I32, 1));
            BoundStep step = layer.bind(List.of(own));
            String stream = String.format("stream=0x%x is no stream of the", cuda.stream());
            assertThatThrownBy(() -> layer.enqueue(cuda.stream(), step))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining(stream)
                    .hasMessageContaining("open the layer with cudaContext(...)");
            assertThatThrownBy(() -> layer.capture(cuda.stream(), step))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessageContaining(stream);
            layer.enqueue(0L, step); // the layer is none the worse
            layer.synchronize(0L);
            layer.check();
        }
        assertThat(cuda.current()).isEqualTo(cuda.context());
    }

    @Test
    void shouldRefuseToCaptureTheDefaultStream() {
        try (MoeLayer layer = open(config().cudaContext(cuda.context()).build());
                EngineBuffers buffers = new EngineBuffers(cuda, layer.config(), 16)) {
            layer.prepare();
            BoundStep step = layer.bind(List.of(buffers.step()));
            assertThatThrownBy(() -> layer.capture(0L, step))
                    .isInstanceOf(IllegalArgumentException.class)
                    .hasMessage("the legacy default stream cannot be captured: create a stream");
            cuda.beginCapture();
            assertThatThrownBy(() -> layer.capture(cuda.stream(), step))
                    .isInstanceOf(IllegalStateException.class)
                    .hasMessageContaining("the stream is capturing already: call enqueue");
            cuda.destroyGraph(cuda.endCapture());
        }
    }
}
