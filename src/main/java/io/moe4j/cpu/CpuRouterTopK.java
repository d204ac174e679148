package io.moe4j.cpu;

import io.moe4j.model.RoutingRule;

/**
 * Logits to expert ids and weights for one token, by the rules of {@link RoutingRule}, in float64.
 * Holds scratch: one instance per thread.
 */
final class CpuRouterTopK {
    private final RoutingRule rule;
    private final float[] correctionBias;
    private final int topK;
    private final double[] scores;
    private final double[] ranking;
    private final boolean[] groupChosen;

    CpuRouterTopK(RoutingRule rule, float[] correctionBias, int experts, int topK) {
        this.rule = rule;
        this.correctionBias = correctionBias;
        this.topK = topK;
        this.scores = new double[experts];
        this.ranking = new double[experts];
        this.groupChosen = new boolean[rule.groups()];
    }

    /** Writes K ids and weights at {@code at}. */
    void select(int[] ids, float[] weights, int at, float[] logits, int logitsAt) {
        score(logits, logitsAt);
        if (rule.groups() > 1) {
            chooseGroups();
        }
        for (int k = 0; k < topK; k++) {
            ids[at + k] = best(ids, at, k);
        }
        weigh(weights, ids, at);
    }

    private void score(float[] logits, int at) {
        double max = Double.NEGATIVE_INFINITY;
        for (int e = 0; e < scores.length; e++) {
            double logit = logits[at + e];
            ranking[e] = logit;
            max = Math.max(max, logit);
        }
        switch (rule.scoring()) {
            case SOFTMAX -> {
                double sum = 0;
                for (int e = 0; e < scores.length; e++) {
                    scores[e] = Math.exp(ranking[e] - max);
                    sum += scores[e];
                }
                for (int e = 0; e < scores.length; e++) {
                    scores[e] /= sum;
                }
            }
            case TOPK_SOFTMAX -> System.arraycopy(ranking, 0, scores, 0, scores.length);
            case SIGMOID -> {
                for (int e = 0; e < scores.length; e++) {
                    scores[e] = 1.0 / (1.0 + Math.exp(-ranking[e]));
                    ranking[e] = correctionBias == null ? scores[e] : scores[e] + correctionBias[e];
                }
            }
            default -> throw new IllegalArgumentException("scoring " + rule.scoring());
        }
    }

    /** The best topkGroups groups by the sum of their two best biased scores. */
    private void chooseGroups() {
        java.util.Arrays.fill(groupChosen, false);
        for (int chosen = 0; chosen < rule.topkGroups(); chosen++) {
            int best = -1;
            double bestSum = 0;
            for (int g = 0; g < groupChosen.length; g++) {
                if (groupChosen[g]) {
                    continue;
                }
                double sum = topTwo(g);
                if (best < 0 || ranksAbove(sum, bestSum)) {
                    best = g;
                    bestSum = sum;
                }
            }
            groupChosen[best] = true;
        }
    }

    private double topTwo(int group) {
        int size = ranking.length / groupChosen.length;
        double first = Double.NEGATIVE_INFINITY;
        double second = Double.NEGATIVE_INFINITY;
        for (int e = group * size; e < (group + 1) * size; e++) {
            double value = ranking[e];
            if (value > first) {
                second = first;
                first = value;
            } else if (value > second) {
                second = value;
            }
        }
        return size == 1 ? first : first + second;
    }

    private int best(int[] ids, int at, int taken) {
        int best = -1;
        for (int e = 0; e < ranking.length; e++) {
            if (rule.groups() > 1 && !groupChosen[e / (ranking.length / rule.groups())]) {
                continue;
            }
            if ((best < 0 || ranksAbove(ranking[e], ranking[best]))
                    && !contains(ids, at, taken, e)) {
                best = e;
            }
        }
        return best;
    }

    /** Strictly above, so that ties keep the lower id; NaN is below every number. */
    private static boolean ranksAbove(double a, double b) {
        return a > b || (Double.isNaN(b) && !Double.isNaN(a));
    }

    private static boolean contains(int[] ids, int at, int count, int id) {
        for (int k = 0; k < count; k++) {
            if (ids[at + k] == id) {
                return true;
            }
        }
        return false;
    }

    private void weigh(float[] weights, int[] ids, int at) {
        double divisor = 1;
        double shift = 0;
        if (rule.scoring() == RoutingRule.Scoring.TOPK_SOFTMAX) {
            shift = scores[ids[at]]; // why: ids are sorted, the first has the largest logit
            divisor = 0;
            for (int k = 0; k < topK; k++) {
                divisor += Math.exp(scores[ids[at + k]] - shift);
            }
        } else if (rule.renormalise()) {
            divisor =
                    rule.scoring() == RoutingRule.Scoring.SIGMOID
                            ? RoutingRule.SIGMOID_SUM_EPSILON
                            : 0;
            for (int k = 0; k < topK; k++) {
                divisor += scores[ids[at + k]];
            }
        }
        for (int k = 0; k < topK; k++) {
            double score = scores[ids[at + k]];
            double numerator =
                    rule.scoring() == RoutingRule.Scoring.TOPK_SOFTMAX
                            ? Math.exp(score - shift)
                            : score;
            weights[at + k] = (float) (numerator / divisor * rule.scale());
        }
    }
}
