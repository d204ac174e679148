package io.moe4j.bench;

import io.moe4j.model.ModelPreset;
import io.moe4j.model.MoeShape;
import java.io.IOException;
import java.util.List;
import java.util.Map;

/**
 * Steps with so many tokens that the tensor cores, not the memory, are the limit: two models, one
 * rank, 4096 tokens, uniform routing. With seed 1 they are the cases of bench/prefill.json.
 */
public final class Prefill {
    /** Number of the first of these cases; those of bench/cases.json are smaller. */
    public static final int FIRST_NUMBER = 101;

    private static final int TOKENS = 4096;

    private Prefill() {}

    /**
     * {@return the cases of a seed}
     *
     * @param seed seed of what is random
     * @throws IOException if the file cannot be read
     */
    public static List<BenchCase> cases(long seed) throws IOException {
        return List.of(
                of(FIRST_NUMBER, ModelPreset.QWEN3_30B_A3B, seed),
                of(FIRST_NUMBER + 1, ModelPreset.MIXTRAL_8X7B, seed));
    }

    private static BenchCase of(int number, ModelPreset preset, long seed) throws IOException {
        MoeShape shape = preset.shape();
        RoutingPattern uniform = RoutingPattern.parse("uniform");
        int[] ids = uniform.ids(TOKENS, shape.experts(), shape.topK(), seed);
        return new BenchCase(
                number,
                preset.id(),
                shape.hidden(),
                shape.intermediate(),
                shape.experts(),
                shape.topK(),
                1,
                TOKENS,
                uniform.toString(),
                RoutingPattern.counts(ids, 0, shape.experts()),
                Map.of());
    }
}
