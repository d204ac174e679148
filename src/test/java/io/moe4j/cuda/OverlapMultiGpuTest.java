package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.MoeGraph;
import io.moe4j.ep.Group;
import io.moe4j.overlap.TwoBatchOverlap;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/**
 * Two micro-batches on two GPUs, eager and captured: the bits of separate steps on virtual ranks.
 * Ranks come late at random, and run ahead of each other between the rounds that look at results.
 */
@EnabledIfCuda(devices = 2)
@Timeout(120)
class OverlapMultiGpuTest {
    private static final int LAYERS = 3;
    private static final int ROUNDS = Integer.getInteger("moe4j.overlapRounds", 40);
    private static final int REPLAYS = 25;

    @Test
    void shouldGiveTheBitsOfSeparateStepsEagerAndCaptured() {
        int[][][][] blocks = new int[ROUNDS][LayerChain.RANKS][2][];
        byte[][][][] want = new byte[ROUNDS][LayerChain.RANKS][2][];
        try (LayerChain virtual = new LayerChain(null, LAYERS, 2)) {
            for (int round = 0; round < ROUNDS; round++) {
                SplittableRandom random = new SplittableRandom(900 + round);
                for (int batch = 0; batch < 2; batch++) {
                    for (int r = 0; r < LayerChain.RANKS; r++) {
                        int tokens = LayerChain.tokens(round + 2 * batch + r, random);
                        blocks[round][r][batch] = LayerChain.block(tokens, LAYERS, random);
                        virtual.load(batch, r, blocks[round][r][batch]);
                    }
                    virtual.enqueueInTurn(batch);
                    for (int r = 0; r < LayerChain.RANKS; r++) {
                        want[round][r][batch] = virtual.output(batch, r);
                    }
                }
            }
        }
        LayerChain[] chains = new LayerChain[LayerChain.RANKS];
        try {
            Group.together(
                    Group.inProcess(LayerChain.RANKS),
                    group -> {
                        chains[group.rank()] = new LayerChain(group, LAYERS, 2);
                        rounds(chains[group.rank()], group, blocks, want);
                    });
        } finally {
            for (LayerChain chain : chains) {
                if (chain != null) {
                    chain.close();
                }
            }
        }
    }

    private static void rounds(
            LayerChain chain, Group group, int[][][][] blocks, byte[][][][] want) {
        int rank = group.rank();
        SplittableRandom random = new SplittableRandom(31 + rank);
        try (TwoBatchOverlap overlap = TwoBatchOverlap.of(chain.steps.get(0), chain.steps.get(1));
                MoeGraph graph = overlap.capture(chain.stream.handle())) {
            for (int round = 0; round < ROUNDS; round++) {
                chain.forget();
                for (int batch = 0; batch < 2; batch++) {
                    chain.load(batch, 0, blocks[round][rank][batch]);
                }
                for (int i = 0; i < REPLAYS; i++) {
                    if (random.nextInt(10) == 0) {
                        java.util.concurrent.locks.LockSupport.parkNanos(random.nextInt(300_000));
                    }
                    if (i % 5 == 0) {
                        overlap.enqueue(chain.stream.handle());
                    } else {
                        graph.launch(chain.stream.handle());
                    }
                }
                for (int batch = 0; batch < 2; batch++) {
                    int tokens = blocks[round][rank][batch][0];
                    assertThat(OverlapGpuTest.rows(chain.output(batch, 0), tokens))
                            .as("round %d batch %d rank %d", round, batch, rank)
                            .isEqualTo(OverlapGpuTest.rows(want[round][rank][batch], tokens));
                }
            }
        }
    }
}
