package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.Harness;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.engines.EngineContract;
import io.moe4j.engines.EngineCuda;
import io.moe4j.engines.JCudaEngine;
import io.moe4j.examples.EngineWeightsExample;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.model.WeightMatrix;
import io.moe4j.weights.EngineWeights;
import io.moe4j.weights.GgufType;
import io.moe4j.weights.GgufWriter;
import java.nio.ByteBuffer;
import java.util.function.Function;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** The engine's contract on a GPU, with an engine in plain JCuda. */
@EnabledIfCuda
class EngineGpuTest extends EngineContract {
    @Override
    protected EngineCuda engine() {
        return new JCudaEngine();
    }

    @Override
    protected MoeLayer open(MoeConfig config) {
        return Moe.open(config);
    }

    @Override
    protected boolean computes() {
        return true;
    }

    @ParameterizedTest
    @EnumSource(GgufType.class)
    void shouldRunTheExpertsOfAGgufFileOnTheGpu(GgufType type) {
        MoeShape shape = MoeShape.of(128, 96, 3, 2);
        RandomWeights source = RandomWeights.of(shape, 9);
        LayerWeights weights =
                EngineWeightsExample.gguf(
                        shape,
                        type,
                        all(type, source, ExpertWeights::gate),
                        all(type, source, ExpertWeights::up),
                        all(type, source, ExpertWeights::down));
        LayerWeights rounded =
                EngineWeights.of(
                                shape,
                                "rounded",
                                e ->
                                        ExpertWeights.of(
                                                GgufWriter.round(source.expert(e).gate(), type),
                                                GgufWriter.round(source.expert(e).up(), type),
                                                GgufWriter.round(source.expert(e).down(), type)))
                        .build();
        Harness.Batch batch = Harness.random(shape, 7, 11);
        MoeConfig config =
                MoeConfig.builder().weights(weights).backend("cuda").maxTokensPerRank(8).build();
        try (Harness harness = new Harness(config, false, 0L)) {
            float[][] out = harness.run(batch);
            float[] got = new float[7 * 128];
            float[] hidden = new float[7 * 128];
            int[] ids = new int[14];
            float[] factors = new float[14];
            for (int t = 0; t < 7; t++) {
                System.arraycopy(out[t], 0, got, t * 128, 128);
                System.arraycopy(batch.hidden()[t], 0, hidden, t * 128, 128);
                System.arraycopy(batch.ids()[t], 0, ids, t * 2, 2);
                System.arraycopy(batch.weights()[t], 0, factors, t * 2, 2);
            }
            double[] want =
                    new Float64Oracle(rounded, null, Activation.swiGlu())
                            .routed(hidden, new Routing(7, 2, ids, factors));
            double error = TokenErrors.of(got, want, 7, 128).max();
            System.out.println("GGUF " + type + " worst token " + error);
            assertThat(error).isLessThan(6e-3);
        }
    }

    private static ByteBuffer all(
            GgufType type, LayerWeights source, Function<ExpertWeights, WeightMatrix> which) {
        ByteBuffer first = GgufWriter.encode(type, which.apply(source.expert(0)));
        ByteBuffer all = ByteBuffer.allocateDirect(first.remaining() * source.shape().experts());
        for (int e = 0; e < source.shape().experts(); e++) {
            all.put(GgufWriter.encode(type, which.apply(source.expert(e))));
        }
        return all.flip();
    }
}
