package io.moe4j.model;

/**
 * How router logits become expert ids and weights. Selection works on the scores below and, where
 * two experts tie, takes the <b>lowest expert id first</b>; the chosen experts are listed by
 * descending score, ties again by ascending id. A NaN score ranks below every number.
 *
 * <ul>
 *   <li>{@link Scoring#SOFTMAX}: scores are softmax(logits) over all experts; the weights are the
 *       chosen scores, divided by their sum if {@code renormalise} (Mixtral, Qwen, OLMoE).
 *   <li>{@link Scoring#TOPK_SOFTMAX}: the experts are chosen by logit; the weights are the softmax
 *       over the chosen logits only (gpt-oss).
 *   <li>{@link Scoring#SIGMOID}: scores are sigmoid(logits); the choice is by score + correction
 *       bias, limited to the best {@code topkGroups} of {@code groups} groups of consecutive
 *       experts, a group ranking by the sum of its two best biased scores (ties: lowest group
 *       first); the weights are the unbiased scores, divided by their sum + 1e-20 if {@code
 *       renormalise} (DeepSeek-V3, GLM-4-MoE, Kimi-K2).
 * </ul>
 *
 * In every case the weights are multiplied by {@code scale} last. Logits are accumulated in float64
 * and rounded to float32 once; scores and weights are computed in float64 from those and rounded to
 * float32 at the end, so that every backend chooses alike.
 *
 * @param scoring the score function
 * @param renormalise whether the chosen weights are divided by their sum
 * @param groups number of expert groups, 1 for no grouping; SIGMOID only
 * @param topkGroups number of groups that may be chosen from; SIGMOID only
 * @param scale factor on the final weights (routed_scaling_factor)
 */
public record RoutingRule(
        Scoring scoring, boolean renormalise, int groups, int topkGroups, float scale) {
    /** The score functions. */
    public enum Scoring {
        /** Softmax over all experts, then top-k. */
        SOFTMAX,
        /** Top-k by logit, then softmax over the chosen. */
        TOPK_SOFTMAX,
        /** Sigmoid, correction bias, group-limited top-k. */
        SIGMOID
    }

    /** Added to the sum before dividing, SIGMOID only (as in DeepSeek-V3's published code). */
    public static final double SIGMOID_SUM_EPSILON = 1e-20;

    /**
     * Checks the fields against each other.
     *
     * @param scoring the score function
     * @param renormalise whether the chosen weights are divided by their sum
     * @param groups number of expert groups; 1 unless SIGMOID
     * @param topkGroups number of groups that may be chosen from, 1 to {@code groups}
     * @param scale finite factor on the final weights
     * @throws IllegalArgumentException naming the fields and their values
     */
    public RoutingRule {
        if (scoring == null) {
            throw new IllegalArgumentException("scoring is null: choose a RoutingRule.Scoring");
        }
        if (groups < 1 || topkGroups < 1 || topkGroups > groups) {
            throw new IllegalArgumentException(
                    "groups="
                            + groups
                            + " topkGroups="
                            + topkGroups
                            + ": need 1 <= topkGroups <= groups");
        }
        if (scoring != Scoring.SIGMOID && groups != 1) {
            throw new IllegalArgumentException(
                    "groups=" + groups + " with " + scoring + ": groups need SIGMOID scoring");
        }
        if (!Float.isFinite(scale)) {
            throw new IllegalArgumentException("scale=" + scale + " is not finite");
        }
    }

    /**
     * Softmax over all experts, top-k, optionally renormalised.
     *
     * @param renormalise whether the chosen weights are divided by their sum
     * @return the rule of Mixtral, Qwen and OLMoE
     */
    public static RoutingRule softmaxTopK(boolean renormalise) {
        return new RoutingRule(Scoring.SOFTMAX, renormalise, 1, 1, 1f);
    }

    /**
     * Top-k by logit, then softmax over the chosen logits.
     *
     * @return the rule of gpt-oss
     */
    public static RoutingRule topKSoftmax() {
        return new RoutingRule(Scoring.TOPK_SOFTMAX, false, 1, 1, 1f);
    }

    /**
     * Sigmoid scores with correction bias and group-limited top-k.
     *
     * @param groups number of expert groups; a divisor of E
     * @param topkGroups number of groups that may be chosen from
     * @param renormalise whether the chosen weights are divided by their sum
     * @param scale factor on the final weights
     * @return the rule of DeepSeek-V3, GLM-4-MoE and Kimi-K2
     * @throws IllegalArgumentException naming the fields that do not fit each other
     */
    public static RoutingRule sigmoidGrouped(
            int groups, int topkGroups, boolean renormalise, float scale) {
        return new RoutingRule(Scoring.SIGMOID, renormalise, groups, topkGroups, scale);
    }

    /**
     * Checks this rule against a layer's shape.
     *
     * @param shape the layer's sizes
     * @throws IllegalArgumentException naming the fields that do not fit
     */
    public void validate(MoeShape shape) {
        if (shape.experts() % groups != 0) {
            throw new IllegalArgumentException(
                    "experts=" + shape.experts() + " is not a multiple of groups=" + groups);
        }
        int selectable = shape.experts() / groups * topkGroups;
        if (shape.topK() > selectable) {
            throw new IllegalArgumentException(
                    "topK="
                            + shape.topK()
                            + " exceeds the "
                            + selectable
                            + " experts in topkGroups="
                            + topkGroups
                            + " of groups="
                            + groups);
        }
    }
}
