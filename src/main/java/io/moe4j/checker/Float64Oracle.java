package io.moe4j.checker;

import io.moe4j.MoeConfig;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/**
 * The textbook formula of a whole layer in float64, token by token; it shares no code with any
 * backend, so that an agreement means something. Each expert that is hit is decoded once, one
 * matrix at a time, and multiplied with all tokens that chose it; several experts are worked on in
 * parallel, as many as fit into a quarter of the heap. Results do not depend on the number of
 * threads. Instances are immutable and thread-safe.
 */
public final class Float64Oracle {
    private final LayerWeights weights;
    private final MoeShape shape;
    private final RoutingRule rule;
    private final Activation activation;

    /**
     * An oracle for a layer.
     *
     * @param weights the layer's weights
     * @param rule may be null if only {@link #routed} and {@link #shared} are used
     * @param activation the layer's activation
     */
    public Float64Oracle(LayerWeights weights, RoutingRule rule, Activation activation) {
        this.weights = weights;
        this.shape = weights.shape();
        this.rule = rule;
        this.activation = activation;
    }

    /**
     * {@return an oracle for the layer of a configuration with weights}
     *
     * @param config the layer, with weights
     */
    public static Float64Oracle of(MoeConfig config) {
        return new Float64Oracle(config.weights(), config.rule(), config.activation());
    }

    /**
     * {@return the expected result for {@code tokens} rows of hidden states, [T, H]}
     *
     * @param layer number of the layer
     * @param hidden hidden states [T, H], row-major
     * @param tokens T, number of tokens
     */
    public ReferenceCase expect(int layer, float[] hidden, int tokens) {
        Routing routing = route(logits(hidden, tokens), tokens);
        double[] routed = routed(hidden, routing);
        double[] full = routed.clone();
        addInto(full, shared(hidden, tokens));
        return new ReferenceCase(layer, "oracle", tokens, hidden, routing, routed, full);
    }

    /**
     * Router logits [T, E]: router · x + bias in float64, rounded to float32 once.
     *
     * @param hidden hidden states [T, H], row-major
     * @param tokens T, number of tokens
     * @return the logits
     */
    public float[] logits(float[] hidden, int tokens) {
        WeightMatrix router = weights.router();
        if (router == null) {
            throw new IllegalArgumentException(weights.description() + " has no router weights");
        }
        double[] exact = product(decode(router), router, widen(hidden), tokens);
        float[] bias = weights.routerBias();
        float[] logits = new float[exact.length];
        for (int i = 0; i < logits.length; i++) {
            logits[i] = (float) (bias == null ? exact[i] : exact[i] + bias[i % shape.experts()]);
        }
        return logits;
    }

    /**
     * Applies the routing rule to logits [T, E].
     *
     * @param logits router logits [T, E]
     * @param tokens T, number of tokens
     * @return ids and weights, [T, K]
     */
    public Routing route(float[] logits, int tokens) {
        int k = shape.topK();
        int[] ids = new int[tokens * k];
        float[] chosenWeights = new float[tokens * k];
        for (int token = 0; token < tokens; token++) {
            double[] row = row(logits, token);
            int[] chosen = best(selectionScores(row), excluded(row), k);
            double[] final64 = finalWeights(row, chosen);
            for (int i = 0; i < k; i++) {
                ids[token * k + i] = chosen[i];
                chosenWeights[token * k + i] = (float) final64[i];
            }
        }
        return new Routing(tokens, k, ids, chosenWeights);
    }

    /**
     * {@return the scores [E] one token's experts are chosen by, before groups are excluded:
     * probabilities, logits or biased sigmoid scores}
     *
     * @param logits the token's logits, [E]
     */
    public double[] selectionScores(float[] logits) {
        return selectionScores(row(logits, 0));
    }

    /**
     * {@return the output of the routed experts [T, H] for given experts and weights} An id outside
     * 0..E−1 is skipped; an expert listed twice contributes twice.
     *
     * @param hidden hidden states [T, H], row-major
     * @param routing ids and weights of each token
     */
    public double[] routed(float[] hidden, Routing routing) {
        double[] input = widen(hidden);
        double[] sum = new double[input.length];
        List<Visits> hit = visits(routing);
        int threads = threads(shape.hidden(), shape.intermediate());
        ExecutorService pool = Executors.newFixedThreadPool(threads, Float64Oracle::worker);
        try {
            // Experts run in waves and are added in ascending order: bounded memory, one result.
            for (int first = 0; first < hit.size(); first += threads) {
                List<Visits> wave = hit.subList(first, Math.min(hit.size(), first + threads));
                List<Future<double[]>> outputs = new ArrayList<>();
                for (Visits visits : wave) {
                    outputs.add(pool.submit(() -> expertOutput(visits, input)));
                }
                for (int i = 0; i < wave.size(); i++) {
                    addWeighted(sum, wave.get(i), await(outputs.get(i)));
                }
            }
        } finally {
            pool.shutdownNow();
        }
        return sum;
    }

    /**
     * {@return the output of the shared expert [T, H], multiplied by its sigmoid gate; zeros
     * without one}
     *
     * @param hidden hidden states [T, H], row-major
     * @param tokens T, number of tokens
     */
    public double[] shared(float[] hidden, int tokens) {
        ExpertWeights expert = weights.sharedExpert();
        double[] input = widen(hidden);
        if (expert == null) {
            return new double[input.length];
        }
        double[] output = feedForward(expert, input, tokens);
        float[] gate = weights.sharedExpertGate();
        if (gate != null) {
            int h = shape.hidden();
            for (int token = 0; token < tokens; token++) {
                double factor = sigmoid(dot(gate, 0, input, token * h, h));
                for (int i = token * h; i < (token + 1) * h; i++) {
                    output[i] *= factor;
                }
            }
        }
        return output;
    }

    /** The experts a token may not choose because their group is not among the best. */
    private boolean[] excluded(double[] logits) {
        boolean[] excluded = new boolean[shape.experts()];
        if (rule.groups() == 1) {
            return excluded;
        }
        double[] scores = selectionScores(logits);
        int size = shape.experts() / rule.groups();
        double[] groupScores = new double[rule.groups()];
        for (int group = 0; group < groupScores.length; group++) {
            double[] members = Arrays.copyOfRange(scores, group * size, (group + 1) * size);
            for (int member : best(members, new boolean[size], Math.min(2, size))) {
                groupScores[group] += members[member];
            }
        }
        Arrays.fill(excluded, true);
        for (int group : best(groupScores, new boolean[groupScores.length], rule.topkGroups())) {
            Arrays.fill(excluded, group * size, (group + 1) * size, false);
        }
        return excluded;
    }

    private double[] selectionScores(double[] logits) {
        double[] scores = scores(logits);
        float[] correction = weights.correctionBias();
        if (rule.scoring() == RoutingRule.Scoring.SIGMOID && correction != null) {
            for (int expert = 0; expert < scores.length; expert++) {
                scores[expert] += correction[expert];
            }
        }
        return scores;
    }

    private double[] scores(double[] logits) {
        return switch (rule.scoring()) {
            case SOFTMAX -> softmax(logits);
            case TOPK_SOFTMAX -> logits.clone();
            case SIGMOID -> {
                double[] scores = new double[logits.length];
                for (int expert = 0; expert < scores.length; expert++) {
                    scores[expert] = sigmoid(logits[expert]);
                }
                yield scores;
            }
        };
    }

    private double[] finalWeights(double[] logits, int[] chosen) {
        double[] scores = scores(logits);
        double[] picked = new double[chosen.length];
        for (int i = 0; i < chosen.length; i++) {
            picked[i] = scores[chosen[i]];
        }
        if (rule.scoring() == RoutingRule.Scoring.TOPK_SOFTMAX) {
            picked = softmax(picked);
        } else if (rule.renormalise()) {
            double sum =
                    rule.scoring() == RoutingRule.Scoring.SIGMOID
                            ? RoutingRule.SIGMOID_SUM_EPSILON
                            : 0;
            for (double weight : picked) {
                sum += weight;
            }
            for (int i = 0; i < picked.length; i++) {
                picked[i] /= sum;
            }
        }
        for (int i = 0; i < picked.length; i++) {
            picked[i] *= rule.scale();
        }
        return picked;
    }

    /**
     * Indices of the {@code count} largest values that are not taken, descending; ties: lowest
     * index first; NaN ranks last. Marks them as taken.
     */
    private static int[] best(double[] values, boolean[] taken, int count) {
        int[] chosen = new int[count];
        for (int i = 0; i < count; i++) {
            int winner = -1;
            for (int candidate = 0; candidate < values.length; candidate++) {
                if (!taken[candidate]
                        && (winner < 0 || ranksAbove(values[candidate], values[winner]))) {
                    winner = candidate;
                }
            }
            taken[winner] = true;
            chosen[i] = winner;
        }
        return chosen;
    }

    private static boolean ranksAbove(double candidate, double winner) {
        return candidate > winner || (Double.isNaN(winner) && !Double.isNaN(candidate));
    }

    /** The tokens that visit one expert, in ascending order, with repeats. */
    private record Visits(int expert, List<Integer> tokens, List<Float> weights) {}

    private List<Visits> visits(Routing routing) {
        List<Visits> byExpert = new ArrayList<>();
        for (int expert = 0; expert < shape.experts(); expert++) {
            byExpert.add(new Visits(expert, new ArrayList<>(), new ArrayList<>()));
        }
        for (int i = 0; i < routing.ids().length; i++) {
            int expert = routing.ids()[i];
            if (expert >= 0 && expert < shape.experts()) {
                byExpert.get(expert).tokens().add(i / routing.topK());
                byExpert.get(expert).weights().add(routing.weights()[i]);
            }
        }
        byExpert.removeIf(visits -> visits.tokens().isEmpty());
        return byExpert;
    }

    private double[] expertOutput(Visits visits, double[] input) {
        int h = shape.hidden();
        double[] rows = new double[visits.tokens().size() * h];
        for (int i = 0; i < visits.tokens().size(); i++) {
            System.arraycopy(input, visits.tokens().get(i) * h, rows, i * h, h);
        }
        return feedForward(weights.expert(visits.expert()), rows, visits.tokens().size());
    }

    private void addWeighted(double[] sum, Visits visits, double[] output) {
        int h = shape.hidden();
        for (int i = 0; i < visits.tokens().size(); i++) {
            double weight = visits.weights().get(i);
            int to = visits.tokens().get(i) * h;
            for (int column = 0; column < h; column++) {
                sum[to + column] += weight * output[i * h + column];
            }
        }
    }

    /** down · activation(gate · x + gateBias, up · x + upBias) + downBias for each row. */
    private double[] feedForward(ExpertWeights expert, double[] rows, int count) {
        float[] buffer = decode(expert.gate());
        double[] gate = product(buffer, expert.gate(), rows, count);
        addBias(gate, expert.gateBias());
        expert.up().read(buffer);
        double[] up = product(buffer, expert.up(), rows, count);
        addBias(up, expert.upBias());
        double[] activated = new double[gate.length];
        for (int i = 0; i < activated.length; i++) {
            activated[i] = activate(gate[i], up[i]);
        }
        expert.down().read(buffer);
        double[] output = product(buffer, expert.down(), activated, count);
        addBias(output, expert.downBias());
        return output;
    }

    private double activate(double gate, double up) {
        return switch (activation.kind()) {
            case SWIGLU -> gate * sigmoid(gate) * up;
            case CLAMPED_SWIGLU -> {
                double limit = activation.limit();
                double g = Math.min(gate, limit);
                double u = Math.max(-limit, Math.min(up, limit));
                yield (u + 1) * g * sigmoid(activation.alpha() * g);
            }
        };
    }

    private static float[] decode(WeightMatrix matrix) {
        float[] values = new float[Math.multiplyExact(matrix.rows(), matrix.cols())];
        matrix.read(values);
        return values;
    }

    private static double[] product(float[] values, WeightMatrix matrix, double[] rows, int count) {
        int outputs = matrix.rows();
        int inputs = matrix.cols();
        double[] result = new double[Math.multiplyExact(count, outputs)];
        for (int output = 0; output < outputs; output++) {
            for (int row = 0; row < count; row++) {
                result[row * outputs + output] =
                        dot(values, output * inputs, rows, row * inputs, inputs);
            }
        }
        return result;
    }

    private static double dot(float[] a, int aFrom, double[] b, int bFrom, int length) {
        double sum = 0;
        for (int i = 0; i < length; i++) {
            sum += a[aFrom + i] * b[bFrom + i];
        }
        return sum;
    }

    private static void addBias(double[] rows, float[] bias) {
        if (bias != null) {
            for (int i = 0; i < rows.length; i++) {
                rows[i] += bias[i % bias.length];
            }
        }
    }

    private static void addInto(double[] sum, double[] values) {
        for (int i = 0; i < sum.length; i++) {
            sum[i] += values[i];
        }
    }

    private static double[] softmax(double[] values) {
        double max = Double.NEGATIVE_INFINITY;
        for (double value : values) {
            max = Math.max(max, value);
        }
        double[] result = new double[values.length];
        double sum = 0;
        for (int i = 0; i < values.length; i++) {
            result[i] = Math.exp(values[i] - max);
            sum += result[i];
        }
        for (int i = 0; i < values.length; i++) {
            result[i] /= sum;
        }
        return result;
    }

    private static double sigmoid(double x) {
        return 1 / (1 + Math.exp(-x));
    }

    private double[] row(float[] logits, int token) {
        double[] row = new double[shape.experts()];
        for (int expert = 0; expert < row.length; expert++) {
            row[expert] = logits[token * row.length + expert];
        }
        return row;
    }

    private static double[] widen(float[] values) {
        double[] wide = new double[values.length];
        for (int i = 0; i < wide.length; i++) {
            wide[i] = values[i];
        }
        return wide;
    }

    private static int threads(int hidden, int intermediate) {
        Runtime runtime = Runtime.getRuntime();
        long fit = runtime.maxMemory() / 4 / (4L * hidden * intermediate);
        return (int) Math.max(1, Math.min(runtime.availableProcessors(), fit));
    }

    private static Thread worker(Runnable work) {
        Thread thread = new Thread(work, "moe4j-oracle");
        thread.setDaemon(true);
        return thread;
    }

    private static double[] await(Future<double[]> output) {
        try {
            return output.get();
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            throw new IllegalStateException("interrupted while computing the reference", e);
        } catch (ExecutionException e) {
            if (e.getCause() instanceof RuntimeException failure) {
                throw failure;
            }
            if (e.getCause() instanceof Error failure) {
                throw failure;
            }
            throw new IllegalStateException(e.getCause());
        }
    }
}
