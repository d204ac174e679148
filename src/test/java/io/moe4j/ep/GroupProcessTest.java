package io.moe4j.ep;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

/** A group whose ranks are processes, one of which is killed. */
@Timeout(120)
class GroupProcessTest {
    private static final Duration LIMIT = Duration.ofSeconds(30);

    @TempDir Path folder;
    private final List<Process> children = new ArrayList<>();

    @AfterEach
    void endChildren() {
        children.forEach(Process::destroyForcibly);
    }

    private Process child(int rank, int ranks, int meetings, String... more) throws IOException {
        List<String> command =
                new ArrayList<>(
                        List.of(
                                Path.of(System.getProperty("java.home"), "bin", "java").toString(),
                                "-Xmx64m",
                                "-cp",
                                System.getProperty("java.class.path"),
                                GroupMain.class.getName(),
                                folder.resolve("g").toString(),
                                Integer.toString(rank),
                                Integer.toString(ranks),
                                Integer.toString(meetings)));
        command.addAll(List.of(more));
        Process child = new ProcessBuilder(command).redirectErrorStream(true).start();
        children.add(child);
        return child;
    }

    @Test
    void shouldMeetBetweenProcessesInAnyOrderOfArrival() throws Exception {
        Process two = child(2, 3, 2);
        Process one = child(1, 3, 2);
        try (Group zero = Group.join(folder.resolve("g"), 0, 3, LIMIT)) {
            for (int i = 0; i < 2; i++) {
                List<byte[]> all = zero.exchange("meeting " + i, new byte[] {'z'});
                assertThat(new String(all.get(1), StandardCharsets.UTF_8))
                        .isEqualTo("rank 1 pid " + one.pid());
                assertThat(new String(all.get(2), StandardCharsets.UTF_8))
                        .isEqualTo("rank 2 pid " + two.pid());
            }
        }
        for (Process child : children) {
            String output = new String(child.getInputStream().readAllBytes());
            assertThat(child.waitFor(30, TimeUnit.SECONDS)).isTrue();
            assertThat(child.exitValue()).as(output).isZero();
            assertThat(output).contains("0: z", "1: rank 1 pid " + one.pid());
        }
    }

    @Test
    void shouldHearAtOnceOfAProcessThatWasKilledAndGoOnWithoutIt() throws Exception {
        Process one = child(1, 3, 1, "stay");
        Process two = child(2, 3, 1, "stay");
        try (Group zero = Group.join(folder.resolve("g"), 0, 3, LIMIT)) {
            zero.exchange("meeting 0", new byte[0]);
            one.destroyForcibly().waitFor();
            long start = System.nanoTime();
            assertThatThrownBy(() -> zero.exchange("meeting 1", new byte[0]))
                    .isInstanceOf(GroupException.class)
                    .hasMessageContaining("no meeting 1, rank 1 ")
                    .extracting(e -> ((GroupException) e).missing())
                    .isEqualTo(Set.of(1));
            assertThat(System.nanoTime() - start).isLessThan(5_000_000_000L);
            assertThat(zero.meet("alone", new byte[] {4}, Set.of(0)).get(0)).containsExactly(4);
            CompletableFuture<Void> closed = zero.announce("closed");
            assertThat(two.isAlive()).isTrue();
            assertThat(closed).as("one is dead, one says nothing").isNotDone();
            two.destroyForcibly().waitFor();
            assertThat(closed).as("its GPU may still be at work").isNotDone();
            closed.orTimeout(20, TimeUnit.SECONDS).join();
        }
    }
}
