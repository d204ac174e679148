package io.moe4j.ep;

import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.Condition;
import java.util.concurrent.locks.ReentrantLock;

/**
 * A group in which every rank has a channel to every other, in order and without loss. Holds what
 * came and who left; how frames travel is the subclass's. Safe for any thread.
 */
abstract class MeshGroup implements Group {
    static final int MAX_RANKS = 64;

    /** How long after its death a process counts as closed. */
    private static final long REAPED_SECONDS = 5;

    private final int rank;
    private final int ranks;
    private final Duration limit;
    private final ReentrantLock meeting = new ReentrantLock();
    private final ReentrantLock lock = new ReentrantLock();
    private final Condition changed = lock.newCondition();
    private final List<Deque<Frame>> inbox = new ArrayList<>();

    /** Why a rank is heard of no more; null while it may be. */
    private final String[] gone;

    /** Ranks that closed their group, or died. */
    private final Set<Integer> said = new HashSet<>();

    private final Map<String, Set<Integer>> announced = new HashMap<>();
    private final Map<String, CompletableFuture<Void>> awaited = new HashMap<>();
    private boolean closed;

    MeshGroup(int rank, int ranks, Duration limit) {
        requireValid(rank, ranks, limit);
        this.rank = rank;
        this.ranks = ranks;
        this.limit = limit;
        this.gone = new String[ranks];
        for (int r = 0; r < ranks; r++) {
            inbox.add(new ArrayDeque<>());
        }
    }

    static void requireValid(int rank, int ranks, Duration limit) {
        if (ranks < 1 || ranks > MAX_RANKS) {
            throw new IllegalArgumentException(
                    "ranks="
                            + ranks
                            + " is outside 1.."
                            + MAX_RANKS
                            + ": choose the EP group size");
        }
        if (rank < 0 || rank >= ranks) {
            throw new IllegalArgumentException(
                    "rank=" + rank + " is outside 0.." + (ranks - 1) + ": ranks=" + ranks);
        }
        if (limit.isNegative() || limit.isZero()) {
            throw new IllegalArgumentException("limit=" + limit + " is not positive");
        }
    }

    /** Sends in order; returns at once. What cannot be sent is dropped: the reader hears why. */
    abstract void send(int to, Frame frame);

    /** Releases channels; called once, without locks held. */
    abstract void disconnect();

    @Override
    public final int rank() {
        return rank;
    }

    @Override
    public final int ranks() {
        return ranks;
    }

    final Duration limit() {
        return limit;
    }

    @Override
    public final List<byte[]> exchange(String what, byte[] mine) {
        return gather(Frame.of(Frame.Kind.EXCHANGE, what, mine), Group.allBut(ranks, Set.of()));
    }

    @Override
    public final List<byte[]> meet(String what, byte[] mine, Set<Integer> members) {
        if (!members.contains(rank)) {
            throw new IllegalArgumentException("rank " + rank + " is not among " + members);
        }
        return gather(Frame.of(Frame.Kind.MEET, what, mine), members);
    }

    private List<byte[]> gather(Frame frame, Set<Integer> members) {
        long deadline = System.nanoTime() + limit.toNanos();
        requireOpen();
        lockMeeting(frame.what(), deadline);
        try {
            for (int to : members) {
                if (to != rank) {
                    send(to, frame);
                }
            }
            byte[][] all = new byte[ranks][];
            all[rank] = frame.bytes().clone();
            lock.lock();
            try {
                receive(frame, members, all, deadline);
            } finally {
                lock.unlock();
            }
            return Arrays.asList(all);
        } finally {
            meeting.unlock();
        }
    }

    private void lockMeeting(String what, long deadline) {
        try {
            if (!meeting.tryLock(deadline - System.nanoTime(), TimeUnit.NANOSECONDS)) {
                throw new GroupException(
                        "rank "
                                + rank
                                + ": another thread of this rank is in a meeting, "
                                + what
                                + " cannot begin",
                        Set.of());
            }
        } catch (InterruptedException e) {
            throw interrupted(what);
        }
    }

    private void receive(Frame mine, Set<Integer> members, byte[][] all, long deadline) {
        while (true) {
            Set<Integer> missing = new TreeSet<>();
            for (int from : members) {
                if (all[from] == null) {
                    all[from] = take(from, mine);
                    if (all[from] == null) {
                        missing.add(from);
                    }
                }
            }
            if (missing.isEmpty()) {
                return;
            }
            requireOpenNow(mine.what());
            for (int from : missing) {
                if (gone[from] != null) {
                    throw new GroupException(
                            "rank "
                                    + rank
                                    + ": no "
                                    + mine.what()
                                    + ", rank "
                                    + from
                                    + " "
                                    + gone[from],
                            Set.of(from));
                }
            }
            long left = deadline - System.nanoTime();
            if (left <= 0) {
                throw new GroupException(
                        String.format(
                                Locale.ROOT,
                                "rank %d waited %.1f s in %s for %s %s",
                                rank,
                                limit.toNanos() / 1e9,
                                mine.what(),
                                missing.size() == 1 ? "rank" : "ranks",
                                missing.toString().replaceAll("[\\[\\]]", "")),
                        missing);
            }
            try {
                changed.awaitNanos(left);
            } catch (InterruptedException e) {
                throw interrupted(mine.what());
            }
        }
    }

    /** The next bytes of a rank for this meeting; null if they have not come. */
    private byte[] take(int from, Frame mine) {
        Deque<Frame> frames = inbox.get(from);
        for (Frame frame = frames.peek(); frame != null; frame = frames.peek()) {
            boolean fits = frame.kind() == mine.kind() && frame.what().equals(mine.what());
            if (fits) {
                return frames.poll().bytes();
            }
            boolean stale = mine.kind() == Frame.Kind.MEET || frame.kind() == Frame.Kind.MEET;
            if (!stale) {
                throw new GroupException(
                        "rank "
                                + from
                                + " is at "
                                + frame.what()
                                + " but rank "
                                + rank
                                + " is at "
                                + mine.what()
                                + ": every rank opens, prepares and recovers the same layers in"
                                + " the same order",
                        Set.of(from));
            }
            frames.poll(); // why: left behind by a meeting that failed
        }
        return null;
    }

    private RuntimeException interrupted(String what) {
        Thread.currentThread().interrupt();
        return new IllegalStateException("rank " + rank + " was interrupted in " + what);
    }

    @Override
    public final CompletableFuture<Void> announce(String what) {
        Frame frame = Frame.of(Frame.Kind.ANNOUNCE, what, new byte[0]);
        CompletableFuture<Void> future = new CompletableFuture<>();
        lock.lock();
        try {
            awaited.put(what, future);
            announced.computeIfAbsent(what, w -> new HashSet<>()).add(rank);
        } finally {
            lock.unlock();
        }
        for (int to = 0; to < ranks; to++) {
            if (to != rank) {
                send(to, frame);
            }
        }
        completeAnnounced();
        return future;
    }

    /** A frame came. */
    final void deliver(int from, Frame frame) {
        lock.lock();
        try {
            switch (frame.kind()) {
                case EXCHANGE, MEET -> inbox.get(from).add(frame);
                case ANNOUNCE ->
                        announced.computeIfAbsent(frame.what(), w -> new HashSet<>()).add(from);
                case BYE -> {
                    said.add(from);
                    gone[from] = "has closed its group";
                }
                default -> gone[from] = "sent " + frame.kind() + " after it had joined";
            }
            changed.signalAll();
        } finally {
            lock.unlock();
        }
        if (frame.kind() == Frame.Kind.ANNOUNCE || frame.kind() == Frame.Kind.BYE) {
            completeAnnounced();
        }
    }

    /** A channel broke. */
    final void lost(int from, String why) {
        lock.lock();
        try {
            if (gone[from] == null) {
                gone[from] = why;
            }
            changed.signalAll();
        } finally {
            lock.unlock();
        }
    }

    /**
     * A process ended without a word. why later: what it had under way on its GPU may take a moment
     * to end, and until then nobody may take it for closed.
     */
    final void died(int from, String why) {
        lost(from, why);
        CompletableFuture.delayedExecutor(REAPED_SECONDS, TimeUnit.SECONDS)
                .execute(
                        () -> {
                            lock.lock();
                            try {
                                said.add(from);
                            } finally {
                                lock.unlock();
                            }
                            completeAnnounced();
                        });
    }

    /** Whether nothing more is to be heard of any other rank. */
    final boolean alone() {
        lock.lock();
        try {
            for (int r = 0; r < ranks; r++) {
                if (r != rank && gone[r] == null) {
                    return false;
                }
            }
            return true;
        } finally {
            lock.unlock();
        }
    }

    private void completeAnnounced() {
        List<CompletableFuture<Void>> done = new ArrayList<>();
        lock.lock();
        try {
            awaited.entrySet()
                    .removeIf(
                            entry -> {
                                Set<Integer> heard = new HashSet<>(said);
                                heard.addAll(announced.get(entry.getKey()));
                                heard.add(rank);
                                boolean all = heard.size() == ranks;
                                if (all) {
                                    announced.remove(entry.getKey());
                                    done.add(entry.getValue());
                                }
                                return all;
                            });
        } finally {
            lock.unlock();
        }
        done.forEach(future -> future.complete(null));
    }

    private void requireOpen() {
        lock.lock();
        try {
            requireOpenNow("a meeting");
        } finally {
            lock.unlock();
        }
    }

    private void requireOpenNow(String what) {
        if (closed) {
            throw new IllegalStateException(
                    "rank " + rank + ": the group is closed, no " + what + ": join a new one");
        }
    }

    @Override
    public final void close() {
        lock.lock();
        try {
            if (closed) {
                return;
            }
            closed = true;
            changed.signalAll();
        } finally {
            lock.unlock();
        }
        for (int to = 0; to < ranks; to++) {
            if (to != rank) {
                send(to, new Frame(Frame.Kind.BYE, "", new byte[0]));
            }
        }
        disconnect();
    }
}
