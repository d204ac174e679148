package io.moe4j.bench;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;

/**
 * Which experts tokens choose: {@code uniform}, {@code zipf:S} (probability falls with rank^−S, the
 * ranking shuffled by the seed), {@code hot1} (every token visits one and the same expert, the rest
 * uniform), or {@code file:PATH} with one line of K ids per token, used again from the top if there
 * are more tokens. A pure function of pattern and seed. Immutable.
 */
public final class RoutingPattern {
    private enum Kind {
        UNIFORM,
        ZIPF,
        HOT1,
        FILE
    }

    private final Kind kind;
    private final String text;
    private final double exponent;
    private final List<int[]> lines;

    private RoutingPattern(Kind kind, String text, double exponent, List<int[]> lines) {
        this.kind = kind;
        this.text = text;
        this.exponent = exponent;
        this.lines = lines;
    }

    /**
     * {@return the pattern a text names; a file is read at once}
     *
     * @param text as given on the command line
     * @throws IllegalArgumentException naming what is possible
     * @throws IOException if the file cannot be read
     */
    public static RoutingPattern parse(String text) throws IOException {
        if (text.equals("uniform")) {
            return new RoutingPattern(Kind.UNIFORM, text, 0, List.of());
        }
        if (text.equals("hot1")) {
            return new RoutingPattern(Kind.HOT1, text, 0, List.of());
        }
        if (text.matches("zipf:\\d+(\\.\\d+)?")) {
            double exponent = Double.parseDouble(text.substring("zipf:".length()));
            return new RoutingPattern(Kind.ZIPF, text, exponent, List.of());
        }
        if (text.startsWith("file:") && text.length() > "file:".length()) {
            Path file = Path.of(text.substring("file:".length()));
            return new RoutingPattern(Kind.FILE, text, 0, readIds(file));
        }
        throw new IllegalArgumentException(
                "routing "
                        + text
                        + " is unknown: use uniform, zipf:S (for example zipf:1.2), hot1 or"
                        + " file:PATH");
    }

    private static List<int[]> readIds(Path file) throws IOException {
        List<int[]> ids = new ArrayList<>();
        int number = 0;
        for (String line : Files.readAllLines(file)) {
            number++;
            String words = line.replaceAll("[\\[\\],;]", " ").trim();
            if (words.isEmpty() || words.startsWith("#")) {
                continue;
            }
            try {
                ids.add(Arrays.stream(words.split("\\s+")).mapToInt(Integer::parseInt).toArray());
            } catch (NumberFormatException e) {
                throw new IllegalArgumentException(
                        file + " line " + number + " is not a list of expert ids", e);
            }
        }
        if (ids.isEmpty()) {
            throw new IllegalArgumentException(
                    file + " has no ids: give one line of expert ids per token");
        }
        return ids;
    }

    /**
     * {@return distinct ids of each token, [tokens, topK]}
     *
     * @param tokens T, number of tokens
     * @param experts E, number of experts
     * @param topK K, experts of a token
     * @param seed seed of what is random
     */
    public int[] ids(int tokens, int experts, int topK, long seed) {
        int[] ids = new int[Math.multiplyExact(tokens, topK)];
        Random random = new Random(seed * 0x9e3779b97f4a7c15L + 77);
        double[] odds = odds(experts, random);
        for (int token = 0; token < tokens; token++) {
            int[] chosen =
                    kind == Kind.FILE ? fromFile(token, experts, topK) : draw(odds, topK, random);
            System.arraycopy(chosen, 0, ids, token * topK, topK);
        }
        return ids;
    }

    /**
     * {@return how often each expert from {@code first} to before {@code end} occurs}
     *
     * @param ids expert ids
     * @param first first expert
     * @param end expert after the last
     */
    public static int[] counts(int[] ids, int first, int end) {
        int[] counts = new int[end - first];
        for (int id : ids) {
            if (id >= first && id < end) {
                counts[id - first]++;
            }
        }
        return counts;
    }

    private double[] odds(int experts, Random random) {
        List<Double> odds = new ArrayList<>();
        for (int rank = 1; rank <= experts; rank++) {
            odds.add(kind == Kind.ZIPF ? Math.pow(rank, -exponent) : 1.0);
        }
        java.util.Collections.shuffle(odds, random);
        double[] values = odds.stream().mapToDouble(d -> d).toArray();
        if (kind == Kind.HOT1) {
            values[random.nextInt(experts)] = Double.POSITIVE_INFINITY;
        }
        return values;
    }

    /** Draws without replacement: the largest of ln(u) / odds (Efraimidis and Spirakis). */
    private static int[] draw(double[] odds, int topK, Random random) {
        double[] keys = new double[odds.length];
        for (int expert = 0; expert < keys.length; expert++) {
            keys[expert] = Math.log(1 - random.nextDouble()) / odds[expert];
        }
        int[] chosen = new int[topK];
        for (int k = 0; k < topK; k++) {
            int best = -1;
            for (int expert = 0; expert < keys.length; expert++) {
                if (!Double.isNaN(keys[expert]) && (best < 0 || keys[expert] > keys[best])) {
                    best = expert;
                }
            }
            chosen[k] = best;
            keys[best] = Double.NaN;
        }
        return chosen;
    }

    private int[] fromFile(int token, int experts, int topK) {
        int[] line = lines.get(token % lines.size());
        boolean fits =
                line.length == topK
                        && Arrays.stream(line).distinct().count() == topK
                        && Arrays.stream(line).allMatch(id -> id >= 0 && id < experts);
        if (!fits) {
            throw new IllegalArgumentException(
                    text
                            + ": "
                            + Arrays.toString(line)
                            + " is not "
                            + topK
                            + " different ids below "
                            + experts);
        }
        return line;
    }

    /** {@return whether it is {@code uniform}} */
    public boolean isUniform() {
        return kind == Kind.UNIFORM;
    }

    /** The text it was parsed from. */
    @Override
    public String toString() {
        return text;
    }
}
