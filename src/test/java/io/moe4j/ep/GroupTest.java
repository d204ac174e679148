package io.moe4j.ep;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.UnixDomainSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.TimeUnit;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** Ranks meet, and whatever goes wrong is told by name and within the limit. */
@Timeout(60)
class GroupTest {
    private static final Duration LONG = Duration.ofSeconds(20);
    private static final Duration SHORT = Duration.ofMillis(400);
    private static final String COOKIE = "a cookie of this test";

    @TempDir Path folder;
    private final List<Group> open = Collections.synchronizedList(new ArrayList<>());

    /** Ways to make a group; each group is new. */
    enum Way {
        THREADS,
        UNIX,
        LOOPBACK
    }

    @AfterEach
    void closeAll() {
        open.forEach(Group::close);
    }

    private List<Group> make(Way way, int ranks, Duration limit) {
        if (way == Way.THREADS) {
            List<Group> all = Group.inProcess(ranks, limit);
            open.addAll(all);
            return all;
        }
        Path directory = folder.resolve("g" + open.size());
        int port = way == Way.LOOPBACK ? freePorts(ranks) : 0;
        Group[] all = new Group[ranks];
        List<Integer> order = new ArrayList<>(IntStream.range(0, ranks).boxed().toList());
        Collections.shuffle(order, new Random(ranks));
        Group.together(
                order,
                rank -> {
                    pause(order.indexOf(rank) * 20);
                    all[rank] =
                            way == Way.UNIX
                                    ? Group.join(directory, rank, ranks, limit)
                                    : Group.joinLoopback(port, COOKIE, rank, ranks, limit);
                });
        open.addAll(Arrays.asList(all));
        return Arrays.asList(all);
    }

    private static void pause(int millis) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException e) {
            throw new IllegalStateException(e);
        }
    }

    /** The first of some ports in a row that nobody uses. */
    private static int freePorts(int count) {
        Random random = new Random();
        for (int attempt = 0; attempt < 100; attempt++) {
            int port = 20_000 + random.nextInt(20_000);
            boolean free = true;
            for (int i = 0; i < count && free; i++) {
                try (ServerSocket probe =
                        new ServerSocket(port + i, 1, InetAddress.getLoopbackAddress())) {
                    free = probe.isBound();
                } catch (IOException used) {
                    free = false;
                }
            }
            if (free) {
                return port;
            }
        }
        throw new IllegalStateException("no free ports");
    }

    private static byte[] bytes(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private static String text(byte[] bytes) {
        return new String(bytes, StandardCharsets.UTF_8);
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldGiveEveryRankTheBytesOfAllInRankOrder(Way way) {
        for (int ranks : new int[] {1, 2, 5}) {
            List<Group> groups = make(way, ranks, LONG);
            Group.together(
                    groups,
                    group -> {
                        for (int round = 0; round < 20; round++) {
                            String what = "round " + round;
                            List<byte[]> all =
                                    group.exchange(what, bytes(what + " of " + group.rank()));
                            for (int r = 0; r < ranks; r++) {
                                assertThat(text(all.get(r))).isEqualTo(what + " of " + r);
                            }
                        }
                    });
        }
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldCarryLargeAndEmptyBytesBothWaysAtOnce(Way way) {
        List<Group> groups = make(way, 3, LONG);
        Group.together(
                groups,
                group -> {
                    byte[] mine = new byte[group.rank() == 1 ? 0 : 3 << 20];
                    Arrays.fill(mine, (byte) (7 + group.rank()));
                    List<byte[]> all = group.exchange("large", mine);
                    assertThat(all.get(1)).isEmpty();
                    for (int r : new int[] {0, 2}) {
                        assertThat(all.get(r)).hasSize(3 << 20).containsOnly((byte) (7 + r));
                    }
                });
        assertThatThrownBy(() -> groups.get(0).exchange("x", new byte[Group.MAX_BYTES + 1]))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("exceed the limit 16777216");
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldNameTheRanksThatNeverCome(Way way) {
        List<Group> groups = make(way, 4, SHORT);
        long start = System.nanoTime();
        Group.together(
                List.of(groups.get(0), groups.get(2)),
                group ->
                        assertThatThrownBy(() -> group.exchange("addresses", new byte[1]))
                                .isInstanceOf(GroupException.class)
                                .hasMessage(
                                        "rank "
                                                + group.rank()
                                                + " waited 0.4 s in addresses for ranks 1, 3")
                                .extracting(e -> ((GroupException) e).missing())
                                .isEqualTo(Set.of(1, 3)));
        assertThat(System.nanoTime() - start).isBetween(400_000_000L, 3_000_000_000L);
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldSayWhichRankIsSomewhereElse(Way way) {
        List<Group> groups = make(way, 2, LONG);
        Group.together(
                groups,
                group ->
                        assertThatThrownBy(
                                        () -> group.exchange("layer " + group.rank(), new byte[0]))
                                .isInstanceOf(GroupException.class)
                                .hasMessageContaining(
                                        "rank "
                                                + (1 - group.rank())
                                                + " is at layer "
                                                + (1 - group.rank())
                                                + " but rank "
                                                + group.rank()
                                                + " is at layer "
                                                + group.rank()));
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldEndTheWaitWhenARankLeavesOrThisOneIsClosed(Way way) {
        List<Group> groups = make(way, 3, LONG);
        CompletableFuture<List<byte[]>> waiting =
                CompletableFuture.supplyAsync(() -> groups.get(0).exchange("never", new byte[0]));
        pause(50);
        assertThat(waiting).isNotDone();
        groups.get(1).close();
        assertThatThrownBy(() -> waiting.orTimeout(5, TimeUnit.SECONDS).join())
                .hasCauseInstanceOf(GroupException.class)
                .hasMessageContaining("no never, rank 1 has closed its group");

        CompletableFuture<List<byte[]>> own =
                CompletableFuture.supplyAsync(
                        () -> groups.get(2).meet("alone", new byte[0], Set.of(0, 2)));
        pause(50);
        groups.get(2).close();
        assertThatThrownBy(() -> own.orTimeout(5, TimeUnit.SECONDS).join())
                .isInstanceOf(CompletionException.class)
                .hasCauseInstanceOf(IllegalStateException.class)
                .hasMessageContaining("rank 2: the group is closed");
        assertThatThrownBy(() -> groups.get(2).exchange("later", new byte[0]))
                .isInstanceOf(IllegalStateException.class);
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldMeetWithoutTheLostOverWhatAFailedExchangeLeftBehind(Way way) {
        List<Group> groups = make(way, 3, SHORT);
        List<Group> survivors = List.of(groups.get(0), groups.get(2));
        Group.together(
                survivors,
                group ->
                        assertThatThrownBy(() -> group.exchange("step", bytes("old")))
                                .isInstanceOf(GroupException.class));
        Group.together(
                survivors,
                group -> {
                    List<byte[]> all =
                            group.meet("recover", bytes("new" + group.rank()), Set.of(0, 2));
                    assertThat(text(all.get(0))).isEqualTo("new0");
                    assertThat(all.get(1)).isNull();
                    assertThat(text(all.get(2))).isEqualTo("new2");
                });
        assertThatThrownBy(() -> groups.get(0).meet("x", new byte[0], Set.of(1)))
                .isInstanceOf(IllegalArgumentException.class);
    }

    @ParameterizedTest
    @EnumSource(Way.class)
    void shouldCompleteAnAnnouncementWhenAllHaveMadeItOrClosed(Way way) {
        List<Group> groups = make(way, 3, LONG);
        CompletableFuture<Void> first = groups.get(0).announce("closed 1");
        groups.get(1).announce("closed 1");
        groups.get(2).announce("closed 2");
        pause(100);
        assertThat(first).isNotDone();
        groups.get(2).close();
        first.orTimeout(5, TimeUnit.SECONDS).join();
    }

    @Test
    void shouldListenNoMoreOnceAllHaveCome() throws IOException {
        make(Way.UNIX, 2, LONG);
        try (var files = Files.list(folder.resolve("g0"))) {
            assertThat(files).isEmpty();
        }
        int port = freePorts(2);
        List<Group> groups = new ArrayList<>(Collections.nCopies(2, null));
        Group.together(
                List.of(0, 1),
                rank -> groups.set(rank, Group.joinLoopback(port, COOKIE, rank, 2, LONG)));
        open.addAll(groups);
        for (int p : new int[] {port, port + 1}) {
            InetSocketAddress at = new InetSocketAddress(InetAddress.getLoopbackAddress(), p);
            assertThatThrownBy(() -> SocketChannel.open(at).close())
                    .isInstanceOf(IOException.class);
        }
    }

    @Test
    void shouldSendAwayWhoeverLacksTheCookieAndGoOnWaiting() throws Exception {
        int port = freePorts(2);
        CompletableFuture<Group> zero =
                CompletableFuture.supplyAsync(() -> Group.joinLoopback(port, COOKIE, 0, 2, LONG));
        assertThatThrownBy(() -> Group.joinLoopback(port, "another cookie of 16", 1, 2, LONG))
                .isInstanceOf(GroupException.class)
                .hasMessageContaining("refused rank 1: its cookie is another");
        assertThatThrownBy(() -> Group.joinLoopback(port, COOKIE, 2, 3, LONG))
                .isInstanceOf(GroupException.class)
                .hasMessageContaining("it says ranks=3, here ranks=2");
        for (byte[] garbage : garbage()) {
            InetSocketAddress at = new InetSocketAddress(InetAddress.getLoopbackAddress(), port);
            try (SocketChannel stranger = SocketChannel.open(at)) {
                stranger.write(ByteBuffer.wrap(garbage));
                ByteBuffer reply = ByteBuffer.allocate(16);
                try {
                    assertThat(stranger.read(reply)).as("hung up on").isLessThanOrEqualTo(0);
                } catch (IOException reset) {
                    assertThat(reset).hasMessageContaining("reset");
                }
            }
        }
        Group one = Group.joinLoopback(port, COOKIE, 1, 2, LONG);
        open.addAll(List.of(zero.get(), one));
        Group.together(open, group -> group.exchange("fine", new byte[0]));
        assertThatThrownBy(() -> Group.joinLoopback(port, "short", 0, 2, SHORT))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("fewer than 16 characters");
    }

    /** Not our magic; our magic with absurd lengths; a frame that is no greeting; noise. */
    private static List<byte[]> garbage() {
        byte[] noise = new byte[4096];
        new Random(3).nextBytes(noise);
        byte[] huge =
                ByteBuffer.allocate(16)
                        .putInt(0x4d344550)
                        .put((byte) 1)
                        .put((byte) 0)
                        .putShort((short) 0)
                        .putInt(Integer.MAX_VALUE)
                        .putInt(0)
                        .array();
        byte[] wrongKind = new Frame(Frame.Kind.BYE, "", new byte[44]).encode().array();
        return List.of(bytes("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), noise, huge, wrongKind);
    }

    @Test
    void shouldGiveUpARankThatSendsNoFramesOrTooLargeOnes() throws Exception {
        for (byte[] garbage : garbage().subList(0, 3)) {
            Path directory = folder.resolve("garbage" + open.size());
            CompletableFuture<Group> joining =
                    CompletableFuture.supplyAsync(() -> Group.join(directory, 0, 2, LONG));
            while (!Files.exists(directory.resolve("rank-0.sock"))) {
                pause(5);
            }
            pause(50);
            UnixDomainSocketAddress at =
                    UnixDomainSocketAddress.of(directory.resolve("rank-0.sock"));
            try (SocketChannel member = SocketChannel.open(at)) {
                byte[] hello =
                        ByteBuffer.allocate(44).putInt(32, 2).putInt(36, 1).putInt(40, 0).array();
                member.write(new Frame(Frame.Kind.HELLO, "", hello).encode());
                Group zero = joining.get(5, TimeUnit.SECONDS);
                open.add(zero);
                member.write(ByteBuffer.wrap(garbage));
                assertThatThrownBy(() -> zero.exchange("anything", new byte[0]))
                        .isInstanceOf(GroupException.class)
                        .hasMessageMatching(
                                "rank 0: no anything, rank 1 sent (bytes that are no frame|a frame"
                                        + " of 2147483647 bytes with a name of 0, limits 16777216).*");
            }
        }
    }

    @Test
    void shouldTellWhoDidNotJoinAndWhoWasRefused() throws Exception {
        Path directory = folder.resolve("late");
        CompletableFuture<Group> zero =
                CompletableFuture.supplyAsync(
                        () -> Group.join(directory, 0, 3, Duration.ofSeconds(1)));
        UnixDomainSocketAddress at = UnixDomainSocketAddress.of(directory.resolve("rank-0.sock"));
        while (!Files.exists(at.getPath())) {
            pause(5);
        }
        pause(50);
        try (SocketChannel stranger = SocketChannel.open(at)) {
            stranger.write(ByteBuffer.wrap(bytes("0123456789abcdef0123456789abcdef")));
            assertThatThrownBy(() -> zero.orTimeout(5, TimeUnit.SECONDS).join())
                    .hasCauseInstanceOf(GroupException.class)
                    .hasMessageContaining("rank 0 waited 1.0 s at " + directory)
                    .hasMessageContaining("for ranks 1, 2 to join")
                    .hasMessageContaining("1 connections refused, the last one: bytes that are no")
                    .extracting(e -> ((GroupException) e.getCause()).missing())
                    .isEqualTo(Set.of(1, 2));
        }
        assertThat(at.getPath()).doesNotExist();
    }

    @Test
    void shouldRefuseADirectoryThatIsOpenToOthers() throws IOException {
        Path directory = Files.createDirectory(folder.resolve("open"));
        Files.setPosixFilePermissions(directory, PosixFilePermissions.fromString("rwxr-x---"));
        assertThatThrownBy(() -> Group.join(directory, 0, 2, SHORT))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("is open to others (rwxr-x---): chmod 700");
        Path deep = folder.resolve("d".repeat(120));
        assertThatThrownBy(() -> Group.join(deep, 0, 2, SHORT))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("too long for a socket");
        Path file = Files.createFile(folder.resolve("file"));
        assertThatThrownBy(() -> Group.join(file, 0, 2, SHORT))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("is not a directory");
    }

    @Test
    void shouldRefuseASecondRankOfTheSameNumberAndReplaceASocketThatNobodyHas() throws Exception {
        Path directory = folder.resolve("twice");
        CompletableFuture<Group> zero =
                CompletableFuture.supplyAsync(() -> Group.join(directory, 0, 2, LONG));
        while (!Files.exists(directory.resolve("rank-0.sock"))) {
            pause(5);
        }
        pause(50);
        assertThatThrownBy(() -> Group.join(directory, 0, 2, LONG))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("another process is rank 0");
        open.add(Group.join(directory, 1, 2, LONG));
        open.add(zero.get());

        Path stale = folder.resolve("stale");
        Files.createDirectory(
                stale,
                PosixFilePermissions.asFileAttribute(PosixFilePermissions.fromString("rwx------")));
        Files.createFile(stale.resolve("rank-0.sock"));
        CompletableFuture<Group> again =
                CompletableFuture.supplyAsync(() -> Group.join(stale, 0, 2, LONG));
        open.add(Group.join(stale, 1, 2, LONG));
        open.add(again.get());
    }

    @Test
    void shouldRefuseNumbersThatMakeNoSense() {
        assertThatThrownBy(() -> Group.inProcess(0))
                .hasMessageContaining("ranks=0 is outside 1..64");
        assertThatThrownBy(() -> Group.inProcess(65)).hasMessageContaining("ranks=65");
        assertThatThrownBy(() -> Group.join(folder, 2, 2, LONG))
                .hasMessageContaining("rank=2 is outside 0..1");
        assertThatThrownBy(() -> Group.inProcess(2, Duration.ZERO))
                .hasMessageContaining("limit=PT0S is not positive");
        assertThatThrownBy(() -> Group.joinLoopback(65535, COOKIE, 0, 2, SHORT))
                .hasMessageContaining("ports 65535..65536");
        Group alone = Group.inProcess(1).get(0);
        open.add(alone);
        assertThatThrownBy(() -> alone.exchange("x".repeat(201), new byte[0]))
                .isInstanceOf(IllegalArgumentException.class)
                .hasMessageContaining("more than 200 bytes");
    }

    @Test
    void shouldThrowTheFirstFailureOfRanksThatActTogether() {
        assertThatThrownBy(
                        () ->
                                Group.together(
                                        List.of(0, 1, 2),
                                        rank -> {
                                            if (rank > 0) {
                                                throw new IllegalStateException("rank " + rank);
                                            }
                                        }))
                .hasMessage("rank 1")
                .satisfies(e -> assertThat(e.getSuppressed()[0]).hasMessage("rank 2"));
    }
}
