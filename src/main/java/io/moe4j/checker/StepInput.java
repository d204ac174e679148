package io.moe4j.checker;

import io.moe4j.tensor.Bf16;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * What one rank brings to a step, on the host. Arrays are not copied.
 *
 * @param tokens T
 * @param hidden [T, H]
 * @param topkIds [T, K] with TOPK input, else null
 * @param topkWeights [T, K] with TOPK input, else null
 * @param routerLogits [T, E] with LOGITS input, else null
 */
public record StepInput(
        int tokens, float[] hidden, int[] topkIds, float[] topkWeights, float[] routerLogits) {
    /**
     * {@return the hidden states only}
     *
     * @param tokens T of this rank
     * @param hidden hidden states [T, H], row-major
     */
    public static StepInput hidden(int tokens, float[] hidden) {
        return new StepInput(tokens, hidden, null, null, null);
    }

    /**
     * {@return the ids and weights by the caller}
     *
     * @param tokens T of this rank
     * @param hidden hidden states [T, H], row-major
     * @param ids expert ids [T, K]
     * @param weights their weights [T, K]
     */
    public static StepInput topk(int tokens, float[] hidden, int[] ids, float[] weights) {
        return new StepInput(tokens, hidden, ids, weights, null);
    }

    /**
     * Router logits by the caller.
     *
     * @param tokens T of this rank
     * @param hidden hidden states [T, H], row-major
     * @param logits router logits [T, E]
     * @return the input of one rank
     */
    public static StepInput logits(int tokens, float[] hidden, float[] logits) {
        return new StepInput(tokens, hidden, null, null, logits);
    }

    /**
     * {@return the hidden states [T, H] spread over ranks as {@link LayerHarness} does it}
     *
     * @param hidden hidden states [T, H], row-major
     * @param tokens T of this rank
     * @param ranks R, number of ranks
     */
    public static List<StepInput> spread(float[] hidden, int tokens, int ranks) {
        int width = tokens == 0 ? 0 : hidden.length / tokens;
        List<StepInput> inputs = new ArrayList<>();
        int from = 0;
        for (int count : LayerHarness.spread(tokens, ranks)) {
            inputs.add(
                    hidden(
                            count,
                            Arrays.copyOfRange(hidden, from * width, (from + count) * width)));
            from += count;
        }
        return inputs;
    }

    /** The same with hidden states that bfloat16 holds exactly. */
    StepInput roundedToBf16() {
        float[] rounded = new float[hidden.length];
        for (int i = 0; i < rounded.length; i++) {
            rounded[i] = Bf16.toFloat(Bf16.fromFloat(hidden[i]));
        }
        return new StepInput(tokens, rounded, topkIds, topkWeights, routerLogits);
    }
}
