package io.moe4j.checker;

import java.util.Arrays;

/**
 * The experts of some tokens and their final weights, row-major [T, K]; the order within a row has
 * no meaning, and an id outside 0..E−1 stands for "none".
 *
 * @param tokens T
 * @param topK K
 * @param ids expert ids; not copied
 * @param weights the weights of those ids; not copied
 */
public record Routing(int tokens, int topK, int[] ids, float[] weights) {
    /**
     * Checks the lengths.
     *
     * @param tokens {@link #tokens()}
     * @param topK {@link #topK()}
     * @param ids {@link #ids()}
     * @param weights {@link #weights()}
     * @throws IllegalArgumentException if a value is refused; the message names field and value
     */
    public Routing {
        if (ids.length != tokens * topK || weights.length != tokens * topK) {
            throw new IllegalArgumentException(
                    "routing of "
                            + tokens
                            + " tokens with topK="
                            + topK
                            + " has "
                            + ids.length
                            + " ids and "
                            + weights.length
                            + " weights");
        }
    }

    /**
     * {@return the ids of one token, sorted: equal arrays mean equal sets}
     *
     * @param token number of the token
     */
    public int[] sortedIds(int token) {
        int[] row = Arrays.copyOfRange(ids, token * topK, (token + 1) * topK);
        Arrays.sort(row);
        return row;
    }

    /**
     * {@return the weight a token gives an expert, summed over repeats; 0 if it does not visit it}
     *
     * @param token number of the token
     * @param expert number of the expert
     */
    public double weightOf(int token, int expert) {
        double sum = 0;
        for (int k = token * topK; k < (token + 1) * topK; k++) {
            if (ids[k] == expert) {
                sum += weights[k];
            }
        }
        return sum;
    }
}
