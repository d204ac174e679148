package io.moe4j.bench;

import io.moe4j.MoeConfig;
import io.moe4j.model.MoeShape;
import java.util.Arrays;
import java.util.Map;

/**
 * The experts phase of one rank: sizes and exact rows of every local expert.
 *
 * @param number in its file, 0 if it has none
 * @param model name of the model, or {@code custom}
 * @param hidden H
 * @param intermediate I
 * @param experts E over all ranks
 * @param topK K
 * @param ep ranks of the expert-parallel group
 * @param tokens T of each rank
 * @param routing how the counts came about
 * @param counts rows of each local expert; not copied
 * @param peersUs what others measured on the same case, by stage and name; may be empty
 */
public record BenchCase(
        int number,
        String model,
        int hidden,
        int intermediate,
        int experts,
        int topK,
        int ep,
        int tokens,
        String routing,
        int[] counts,
        Map<String, Map<String, Double>> peersUs) {
    /**
     * Checks what a step could not do.
     *
     * @param number {@link #number()}
     * @param model {@link #model()}
     * @param hidden {@link #hidden()}
     * @param intermediate {@link #intermediate()}
     * @param experts {@link #experts()}
     * @param topK {@link #topK()}
     * @param ep {@link #ep()}
     * @param tokens {@link #tokens()}
     * @param routing {@link #routing()}
     * @param counts {@link #counts()}
     * @param peersUs {@link #peersUs()}
     * @throws IllegalArgumentException if a value is refused; the message names field and value
     */
    public BenchCase {
        if (hidden < 1 || intermediate < 1 || experts < 1 || topK < 1 || ep < 1 || tokens < 1) {
            throw new IllegalArgumentException(
                    "case " + number + ": sizes, experts, topK, ep and tokens must be positive");
        }
        long most = (long) ep * tokens;
        for (int count : counts) {
            if (count < 0 || count > most) {
                throw new IllegalArgumentException(
                        "case "
                                + number
                                + ": an expert has "
                                + count
                                + " rows, but there are "
                                + most
                                + " tokens");
            }
        }
        if (Arrays.stream(counts).asLongStream().sum() > most * Math.min(topK, counts.length)) {
            throw new IllegalArgumentException(
                    "case " + number + ": more rows than " + most + " tokens times topK=" + topK);
        }
    }

    /** A case of this layer, with nothing known of others. */
    static BenchCase of(int number, String model, MoeConfig config, String routing, int[] counts) {
        MoeShape shape = config.shape();
        return new BenchCase(
                number,
                model,
                shape.hidden(),
                shape.intermediate(),
                shape.experts(),
                shape.topK(),
                config.ranks(),
                config.maxTokensPerRank(),
                routing,
                counts,
                Map.of());
    }

    /** {@return the rows over all local experts} */
    public int rows() {
        return Arrays.stream(counts).sum();
    }

    /** {@return the local experts that have rows} */
    public int hitExperts() {
        return (int) Arrays.stream(counts).filter(count -> count > 0).count();
    }

    /** {@return the tokens over all ranks: the most an expert can get} */
    public int allTokens() {
        return Math.multiplyExact(ep, tokens);
    }

    /**
     * {@return the rows an expert of the whole group expects when routing is even, rounded up: what
     * a rank of that group would choose its kernels by}
     */
    public int expectedRows() {
        return Math.toIntExact(((long) ep * tokens * topK + experts - 1) / experts);
    }

    /**
     * {@return the ids [tokens, width] that give exactly these counts: experts are dealt to the
     * tokens in turn, so no token gets one twice; −1 where a token has fewer}
     *
     * @param width {@code min(topK, local experts)}
     */
    public int[] deal(int width) {
        int tokenCount = allTokens();
        int[] ids = new int[Math.multiplyExact(tokenCount, width)];
        Arrays.fill(ids, -1);
        int at = 0;
        for (int expert = 0; expert < counts.length; expert++) {
            for (int row = 0; row < counts[expert]; row++, at++) {
                ids[at % tokenCount * width + at / tokenCount] = expert;
            }
        }
        return ids;
    }
}
