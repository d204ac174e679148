package io.moe4j.ep;

import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collection;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.function.Consumer;
import java.util.stream.IntStream;

/**
 * One rank's membership in an expert-parallel group, and the control plane by which ranks meet when
 * layers open, recover and close. No step uses it: rows and flags travel between GPUs alone.
 *
 * <p>Every rank calls the same methods in the same order. All waits are bounded by the limit the
 * group was made with; on expiry, and when a rank leaves, a {@link GroupException} names the ranks
 * that are missing. Nothing listens unless a group is joined, and then only until all ranks have
 * come.
 *
 * <p>Safe for any thread. The caller closes it, after the layers that use it. Programs may bring a
 * control plane of their own by implementing this interface.
 */
public interface Group extends AutoCloseable {
    /** Most bytes one rank may give to an exchange. */
    int MAX_BYTES = 16 << 20;

    /** How long ranks wait for each other unless told otherwise. */
    Duration DEFAULT_LIMIT = Duration.ofMinutes(2);

    /** {@return this rank's number, 0 to R − 1} */
    int rank();

    /** {@return R, the number of ranks} */
    int ranks();

    /**
     * Gives bytes to all ranks and gets theirs: an all-gather, which is a barrier too.
     *
     * @param what names the meeting, at most 200 bytes; all ranks must be at the same one
     * @param mine this rank's bytes, at most {@link #MAX_BYTES}
     * @return the bytes of all ranks, in rank order
     * @throws GroupException naming the ranks that did not come, left, or are at another meeting
     * @throws IllegalStateException if the group is closed
     */
    List<byte[]> exchange(String what, byte[] mine);

    /**
     * As {@link #exchange}, among some ranks only, and over whatever an exchange that failed has
     * left behind: what ranks do to go on after a fault.
     *
     * @param what names the meeting
     * @param mine this rank's bytes
     * @param members who takes part; this rank is one of them
     * @return the bytes of all ranks; null for those that take no part
     * @throws GroupException naming the ranks that did not come or left
     * @throws IllegalStateException if the group is closed
     */
    List<byte[]> meet(String what, byte[] mine, Set<Integer> members);

    /**
     * Tells the other ranks something without waiting for them.
     *
     * @param what names it; a rank announces a thing once
     * @return completed when every rank has announced the same, has closed its group, or has been
     *     dead for some seconds. Its actions run on any thread
     */
    CompletableFuture<Void> announce(String what);

    /**
     * Leaves the group: the others hear of it; what waits here ends. Idempotent; waits for nobody,
     * only until what this rank has said is on its way, two seconds at most.
     */
    @Override
    void close();

    /**
     * {@return the members of a new group within this process, in rank order; each is used by its
     * rank and closed} Ranks that wait for each other need a thread each: {@link #together}.
     *
     * @param ranks R, 1 to 64
     */
    static List<Group> inProcess(int ranks) {
        return inProcess(ranks, DEFAULT_LIMIT);
    }

    /**
     * {@return as {@link #inProcess(int)}, with a limit}
     *
     * @param ranks R, 1 to 64
     * @param limit how long ranks wait for each other
     */
    static List<Group> inProcess(int ranks, Duration limit) {
        return List.copyOf(LocalGroup.create(ranks, limit));
    }

    /**
     * Joins a group of processes of one user on one host, over Unix sockets in a directory that
     * only that user can enter. The last rank to come ends the wait of all.
     *
     * @param directory made with mode 0700 if it is missing; a new one for each group
     * @param rank this rank's number
     * @param ranks R, 1 to 64, the same on all
     * @param limit how long to wait for the others, here and later
     * @return this rank's membership
     * @throws GroupException naming the ranks that did not come
     * @throws IllegalArgumentException if the directory is open to others or its path is too long
     */
    static Group join(Path directory, int rank, int ranks, Duration limit) {
        return SocketGroup.join(new Meeting.Directory(directory), rank, ranks, limit);
    }

    /**
     * Joins a group of processes over TCP on the loopback address, for hosts whose processes share
     * no directory. Rank r listens on {@code port + r} until all have come; who does not know the
     * cookie is sent away.
     *
     * @param port of rank 0
     * @param cookie a secret of 16 characters or more, the same on all
     * @param rank this rank's number
     * @param ranks R, 1 to 64, the same on all
     * @param limit how long to wait for the others, here and later
     * @return this rank's membership
     * @throws GroupException naming the ranks that did not come
     * @throws IllegalArgumentException if the cookie is too short or a port is out of range
     */
    static Group joinLoopback(int port, String cookie, int rank, int ranks, Duration limit) {
        return SocketGroup.join(new Meeting.Loopback(port, cookie), rank, ranks, limit);
    }

    /**
     * Does something for several ranks of this process at once, each on a thread of its own, and
     * waits for all: what {@code prepare} and {@code recover} need.
     *
     * @param ranks one element per rank, usually the layers
     * @param action done for each
     * @param <T> kind of element
     * @throws RuntimeException the first failure in rank order; the others are suppressed in it
     */
    static <T> void together(Collection<T> ranks, Consumer<T> action) {
        List<Throwable> failures = new ArrayList<>();
        List<T> all = List.copyOf(ranks);
        Throwable[] thrown = new Throwable[all.size()];
        List<Thread> threads = new ArrayList<>();
        for (int i = 0; i < all.size(); i++) {
            int at = i;
            Thread thread =
                    new Thread(
                            () -> {
                                try {
                                    action.accept(all.get(at));
                                } catch (Throwable e) {
                                    thrown[at] = e;
                                }
                            },
                            "moe4j-together-" + at);
            thread.setDaemon(true);
            thread.start();
            threads.add(thread);
        }
        boolean interrupted = false;
        for (Thread thread : threads) {
            while (thread.isAlive()) {
                try {
                    thread.join();
                } catch (InterruptedException e) {
                    interrupted = true; // why: every wait of an action is bounded
                }
            }
        }
        if (interrupted) {
            Thread.currentThread().interrupt();
        }
        for (Throwable failure : thrown) {
            if (failure != null) {
                failures.add(failure);
            }
        }
        if (failures.isEmpty()) {
            return;
        }
        Throwable first = failures.remove(0);
        failures.forEach(first::addSuppressed);
        if (first instanceof Error error) {
            throw error;
        }
        throw (RuntimeException) first;
    }

    /**
     * {@return all numbers from 0 to {@code ranks − 1} but those given}
     *
     * @param ranks R
     * @param lost numbers to leave out
     */
    static Set<Integer> allBut(int ranks, Set<Integer> lost) {
        Set<Integer> members = new HashSet<>();
        IntStream.range(0, ranks).filter(r -> !lost.contains(r)).forEach(members::add);
        return members;
    }
}
