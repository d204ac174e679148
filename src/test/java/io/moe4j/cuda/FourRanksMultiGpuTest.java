package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.catchThrowableOfType;

import io.moe4j.Harness.Batch;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.RankLostException;
import io.moe4j.Recovery;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.ep.Group;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Objects;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * Four ranks, two on each of two GPUs: the same bits as virtual ranks, and faults whose cause
 * others name than those that waited for it.
 */
@EnabledIfCuda(devices = 2)
@Timeout(120)
class FourRanksMultiGpuTest {
    private static final int RANKS = 4;
    private static final int TOKENS = 11;
    private static final Duration BUDGET = Duration.ofMillis(200);
    private static final long SLACK_MS = 500;

    @TempDir Path folder;

    private GpuRank[] ranks = {};
    private final Batch[] batches = new Batch[RANKS];
    private float[][][] expected;

    private void open(String wire) {
        for (int r = 0; r < RANKS; r++) {
            batches[r] = GpuRank.batch(r, TOKENS, 7);
        }
        expected = GpuRank.expected(batches);
        MoeConfig config =
                GpuRank.config(RANKS).toBuilder()
                        .stepTimeout(BUDGET)
                        .firstStepTimeout(BUDGET.multipliedBy(4))
                        .build();
        System.setProperty("moe4j.cuda.wire", wire);
        try {
            ranks = GpuRank.openAll(config, 2);
        } finally {
            System.clearProperty("moe4j.cuda.wire");
        }
        for (int r = 0; r < RANKS; r++) {
            ranks[r].load(batches[r]);
            assertThat(ranks[r].layer().backendReason())
                    .contains("2 ranks of the group share the GPU")
                    .contains(wire.equals("lines") ? "rows travel in lines" : "rows travel as");
        }
        stepAndCompare();
    }

    @AfterEach
    void close() {
        for (GpuRank rank : ranks) {
            rank.close();
        }
    }

    private void stepAndCompare() {
        for (GpuRank rank : ranks) {
            rank.enqueue();
        }
        compare(List.of(ranks), expected);
    }

    private static void compare(List<GpuRank> ranks, float[][][] expected) {
        for (GpuRank rank : ranks) {
            rank.await();
        }
        for (GpuRank rank : ranks) {
            rank.harness.layer.check();
            assertThat(rank.output(TOKENS))
                    .isDeepEqualTo(Arrays.copyOf(expected[number(rank)], TOKENS));
        }
    }

    private static int number(GpuRank rank) {
        return rank.layer().config().firstLocalRank();
    }

    private List<GpuRank> allBut(int rank) {
        List<GpuRank> others = new ArrayList<>(List.of(ranks));
        others.remove(rank);
        return others;
    }

    private void recoverAll() {
        Group.together(List.of(ranks), rank -> rank.harness.layer.recover());
        stepAndCompare();
        stepAndCompare();
    }

    private static RankLostException lost(GpuRank rank) {
        return catchThrowableOfType(RankLostException.class, rank.harness.layer::check);
    }

    @ParameterizedTest
    @ValueSource(strings = {"rows", "lines"})
    void shouldReplayGraphsWithTheBitsOfVirtualRanks(String wire) {
        open(wire);
        List<MoeGraph> graphs = new ArrayList<>();
        for (GpuRank rank : ranks) {
            graphs.add(rank.capture());
        }
        for (int i = 0; i < 300; i++) {
            for (int r = 0; r < RANKS; r++) {
                // why turned: each rank is the last to come now and then
                int turn = (r + i) % RANKS;
                ranks[turn].launch(graphs.get(turn));
            }
        }
        compare(List.of(ranks), expected);
        graphs.forEach(MoeGraph::close);
    }

    @ParameterizedTest
    @ValueSource(strings = {"rows", "lines"})
    void shouldNameTheRankThatStalledOnAllOthersAndRunOnWithoutIt(String wire) {
        open(wire);
        for (int victim = 0; victim < RANKS; victim++) {
            List<GpuRank> others = allBut(victim);
            long start = System.nanoTime();
            others.forEach(GpuRank::enqueue);
            others.forEach(GpuRank::await);
            assertThat(TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start))
                    .as("rank %d stalls", victim)
                    .isBetween(BUDGET.toMillis(), BUDGET.toMillis() + SLACK_MS);
            List<String> told = new ArrayList<>();
            for (GpuRank rank : others) {
                RankLostException fault = lost(rank);
                assertThat(fault.rank()).isEqualTo(number(rank));
                assertThat(fault.peer()).as(fault.getMessage()).isEqualTo(victim);
                told.add(fault.getMessage());
            }
            assertThat(told).anyMatch(message -> message.contains("timed out"));
            // it was not dead: it comes late, and names one that has given it up
            ranks[victim].enqueue();
            ranks[victim].await();
            assertThat(lost(ranks[victim]).peer()).isNotEqualTo(victim);

            int left = victim;
            Group.together(
                    others,
                    rank -> {
                        Recovery agreed = rank.harness.layer.recover(Set.of(left));
                        assertThat(agreed.members()).hasSize(3).doesNotContain(left);
                    });
            Batch[] rest = new Batch[RANKS];
            for (int r = 0; r < RANKS; r++) {
                rest[r] =
                        r == victim
                                ? Batch.empty()
                                : GpuRank.without(Set.of(victim), batches[r], RANKS);
            }
            float[][][] without = GpuRank.expected(rest);
            for (int i = 0; i < 3; i++) {
                others.forEach(GpuRank::enqueue);
            }
            compare(others, without);
            recoverAll();
        }
    }

    /**
     * What rank 3 sent to rank 0 is lost. Ranks 1 and 2 have all they need from rank 3 and wait for
     * the results of rank 0: they hear that rank 3 is the cause.
     */
    @ParameterizedTest
    @ValueSource(strings = {"rows", "lines"})
    void shouldNameTheCauseWhereRanksWaitForSomebodyElse(String wire) throws Exception {
        open(wire);
        for (GpuRank rank : ranks) {
            enqueue(rank, Phase.ROUTE, Phase.DISPATCH_SEND);
        }
        for (GpuRank rank : ranks) {
            rank.await();
        }
        loseWhatRankThreeSent(ranks[0], wire);
        enqueue(ranks[0], Phase.DISPATCH_RECV, Phase.COMBINE_RECV);
        Thread.sleep(50);
        for (int r = 1; r < RANKS; r++) {
            enqueue(ranks[r], Phase.DISPATCH_RECV, Phase.COMBINE_RECV);
        }
        for (GpuRank rank : ranks) {
            rank.await();
        }
        RankLostException first = lost(ranks[0]);
        assertThat(first.peer()).isEqualTo(3);
        assertThat(first.operation()).isEqualTo("dispatch_recv");
        assertThat(first).hasMessageContaining("timed out");
        for (int r = 1; r < RANKS; r++) {
            RankLostException heard = lost(ranks[r]);
            assertThat(heard.operation()).as("it waited for rank 0").isEqualTo("combine_recv");
            assertThat(heard).hasMessageContaining("was aborted by its peer");
            assertThat(heard.peer()).as("rank %d: %s", r, heard).isEqualTo(r == 3 ? 0 : 3);
            assertThat(heard.waited()).isLessThan(BUDGET);
        }
        recoverAll();
    }

    private static void enqueue(GpuRank rank, Phase first, Phase last) {
        rank.harness.layer.enqueue(rank.stream().handle(), rank.harness.step(), first, last);
    }

    private void loseWhatRankThreeSent(GpuRank at, String wire) {
        CudaHandle handle = at.layer().handle(0);
        try (Scope scope = at.context().enter()) {
            if (wire.equals("lines")) {
                long next = handle.symmetric(0, "combine_lines");
                long lines = handle.symmetric(0, "dispatch_lines");
                // why not exact: what lies behind is the padding of the field
                long each = (next - lines) / RANKS / 128 * 128;
                at.context().driver().memsetD8(lines + 3 * each, (byte) 0, each);
            } else {
                ByteBuffer word = ByteBuffer.allocateDirect(8).order(ByteOrder.LITTLE_ENDIAN);
                long flag = handle.symmetric(0, "dispatch_flags") + 3 * 8L;
                at.context().driver().memcpyHtoD(flag, word.putLong(0, 1));
            }
            at.context().driver().streamSynchronize(0L);
        }
    }

    /** A process for each GPU with two ranks: own, beside it, and of another process. */
    @Test
    void shouldNameARankOfAProcessThatWasKilledAndRunOnWithoutItsTwo() throws Exception {
        for (int round = 0; round < 3; round++) {
            Path meeting = folder.resolve("r" + round);
            Process child = GpuRankMain.start(meeting, TOKENS, 7, RANKS);
            try {
                GpuRank[] here = new GpuRank[2];
                Group.together(
                        List.of(0, 1),
                        i -> {
                            Group group = Group.join(meeting, 2 * i, RANKS, Duration.ofSeconds(30));
                            MoeConfig config = GpuRank.config(RANKS);
                            here[i] = GpuRank.open(config.toBuilder().device(0).build(), group);
                            here[i].load(GpuRank.batch(2 * i, TOKENS, 7));
                            group.exchange("loaded", new byte[0]);
                        });
                ranks = here;
                killAndRunOn(child, 5 + 31 * round);
            } finally {
                child.destroyForcibly();
            }
            close();
            ranks = new GpuRank[0];
        }
    }

    private void killAndRunOn(Process child, int delay) throws Exception {
        long begin = System.nanoTime();
        long killed = 0;
        List<RankLostException> faults = List.of();
        while (faults.isEmpty() && System.nanoTime() - begin < 20_000_000_000L) {
            for (int i = 0; i < 10; i++) {
                List.of(ranks).forEach(GpuRank::enqueue);
            }
            if (killed == 0 && System.nanoTime() - begin > delay * 1_000_000L) {
                killed = System.nanoTime();
                child.destroyForcibly();
            }
            List.of(ranks).forEach(GpuRank::await);
            faults =
                    Arrays.stream(ranks)
                            .map(FourRanksMultiGpuTest::lost)
                            .filter(Objects::nonNull)
                            .toList();
        }
        long heard = TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - killed);
        System.out.println("KILLS a process of two ranks: heard of after " + heard + " ms");
        assertThat(heard).isLessThan(GpuRank.BUDGET.toMillis() + SLACK_MS);
        assertThat(faults).hasSize(2);
        assertThat(faults).allSatisfy(fault -> assertThat(fault.peer()).isIn(1, 3));
        Group.together(List.of(ranks), rank -> rank.harness.layer.recover(Set.of(1, 3)));
        Batch[] rest = new Batch[RANKS];
        for (int r = 0; r < RANKS; r++) {
            Batch all = GpuRank.batch(r, TOKENS, 7);
            rest[r] = r % 2 == 1 ? Batch.empty() : GpuRank.without(Set.of(1, 3), all, RANKS);
        }
        List.of(ranks).forEach(GpuRank::enqueue);
        compare(List.of(ranks), GpuRank.expected(rest));
    }

    @Test
    void shouldNotRaiseAFalseAlarmWhenARankStallsForHalfTheBudget() throws Exception {
        open("lines");
        for (int late = 0; late < RANKS; late++) {
            allBut(late).forEach(GpuRank::enqueue);
            Thread.sleep(BUDGET.toMillis() / 2);
            ranks[late].enqueue();
            compare(List.of(ranks), expected);
        }
    }
}
