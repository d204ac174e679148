package io.moe4j.examples;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;

/** The graphs of docs/graphs.md compute what eager steps compute, bit for bit. */
class GraphExampleTest {
    private static final MoeShape SHAPE = MoeShape.of(64, 48, 12, 4);
    private static final int M = 16;
    private static final MoeConfig CONFIG =
            MoeConfig.builder()
                    .weights(RandomWeights.of(SHAPE, 1))
                    .backend("cpu")
                    .hiddenDType(DType.F32)
                    .maxTokensPerRank(M)
                    .handles(2)
                    .build();

    @Test
    void shouldServeEveryBatchWithOneGraph() {
        List<GraphExample.Batch> batches = new ArrayList<>();
        for (int tokens : new int[] {1, M, 0, 3}) {
            batches.add(batch(tokens, 10 + tokens));
        }
        List<float[]> got = GraphExample.replay(CONFIG, 0L, batches);
        try (Rig rig = new Rig()) {
            float[] y = new float[M * SHAPE.hidden()]; // rows past T keep what was there
            for (int i = 0; i < batches.size(); i++) {
                rig.write(0, batches.get(i));
                rig.layer.enqueue(0L, rig.steps.get(0));
                float[] eager = rig.read(0);
                int written = batches.get(i).tokens() * SHAPE.hidden();
                System.arraycopy(eager, 0, y, 0, written);
                assertThat(got.get(i)).as("batch %d", i).isEqualTo(y);
            }
        }
    }

    @Test
    void shouldRunInPiecesWithOwnWorkBetween() {
        try (Rig rig = new Rig()) {
            rig.write(0, batch(5, 1));
            rig.layer.enqueue(0L, rig.steps.get(0));
            float[] eager = rig.read(0);
            int[] ran = new int[1];
            GraphExample.inTwoPieces(rig.layer, rig.steps.get(0), 0L, () -> ran[0]++);
            assertThat(ran[0]).isEqualTo(3);
            assertThat(rig.read(0)).isEqualTo(eager);
        }
    }

    @Test
    void shouldInterleaveTwoMicroBatchesInOneGraph() {
        try (Rig rig = new Rig()) {
            List<float[]> eager = new ArrayList<>();
            for (int i = 0; i < 2; i++) {
                rig.write(i, batch(7 + i, 20 + i));
                rig.layer.enqueue(0L, rig.steps.get(i));
                eager.add(rig.read(i));
            }
            try (MoeGraph graph =
                    GraphExample.twoMicroBatches(
                            rig.layer, rig.steps.get(0), rig.steps.get(1), 0L)) {
                graph.launch(0L);
                graph.launch(0L);
            }
            assertThat(rig.read(0)).isEqualTo(eager.get(0));
            assertThat(rig.read(1)).isEqualTo(eager.get(1));
        }
    }

    @Test
    void shouldOverlapTwoMicroBatches() {
        try (Rig rig = new Rig()) {
            List<float[]> eager = new ArrayList<>();
            for (int i = 0; i < 2; i++) {
                rig.write(i, batch(5 + i, 40 + i));
                rig.layer.enqueue(0L, rig.steps.get(i));
                eager.add(rig.read(i));
            }
            rig.layer.memory().write(rig.tensors.get(0).out(), zeros());
            rig.layer.memory().write(rig.tensors.get(1).out(), zeros());
            GraphExample.overlapped(rig.steps.get(0), rig.steps.get(1), 0L);
            assertThat(Arrays.copyOf(rig.read(0), 5 * SHAPE.hidden()))
                    .isEqualTo(Arrays.copyOf(eager.get(0), 5 * SHAPE.hidden()));
            assertThat(Arrays.copyOf(rig.read(1), 6 * SHAPE.hidden()))
                    .isEqualTo(Arrays.copyOf(eager.get(1), 6 * SHAPE.hidden()));
        }
    }

    private static Tensor zeros() {
        return Tensor.allocateHost(DType.F32, M, SHAPE.hidden());
    }

    @Test
    void shouldChainTwoLayersInOneGraph() {
        MoeConfig other = CONFIG.toBuilder().weights(RandomWeights.of(SHAPE, 2)).build();
        try (Rig rig = new Rig();
                MoeLayer second = Moe.open(other)) {
            second.prepare();
            Tensor middle = rig.tensors.get(0).out();
            StepTensors from = rig.tensors.get(0);
            Tensor out = second.memory().allocate(DType.F32, M, SHAPE.hidden());
            BoundStep next =
                    second.bind(
                            List.of(
                                    StepTensors.topk(
                                            out,
                                            middle,
                                            from.topkIds(),
                                            from.topkWeights(),
                                            from.tokenCount())));
            rig.write(0, batch(6, 30));
            rig.layer.enqueue(0L, rig.steps.get(0));
            second.enqueue(0L, next);
            float[] eager = out.toFloats();
            out.setFloats(new float[M * SHAPE.hidden()]);
            try (MoeGraph graph = GraphExample.twoLayers(rig.steps.get(0), next, 0L)) {
                graph.launch(0L);
            }
            assertThat(out.toFloats()).isEqualTo(eager);
            assertThat(Arrays.copyOf(eager, 64)).isNotEqualTo(new float[64]);
        }
    }

    private static GraphExample.Batch batch(int tokens, long seed) {
        SplittableRandom random = new SplittableRandom(seed);
        float[] hidden = new float[M * SHAPE.hidden()];
        int[] ids = new int[M * SHAPE.topK()];
        float[] weights = new float[M * SHAPE.topK()];
        for (int i = 0; i < hidden.length; i++) {
            hidden[i] = (float) random.nextDouble(-1, 1);
        }
        for (int i = 0; i < ids.length; i++) {
            ids[i] = random.nextInt(SHAPE.experts());
            weights[i] = (float) random.nextDouble();
        }
        return new GraphExample.Batch(
                tokens,
                Tensor.ofFloats(hidden, M, SHAPE.hidden()),
                Tensor.ofInts(ids, M, SHAPE.topK()),
                Tensor.ofFloats(weights, M, SHAPE.topK()));
    }

    /** A layer with a step and tensors for each of its two handles. */
    private static final class Rig implements AutoCloseable {
        final MoeLayer layer = Moe.open(CONFIG);
        final List<StepTensors> tensors = new ArrayList<>();
        final List<BoundStep> steps = new ArrayList<>();

        Rig() {
            layer.prepare();
            BackendMemory memory = layer.memory();
            for (int handle = 0; handle < 2; handle++) {
                StepTensors t =
                        StepTensors.topk(
                                memory.allocate(DType.F32, M, SHAPE.hidden()),
                                memory.allocate(DType.F32, M, SHAPE.hidden()),
                                memory.allocate(DType.I32, M, SHAPE.topK()),
                                memory.allocate(DType.F32, M, SHAPE.topK()),
                                memory.allocate(DType.I32, 1));
                tensors.add(t);
                steps.add(layer.bind(List.of(t), handle));
            }
        }

        void write(int handle, GraphExample.Batch batch) {
            StepTensors t = tensors.get(handle);
            layer.memory().write(t.hidden(), batch.hidden());
            layer.memory().write(t.topkIds(), batch.ids());
            layer.memory().write(t.topkWeights(), batch.weights());
            t.tokenCount().setInt(0, batch.tokens());
        }

        float[] read(int handle) {
            return tensors.get(handle).out().toFloats();
        }

        @Override
        public void close() {
            layer.close();
        }
    }
}
