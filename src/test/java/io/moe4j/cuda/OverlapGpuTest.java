package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.MoeGraph;
import io.moe4j.overlap.TwoBatchOverlap;
import java.util.Arrays;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;

/** Two micro-batches on virtual ranks of one GPU: the bits of separate steps. */
@EnabledIfCuda
class OverlapGpuTest {
    private static final int LAYERS = 3;
    private static final int ROUNDS = Integer.getInteger("moe4j.overlaps", 300);

    @Test
    void shouldGiveTheBitsOfSeparateStepsEagerAndCaptured() {
        try (LayerChain chain = new LayerChain(null, LAYERS, 2);
                TwoBatchOverlap overlap =
                        TwoBatchOverlap.of(chain.steps.get(0), chain.steps.get(1));
                MoeGraph graph = overlap.capture(chain.stream.handle())) {
            for (int round = 0; round < ROUNDS; round++) {
                SplittableRandom random = new SplittableRandom(round);
                int[][] tokens = new int[2][LayerChain.RANKS];
                byte[][][] want = new byte[2][LayerChain.RANKS][];
                for (int batch = 0; batch < 2; batch++) {
                    for (int r = 0; r < LayerChain.RANKS; r++) {
                        tokens[batch][r] = LayerChain.tokens(round + 2 * batch + r, random);
                        chain.load(batch, r, LayerChain.block(tokens[batch][r], LAYERS, random));
                    }
                    chain.enqueueInTurn(batch);
                    for (int r = 0; r < LayerChain.RANKS; r++) {
                        want[batch][r] = rows(chain.output(batch, r), tokens[batch][r]);
                    }
                }
                for (int again = 0; again < 3; again++) {
                    chain.forget();
                    if ((round + again) % 2 == 0) {
                        graph.launch(chain.stream.handle());
                    } else {
                        overlap.enqueue(chain.stream.handle());
                    }
                    for (int batch = 0; batch < 2; batch++) {
                        for (int r = 0; r < LayerChain.RANKS; r++) {
                            assertThat(rows(chain.output(batch, r), tokens[batch][r]))
                                    .as("round %d batch %d rank %d", round, batch, r)
                                    .isEqualTo(want[batch][r]);
                        }
                    }
                }
            }
        }
    }

    static byte[] rows(byte[] out, int tokens) {
        return Arrays.copyOf(out, tokens * LayerChain.SHAPE.hidden() * 2);
    }
}
