package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.assertj.core.api.Assertions.catchThrowableOfType;

import io.moe4j.Harness;
import io.moe4j.Harness.Batch;
import io.moe4j.MoeGraph;
import io.moe4j.Phase;
import io.moe4j.RankLostException;
import io.moe4j.Recovery;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.ep.Group;
import io.moe4j.ep.PeerStatistics;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.List;
import java.util.Random;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

/**
 * What goes wrong between ranks on two GPUs: every survivor names the lost rank within its budget,
 * and computes on, alone and after recovery.
 */
@EnabledIfCuda(devices = 2)
@Timeout(120)
class FaultMultiGpuTest {
    private static final long SLACK_MS = 500;
    private static final int TOKENS = 17;

    private GpuRank[] ranks;
    private final Batch[] batches = new Batch[2];
    private float[][][] expected;

    @BeforeEach
    void openAndRunAStep() {
        for (int r = 0; r < 2; r++) {
            batches[r] = GpuRank.batch(r, TOKENS, 3);
        }
        expected = GpuRank.expected(batches);
        ranks = GpuRank.openAll(GpuRank.config());
        for (int r = 0; r < 2; r++) {
            ranks[r].load(batches[r]);
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
        for (int r = 0; r < 2; r++) {
            ranks[r].await();
            ranks[r].harness.layer.check();
            assertThat(ranks[r].output(TOKENS)).isDeepEqualTo(Arrays.copyOf(expected[r], TOKENS));
        }
    }

    private void recoverAndCompare(int generation) {
        Group.together(
                List.of(ranks),
                rank -> {
                    Recovery agreed = rank.harness.layer.recover();
                    assertThat(agreed.generation()).isEqualTo(generation);
                    assertThat(agreed.members()).containsExactlyInAnyOrder(0, 1);
                    rank.harness.layer.check();
                });
        stepAndCompare();
        stepAndCompare();
        for (GpuRank rank : ranks) {
            rank.harness.layer.result(0, Recovery.epochOf(generation) + 2);
        }
    }

    private static RankLostException lost(GpuRank rank) {
        return catchThrowableOfType(RankLostException.class, rank.harness.layer::check);
    }

    private static long millis(Runnable work) {
        long start = System.nanoTime();
        work.run();
        return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start);
    }

    @Test
    void shouldNameTheRankThatSkippedAStepAndRecoverWithGraphsCapturedBefore() {
        try (MoeGraph zero = ranks[0].capture();
                MoeGraph one = ranks[1].capture()) {
            long took =
                    millis(
                            () -> {
                                ranks[0].launch(zero);
                                ranks[0].launch(zero);
                                ranks[0].await();
                            });
            assertThat(took).isBetween(GpuRank.BUDGET.toMillis(), 500 + SLACK_MS);
            RankLostException first = lost(ranks[0]);
            assertThat(first.operation()).isEqualTo("dispatch_recv");
            assertThat(first.rank()).isZero();
            assertThat(first.peer()).isEqualTo(1);
            assertThat(first.epochExpected()).isEqualTo(2);
            assertThat(first.epochSeen()).isEqualTo(1);
            assertThat(first.waited()).isBetween(GpuRank.BUDGET, GpuRank.BUDGET.plusMillis(500));
            assertThatThrownBy(() -> ranks[0].harness.layer.result(0, 2))
                    .isInstanceOf(RankLostException.class);

            // the other comes late and hears of it at once
            long late =
                    millis(
                            () -> {
                                ranks[1].launch(one);
                                ranks[1].await();
                            });
            assertThat(late).isLessThan(200);
            RankLostException second = lost(ranks[1]);
            assertThat(second.peer()).isZero();
            assertThat(second.operation()).isEqualTo("combine_recv");
            assertThat(second).hasMessageContaining("was aborted by its peer");

            recoverAndCompare(1);
            for (int i = 0; i < 20; i++) {
                ranks[0].launch(zero);
                ranks[1].launch(one);
            }
            for (int r = 0; r < 2; r++) {
                ranks[r].await();
                ranks[r].harness.layer.result(0, Recovery.epochOf(1) + 22);
                assertThat(ranks[r].output(TOKENS))
                        .isDeepEqualTo(Arrays.copyOf(expected[r], TOKENS));
            }
        }
    }

    @Test
    void shouldNotRaiseAFalseAlarmWhenARankStallsForHalfTheBudget() throws Exception {
        for (int late = 0; late < 2; late++) {
            ranks[1 - late].enqueue();
            Thread.sleep(GpuRank.BUDGET.toMillis() / 2);
            ranks[late].enqueue();
            for (int r = 0; r < 2; r++) {
                ranks[r].await();
                ranks[r].harness.layer.check();
                assertThat(ranks[r].output(TOKENS))
                        .isDeepEqualTo(Arrays.copyOf(expected[r], TOKENS));
            }
            int waiting = 1 - late;
            PeerStatistics waited = ranks[waiting].harness.layer.peers().get(late);
            assertThat(waited.rank()).isEqualTo(waiting);
            assertThat(waited.peer()).isEqualTo(late);
            assertThat(Duration.ofNanos(waited.waitedNanos()))
                    .isBetween(GpuRank.BUDGET.dividedBy(3), GpuRank.BUDGET);
            assertThat(waited.rowsReceived()).isEqualTo(visits(batches[late], waiting));
            assertThat(waited.expertRowsTotal())
                    .as("in the %d steps so far", late + 2)
                    .isEqualTo(expertRows(batches[late], waiting, late + 2));
            assertThat(ranks[waiting].harness.layer.peers().get(waiting).waitedNanos())
                    .as("nobody waits long for itself")
                    .isLessThan(10_000_000);
        }
    }

    @Test
    void shouldWaitLongerInTheFirstStepOfAGeneration() throws Exception {
        ranks[0].enqueue();
        ranks[0].await();
        assertThat(lost(ranks[0]).peer()).isEqualTo(1);
        Group.together(List.of(ranks), rank -> rank.harness.layer.recover());
        ranks[0].enqueue();
        Thread.sleep(GpuRank.BUDGET.toMillis() * 2);
        ranks[1].enqueue();
        for (int r = 0; r < 2; r++) {
            ranks[r].await();
            ranks[r].harness.layer.check();
            assertThat(ranks[r].output(TOKENS)).isDeepEqualTo(Arrays.copyOf(expected[r], TOKENS));
        }
        PeerStatistics waited = ranks[0].harness.layer.peers().get(1);
        assertThat(Duration.ofNanos(waited.waitedNanos())).isGreaterThan(GpuRank.BUDGET);
    }

    /** Tokens that choose an expert of a rank. */
    private static long visits(Batch batch, int rank) {
        int local = GpuRank.config().expertsPerRank();
        return Arrays.stream(batch.ids())
                .filter(ids -> Arrays.stream(ids).anyMatch(id -> id / local == rank))
                .count();
    }

    /** Tokens that choose each expert of a rank, so many times. */
    private static List<Long> expertRows(Batch batch, int rank, long times) {
        int local = GpuRank.config().expertsPerRank();
        return IntStream.range(rank * local, (rank + 1) * local)
                .mapToObj(
                        expert ->
                                times
                                        * Arrays.stream(batch.ids())
                                                .filter(
                                                        ids ->
                                                                Arrays.stream(ids)
                                                                        .anyMatch(
                                                                                id -> id == expert))
                                                .count())
                .toList();
    }

    /** Opens the ranks anew with rows that travel in another form. */
    private void reopen(String wire) {
        close();
        System.setProperty("moe4j.cuda.wire", wire);
        try {
            ranks = GpuRank.openAll(GpuRank.config());
        } finally {
            System.clearProperty("moe4j.cuda.wire");
        }
        for (int r = 0; r < 2; r++) {
            ranks[r].load(batches[r]);
        }
        stepAndCompare();
    }

    @Test
    void shouldGiveTheSameBitsInBothFormsOfTheWireAndRecoverInBoth() {
        for (String wire : List.of("rows", "lines")) {
            reopen(wire);
            ranks[0].enqueue();
            ranks[0].await();
            assertThat(lost(ranks[0]).peer()).as(wire).isEqualTo(1);
            recoverAndCompare(1);
        }
    }

    @Test
    void shouldNotTakeGarbageInALineForARow() {
        reopen("lines");
        for (int r = 0; r < 2; r++) {
            CudaHandle handle = ranks[r].layer().handle(0);
            try (Scope scope = ranks[r].context().enter()) {
                for (String lines : List.of("dispatch_lines", "combine_lines")) {
                    ranks[r].context()
                            .driver()
                            .memsetD8(handle.symmetric(r, lines), (byte) 0x5a, 4096);
                }
                ranks[r].context().driver().streamSynchronize(0L);
            }
        }
        stepAndCompare();
        stepAndCompare();
    }

    @Test
    void shouldNoticeAFlagThatIsAheadAndTellThePeer() {
        reopen("rows"); // why: lines carry the epoch themselves
        corrupt(ranks[1], "dispatch_flags", 0, 40);
        long took =
                millis(
                        () -> {
                            // why one after the other: rank 0 would write the right flag over it
                            for (int r = 1; r >= 0; r--) {
                                ranks[r].enqueue();
                                ranks[r].await();
                            }
                        });
        assertThat(took).as("no bound has to pass").isLessThan(GpuRank.BUDGET.toMillis());
        RankLostException seen = lost(ranks[1]);
        assertThat(seen.peer()).isZero();
        assertThat(seen.epochExpected()).isEqualTo(2);
        assertThat(seen.epochSeen()).isEqualTo(40);
        assertThat(seen).hasMessageContaining("saw an epoch that does not fit");
        assertThat(lost(ranks[0]).peer()).isEqualTo(1);
        recoverAndCompare(1);
    }

    /** Overwrites a word of a flag array. */
    private void corrupt(GpuRank rank, String flags, int source, long value) {
        ByteBuffer word = ByteBuffer.allocateDirect(8).order(ByteOrder.LITTLE_ENDIAN);
        word.putLong(0, value);
        int me = rank.layer().config().firstLocalRank();
        try (Scope scope = rank.context().enter()) {
            rank.context()
                    .driver()
                    .memcpyHtoD(rank.layer().handle(0).symmetric(me, flags) + 8L * source, word);
            rank.context().driver().streamSynchronize(0L);
        }
    }

    @Test
    void shouldRunOnWithoutALostRankAndTakeItBack() {
        ranks[0].enqueue();
        ranks[0].await();
        assertThat(lost(ranks[0]).peer()).isEqualTo(1);

        Recovery alone = ranks[0].harness.layer.recover(Set.of(1));
        assertThat(alone.members()).containsExactly(0);
        float[][][] half = GpuRank.expected(GpuRank.without(Set.of(1), batches[0]), Batch.empty());
        long before = ranks[0].harness.layer.counters().lostRows();
        for (int i = 0; i < 3; i++) {
            ranks[0].enqueue();
        }
        ranks[0].await();
        ranks[0].harness.layer.result(0, alone.epoch() + 3);
        assertThat(ranks[0].output(TOKENS)).isDeepEqualTo(Arrays.copyOf(half[0], TOKENS));
        assertThat(ranks[0].harness.layer.counters().lostRows() - before)
                .isEqualTo(3 * visits(batches[0], 1));

        recoverAndCompare(2);
        assertThatThrownBy(() -> ranks[0].harness.layer.recover(Set.of(0)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("holds a rank of this layer");
        assertThatThrownBy(() -> ranks[0].harness.layer.recover(Set.of(2)))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("outside 0..1");
    }

    @Test
    void shouldEndThePeersWaitWhenAHealthyRankRecovers() throws Exception {
        ranks[0].enqueue(); // waits for rank 1
        Thread.sleep(50);
        long took = millis(() -> recoverAndCompare(1));
        assertThat(took).as("nobody waits for the bound").isLessThan(GpuRank.BUDGET.toMillis());
    }

    @Test
    void shouldComputeOnInTheSameContextAfterAFault() {
        ranks[1].enqueue();
        ranks[1].await();
        assertThat(lost(ranks[1]).peer()).isZero();
        try (Harness other = new Harness(GpuRank.config().toBuilder().device(1).build())) {
            float[][][] again = other.run(List.of(batches));
            for (int r = 0; r < 2; r++) {
                assertThat(Arrays.copyOf(again[r], TOKENS))
                        .isDeepEqualTo(Arrays.copyOf(expected[r], TOKENS));
            }
        }
    }

    @Test
    void shouldRefuseGraphsAndPhasesOfASplitStepWhileItRuns() {
        ranks[0].harness.layer.enqueue(
                ranks[0].stream().handle(), ranks[0].harness.step(), Phase.ROUTE, Phase.ROUTE);
        recoverAndCompare(1); // a step that was begun is over
    }

    @TempDir Path folder;

    /**
     * A round of the kill test.
     *
     * @param killedAfter when, in ms
     * @param heardAfter the survivor heard of it, in ms
     * @param named whether it named the rank that was killed
     * @param alone whether another layer in its context computed right afterwards
     * @param recovered whether the layer did without the rank
     * @param took the round, in ms
     * @param fault the operation that failed
     */
    private record Kill(
            int killedAfter,
            long heardAfter,
            boolean named,
            boolean alone,
            boolean recovered,
            long took,
            String fault) {
        boolean inTime() {
            return heardAfter < GpuRank.BUDGET.toMillis() + SLACK_MS;
        }
    }

    @Test
    @Timeout(600) // a hundred rounds and more, each a bound and a process
    void shouldNameAProcessThatWasKilledAtARandomMomentAndRunOnWithoutIt() throws Exception {
        int rounds = Integer.getInteger("moe4j.kills", 4);
        Random random = new Random(Long.getLong("moe4j.seed", 11L));
        float[][][] half = GpuRank.expected(GpuRank.without(Set.of(1), batches[0]), Batch.empty());
        List<Kill> kills = new ArrayList<>();
        Deque<Process> started = new ArrayDeque<>();
        try (Harness other = new Harness(GpuRank.config().toBuilder().device(0).build())) {
            for (int round = 0; round < rounds; round++) {
                // why: a JVM takes longer to start than a round
                for (int r = round + started.size(); r < Math.min(rounds, round + 4); r++) {
                    started.add(GpuRankMain.start(folder.resolve("r" + r), TOKENS, 3, 2));
                }
                Kill kill =
                        kill(
                                folder.resolve("r" + round),
                                started.remove(),
                                5 + random.nextInt(100),
                                other,
                                half);
                kills.add(kill);
                System.out.printf("KILLS round %d: %s%n", round, kill);
            }
        } finally {
            started.forEach(Process::destroyForcibly);
            summarise(kills, rounds);
        }
        assertThat(kills).hasSize(rounds).allMatch(Kill::inTime).allMatch(Kill::named);
        assertThat(kills).allMatch(Kill::alone).allMatch(Kill::recovered);
        stepAndCompare(); // other layers in these contexts go on
    }

    private Kill kill(Path meeting, Process child, int delay, Harness other, float[][][] half)
            throws InterruptedException {
        long start = System.nanoTime();
        try (Group group = Group.join(meeting, 0, 2, Duration.ofSeconds(30));
                GpuRank zero = GpuRank.open(GpuRank.config(), group)) {
            zero.load(batches[0]);
            try (MoeGraph graph = zero.capture()) {
                group.exchange("loaded", new byte[0]);
                long[] killed = {0};
                Thread killer = new Thread(() -> killAfter(delay, child, killed));
                killer.start();
                RankLostException fault = runUntilFault(zero, graph);
                long end = System.nanoTime();
                killer.join();
                boolean named = fault != null && fault.rank() == 0 && fault.peer() == 1;
                float[][] alone = other.run(List.of(batches))[0];
                Recovery agreed = zero.harness.layer.recover(Set.of(1));
                zero.launch(graph);
                zero.enqueue();
                zero.await();
                zero.harness.layer.result(0, agreed.epoch() + 2);
                return new Kill(
                        delay,
                        TimeUnit.NANOSECONDS.toMillis(end - killed[0]),
                        named,
                        Arrays.deepEquals(
                                Arrays.copyOf(alone, TOKENS), Arrays.copyOf(expected[0], TOKENS)),
                        Arrays.deepEquals(zero.output(TOKENS), Arrays.copyOf(half[0], TOKENS)),
                        TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start),
                        String.valueOf(fault == null ? null : fault.operation()));
            }
        } finally {
            child.destroyForcibly();
        }
    }

    private static void summarise(List<Kill> kills, int rounds) {
        long[] heard = kills.stream().mapToLong(Kill::heardAfter).sorted().toArray();
        long[] took = kills.stream().mapToLong(Kill::took).sorted().toArray();
        if (heard.length > 0) {
            System.out.printf(
                    "KILLS %d of %d rounds: heard of after min %d, median %d, max %d ms; in time %d,"
                            + " named rightly %d, context usable alone %d, recovered without it %d;"
                            + " a round took median %d ms%n",
                    kills.size(),
                    rounds,
                    heard[0],
                    heard[heard.length / 2],
                    heard[heard.length - 1],
                    kills.stream().filter(Kill::inTime).count(),
                    kills.stream().filter(Kill::named).count(),
                    kills.stream().filter(Kill::alone).count(),
                    kills.stream().filter(Kill::recovered).count(),
                    took[took.length / 2]);
        }
    }

    private static RankLostException runUntilFault(GpuRank rank, MoeGraph graph) {
        long end = System.nanoTime() + 20_000_000_000L;
        while (System.nanoTime() < end) {
            rank.enqueue();
            for (int i = 0; i < 9; i++) {
                rank.launch(graph);
            }
            rank.await();
            try {
                rank.harness.layer.check();
            } catch (RankLostException e) {
                return e;
            }
        }
        return null;
    }

    private static void killAfter(int millis, Process child, long[] killed) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
        killed[0] = System.nanoTime();
        child.destroyForcibly();
    }
}
