package io.moe4j.cpu;

import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.IntConsumer;

/**
 * A fixed set of daemon threads that share loops with the calling thread. Owned by one layer; one
 * loop at a time.
 */
final class CpuWorkers implements AutoCloseable {
    private final int threads;
    private final ExecutorService pool;

    CpuWorkers(int threads) {
        this.threads = threads;
        AtomicInteger number = new AtomicInteger();
        this.pool =
                threads == 1
                        ? null
                        : Executors.newFixedThreadPool(
                                threads - 1,
                                work -> {
                                    Thread thread =
                                            new Thread(
                                                    work, "moe4j-cpu-" + number.incrementAndGet());
                                    thread.setDaemon(true);
                                    return thread;
                                });
    }

    /**
     * Runs {@code body} for 0..count−1, each exactly once, in any order, and returns when all are
     * done. The first exception or error is rethrown after the loop has ended.
     */
    void forEach(int count, IntConsumer body) {
        int helpers = Math.min(threads, count) - 1;
        if (helpers <= 0) {
            for (int index = 0; index < count; index++) {
                body.accept(index);
            }
            return;
        }
        AtomicInteger next = new AtomicInteger();
        Runnable share =
                () -> {
                    for (int i = next.getAndIncrement(); i < count; i = next.getAndIncrement()) {
                        body.accept(i);
                    }
                };
        Future<?>[] running = new Future<?>[helpers];
        for (int helper = 0; helper < helpers; helper++) {
            running[helper] = pool.submit(share);
        }
        Throwable failure = null;
        try {
            share.run();
        } catch (RuntimeException | Error e) {
            next.set(count);
            failure = e;
        }
        for (Future<?> future : running) {
            failure = join(future, failure);
        }
        if (failure instanceof Error error) {
            throw error;
        }
        if (failure != null) {
            throw (RuntimeException) failure;
        }
    }

    private static Throwable join(Future<?> future, Throwable earlier) {
        boolean interrupted = false;
        try {
            while (true) {
                try {
                    future.get();
                    return earlier;
                } catch (InterruptedException e) {
                    interrupted = true; // why: buffers are in use until every share has ended
                } catch (java.util.concurrent.ExecutionException e) {
                    if (earlier != null) {
                        earlier.addSuppressed(e.getCause());
                        return earlier;
                    }
                    return e.getCause() instanceof RuntimeException || e.getCause() instanceof Error
                            ? e.getCause()
                            : new IllegalStateException(e.getCause());
                }
            }
        } finally {
            if (interrupted) {
                Thread.currentThread().interrupt();
            }
        }
    }

    @Override
    public void close() {
        if (pool != null) {
            pool.shutdown();
        }
    }
}
