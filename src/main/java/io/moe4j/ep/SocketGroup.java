package io.moe4j.ep;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.SelectableChannel;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.HashSet;
import java.util.Locale;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;

/**
 * A member of a group of processes: one socket to every other rank. Rank r connects to the ranks
 * below it and accepts those above it; then nobody listens any more. One daemon thread moves the
 * frames, also for a while after close, until the others have left too.
 */
final class SocketGroup extends MeshGroup {
    /** How long somebody who connected may take to say who it is. */
    private static final long HELLO_NANOS = 2_000_000_000L;

    private static final long RETRY_MILLIS = 10;

    /** Said of a rank whose end was cut off: only the death of a process does that. */
    private static final String GONE = "has gone: its process ended";

    /** How long close may take to send what is still to be sent; sockets of one host are faster. */
    private static final long FLUSH_SECONDS = 2;

    private final Selector selector;
    private final Peer[] peers;
    private final Thread mover;
    private final CountDownLatch flushed = new CountDownLatch(1);
    private volatile boolean leaving;

    /** One socket; what is to be sent is guarded by itself. */
    private static final class Peer {
        final int rank;
        final SocketChannel channel;
        final ByteBuffer head = ByteBuffer.allocate(Frame.HEADER);
        final Deque<ByteBuffer> out = new ArrayDeque<>();
        Frame.Header header;
        ByteBuffer body;

        Peer(int rank, SocketChannel channel) {
            this.rank = rank;
            this.channel = channel;
        }
    }

    private SocketGroup(SocketChannel[] channels, int rank, Duration limit) throws IOException {
        super(rank, channels.length, limit);
        selector = Selector.open();
        peers = new Peer[channels.length];
        for (int r = 0; r < channels.length; r++) {
            if (r != rank) {
                peers[r] = new Peer(r, channels[r]);
                channels[r].configureBlocking(false);
                channels[r].register(selector, SelectionKey.OP_READ, peers[r]);
            }
        }
        mover = new Thread(this::move, "moe4j-group-rank-" + rank);
        mover.setDaemon(true);
        mover.start();
    }

    // ------------------------------------------------------------------ joining

    static Group join(Meeting meeting, int rank, int ranks, Duration limit) {
        requireValid(rank, ranks, limit);
        SocketChannel[] channels = new SocketChannel[ranks];
        long deadline = System.nanoTime() + limit.toNanos();
        try (ServerSocketChannel server = meeting.listen(rank, ranks)) {
            try {
                for (int lower = 0; lower < rank; lower++) {
                    channels[lower] = call(meeting, lower, rank, ranks, limit, deadline);
                }
                answer(server, meeting, channels, rank, limit, deadline);
                return new SocketGroup(channels, rank, limit);
            } catch (IOException | RuntimeException e) {
                for (SocketChannel channel : channels) {
                    closeQuietly(channel);
                }
                throw e;
            } finally {
                meeting.left(rank);
            }
        } catch (IOException e) {
            throw new GroupException(
                    "rank " + rank + " cannot join at " + meeting.place() + ": " + e.getMessage(),
                    Set.of());
        }
    }

    /** Connects to a rank below, as soon as it listens. */
    private static SocketChannel call(
            Meeting meeting, int to, int rank, int ranks, Duration limit, long deadline)
            throws IOException {
        while (true) {
            SocketChannel channel = null;
            try {
                channel = meeting.connect(to);
                channel.configureBlocking(false);
                write(channel, hello(meeting, to, rank, ranks), deadline);
                Frame reply = read(channel, deadline);
                if (reply.kind() == Frame.Kind.WELCOME) {
                    return channel;
                }
                closeQuietly(channel);
                throw new GroupException(
                        "rank "
                                + to
                                + " at "
                                + meeting.place()
                                + " refused rank "
                                + rank
                                + ": "
                                + new String(reply.bytes(), StandardCharsets.UTF_8),
                        Set.of(to));
            } catch (Frame.Malformed e) {
                closeQuietly(channel);
                throw new GroupException(
                        "rank " + to + " at " + meeting.place() + " sent " + e.getMessage(),
                        Set.of(to));
            } catch (IOException notYet) {
                closeQuietly(channel);
                if (System.nanoTime() - deadline > 0) {
                    throw late(meeting, rank, limit, Set.of(to), 0, notYet.getMessage());
                }
                sleep(rank);
            }
        }
    }

    private static void sleep(int rank) {
        try {
            Thread.sleep(RETRY_MILLIS);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            throw new IllegalStateException("rank " + rank + " was interrupted while joining", e);
        }
    }

    /** Accepts the ranks above, in whatever order they come; sends everybody else away. */
    private static void answer(
            ServerSocketChannel server,
            Meeting meeting,
            SocketChannel[] channels,
            int rank,
            Duration limit,
            long deadline)
            throws IOException {
        server.configureBlocking(false);
        Set<Integer> missing = new TreeSet<>();
        for (int higher = rank + 1; higher < channels.length; higher++) {
            missing.add(higher);
        }
        int refused = 0;
        String why = "";
        while (!missing.isEmpty()) {
            if (!ready(server, SelectionKey.OP_ACCEPT, deadline)) {
                throw late(meeting, rank, limit, missing, refused, why);
            }
            SocketChannel channel = server.accept();
            if (channel == null) {
                continue;
            }
            channel.configureBlocking(false);
            try {
                long patience = Math.min(deadline, System.nanoTime() + HELLO_NANOS);
                int from = greet(channel, meeting, missing, rank, channels.length, patience);
                channels[from] = channel;
                missing.remove(from);
            } catch (IOException | Frame.Malformed e) {
                closeQuietly(channel);
                refused++;
                why = e.getMessage();
            }
        }
    }

    /** Who connected; throws if it is nobody of this group. */
    private static int greet(
            SocketChannel channel,
            Meeting meeting,
            Set<Integer> missing,
            int rank,
            int ranks,
            long deadline)
            throws IOException, Frame.Malformed {
        Frame.Header header = readHeader(channel, deadline);
        // why before the rest is read: a stranger may not make us allocate
        if (header.kind() != Frame.Kind.HELLO || header.length() != HELLO_BYTES) {
            throw new Frame.Malformed("something else than a greeting");
        }
        ByteBuffer hello = ByteBuffer.wrap(readBody(channel, header, deadline).bytes());
        byte[] secret = new byte[32];
        hello.get(secret);
        if (!MessageDigest.isEqual(secret, meeting.secret())) {
            refuse(channel, "its cookie is another", deadline);
        }
        int theirRanks = hello.getInt();
        int from = hello.getInt();
        int to = hello.getInt();
        if (theirRanks != ranks) {
            refuse(channel, "it says ranks=" + theirRanks + ", here ranks=" + ranks, deadline);
        }
        if (to != rank || !missing.contains(from)) {
            refuse(
                    channel,
                    "there is a rank " + from + " already, or it is not expected",
                    deadline);
        }
        write(channel, new Frame(Frame.Kind.WELCOME, "", new byte[0]), deadline);
        return from;
    }

    private static final int HELLO_BYTES = 32 + 12;

    private static Frame hello(Meeting meeting, int to, int rank, int ranks) {
        ByteBuffer bytes = ByteBuffer.allocate(HELLO_BYTES);
        bytes.put(meeting.secret()).putInt(ranks).putInt(rank).putInt(to);
        return new Frame(Frame.Kind.HELLO, "", bytes.array());
    }

    private static void refuse(SocketChannel channel, String why, long deadline)
            throws IOException, Frame.Malformed {
        byte[] text = why.getBytes(StandardCharsets.UTF_8);
        write(channel, new Frame(Frame.Kind.REFUSED, "", text), deadline);
        throw new Frame.Malformed(why);
    }

    private static GroupException late(
            Meeting meeting,
            int rank,
            Duration limit,
            Set<Integer> missing,
            int refused,
            String why) {
        return new GroupException(
                String.format(
                        Locale.ROOT,
                        "rank %d waited %.1f s at %s for %s %s to join%s",
                        rank,
                        limit.toNanos() / 1e9,
                        meeting.place(),
                        missing.size() == 1 ? "rank" : "ranks",
                        missing.toString().replaceAll("[\\[\\]]", ""),
                        refused == 0
                                ? ""
                                : " ("
                                        + refused
                                        + " connections refused, the last one: "
                                        + why
                                        + ")"),
                missing);
    }

    private static boolean ready(SelectableChannel channel, int operation, long deadline)
            throws IOException {
        try (Selector one = Selector.open()) {
            SelectionKey key = channel.register(one, operation);
            long left = (deadline - System.nanoTime()) / 1_000_000;
            boolean ready = left > 0 && one.select(left) > 0;
            key.cancel();
            return ready;
        }
    }

    private static void write(SocketChannel channel, Frame frame, long deadline)
            throws IOException {
        ByteBuffer bytes = frame.encode();
        while (bytes.hasRemaining()) {
            if (channel.write(bytes) == 0 && !ready(channel, SelectionKey.OP_WRITE, deadline)) {
                throw new IOException("it took no greeting in time");
            }
        }
    }

    private static Frame read(SocketChannel channel, long deadline)
            throws IOException, Frame.Malformed {
        return readBody(channel, readHeader(channel, deadline), deadline);
    }

    private static Frame.Header readHeader(SocketChannel channel, long deadline)
            throws IOException, Frame.Malformed {
        ByteBuffer head = ByteBuffer.allocate(Frame.HEADER);
        fill(channel, head, deadline);
        return Frame.header(head);
    }

    private static Frame readBody(SocketChannel channel, Frame.Header header, long deadline)
            throws IOException {
        ByteBuffer body = ByteBuffer.allocate(header.length());
        fill(channel, body, deadline);
        return Frame.body(header, body.flip());
    }

    private static void fill(SocketChannel channel, ByteBuffer to, long deadline)
            throws IOException {
        while (to.hasRemaining()) {
            int got = channel.read(to);
            if (got < 0) {
                throw new IOException("it hung up");
            }
            if (got == 0 && !ready(channel, SelectionKey.OP_READ, deadline)) {
                throw new IOException("it did not say who it is in time");
            }
        }
    }

    private static void closeQuietly(SocketChannel channel) {
        if (channel != null) {
            try {
                channel.close();
            } catch (IOException nothingToLose) {
                // it is closed
            }
        }
    }

    // ------------------------------------------------------------------ joined

    @Override
    void send(int to, Frame frame) {
        Peer peer = peers[to];
        synchronized (peer.out) {
            peer.out.add(frame.encode());
        }
        selector.wakeup();
    }

    /** why a wait: the process may end next, and the others still need what was said last. */
    @Override
    void disconnect() {
        leaving = true;
        selector.wakeup();
        if (Thread.currentThread() == mover) {
            return;
        }
        try {
            flushed.await(FLUSH_SECONDS, TimeUnit.SECONDS);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }

    /** The thread: moves frames until this rank and all others have left. */
    private void move() {
        long end = Long.MAX_VALUE;
        Set<Peer> open = new HashSet<>();
        for (Peer peer : peers) {
            if (peer != null) {
                open.add(peer);
            }
        }
        try (selector) {
            while (!open.isEmpty()) {
                if (leaving && end == Long.MAX_VALUE) {
                    end = System.nanoTime() + limit().toNanos();
                }
                if (leaving && sentAll(open)) {
                    flushed.countDown();
                }
                if (leaving && (sentAll(open) && alone() || System.nanoTime() - end > 0)) {
                    break;
                }
                for (Peer peer : open) {
                    interest(peer);
                }
                selector.select(leaving ? 100 : 1000);
                for (SelectionKey key : selector.selectedKeys()) {
                    Peer peer = (Peer) key.attachment();
                    String broken = serve(peer, key);
                    if (broken != null) {
                        key.cancel();
                        closeQuietly(peer.channel);
                        open.remove(peer);
                        if (broken.equals(GONE)) {
                            died(peer.rank, broken);
                        } else {
                            lost(peer.rank, broken);
                        }
                    }
                }
                selector.selectedKeys().clear();
            }
        } catch (IOException | RuntimeException e) {
            for (Peer peer : open) {
                lost(peer.rank, "is out of reach: " + e);
            }
        }
        flushed.countDown();
        for (Peer peer : open) {
            closeQuietly(peer.channel);
            lost(peer.rank, "was left: this group is closed");
        }
    }

    private static boolean sentAll(Set<Peer> open) {
        for (Peer peer : open) {
            synchronized (peer.out) {
                if (!peer.out.isEmpty()) {
                    return false;
                }
            }
        }
        return true;
    }

    private void interest(Peer peer) {
        SelectionKey key = peer.channel.keyFor(selector);
        synchronized (peer.out) {
            key.interestOps(
                    SelectionKey.OP_READ | (peer.out.isEmpty() ? 0 : SelectionKey.OP_WRITE));
        }
    }

    /** Reads and writes what can be; returns why the channel is of no use any more, or null. */
    private String serve(Peer peer, SelectionKey key) {
        try {
            boolean writable = !key.isWritable() || send(peer);
            String broken = key.isReadable() || !writable ? receive(peer) : null;
            return broken == null && !writable ? GONE : broken;
        } catch (IOException e) {
            return GONE; // why not the reason: what a dead process did not read resets the socket
        } catch (Frame.Malformed e) {
            return "sent " + e.getMessage();
        }
    }

    /** False if the other end takes nothing any more; what it said before is still to be read. */
    private static boolean send(Peer peer) {
        synchronized (peer.out) {
            try {
                while (!peer.out.isEmpty()) {
                    peer.channel.write(peer.out.peek());
                    if (peer.out.peek().hasRemaining()) {
                        break;
                    }
                    peer.out.poll();
                }
                return true;
            } catch (IOException e) {
                return false;
            }
        }
    }

    private String receive(Peer peer) throws IOException, Frame.Malformed {
        while (true) {
            if (peer.header == null) {
                int got = peer.channel.read(peer.head);
                if (got < 0) {
                    return GONE;
                }
                if (peer.head.hasRemaining()) {
                    return null;
                }
                peer.header = Frame.header(peer.head);
                peer.body = ByteBuffer.allocate(peer.header.length());
                peer.head.clear();
            }
            if (peer.body.hasRemaining()) {
                int got = peer.channel.read(peer.body);
                if (got < 0) {
                    return GONE;
                }
                if (peer.body.hasRemaining()) {
                    return null;
                }
            }
            deliver(peer.rank, Frame.body(peer.header, peer.body.flip()));
            peer.header = null;
            peer.body = null;
        }
    }
}
