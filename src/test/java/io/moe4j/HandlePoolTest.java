package io.moe4j;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.Test;

class HandlePoolTest {
    @Test
    void shouldHandOutTheLowestFreeHandleAndRefuseWhenAllAreClaimed() {
        HandlePool pool = new HandlePool(2);
        HandlePool.Handle first = pool.claim();
        HandlePool.Handle second = pool.claim();
        assertThat(first.index()).isZero();
        assertThat(second.index()).isEqualTo(1);
        assertThat(pool.tryClaim()).isEmpty();
        assertThatThrownBy(pool::claim)
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("all 2 handles are claimed");
        first.close();
        first.close();
        assertThat(pool.free()).isEqualTo(1);
        assertThat(pool.claim().index()).isZero();
    }

    @Test
    void shouldNeverGiveOneHandleToTwoThreads() throws Exception {
        HandlePool pool = new HandlePool(3);
        ConcurrentHashMap<Integer, AtomicInteger> users = new ConcurrentHashMap<>();
        AtomicInteger clashes = new AtomicInteger();
        var threads = Executors.newFixedThreadPool(4);
        for (int t = 0; t < 4; t++) {
            threads.submit(
                    () -> {
                        for (int i = 0; i < 20_000; i++) {
                            pool.tryClaim()
                                    .ifPresent(
                                            handle -> {
                                                AtomicInteger user =
                                                        users.computeIfAbsent(
                                                                handle.index(),
                                                                k -> new AtomicInteger());
                                                if (user.incrementAndGet() != 1) {
                                                    clashes.incrementAndGet();
                                                }
                                                user.decrementAndGet();
                                                handle.close();
                                            });
                        }
                    });
        }
        threads.shutdown();
        assertThat(threads.awaitTermination(30, TimeUnit.SECONDS)).isTrue();
        assertThat(clashes).hasValue(0);
        assertThat(pool.free()).isEqualTo(3);
    }
}
