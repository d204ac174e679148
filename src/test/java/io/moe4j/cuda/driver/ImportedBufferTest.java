package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.ep.Group;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.util.List;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.Test;

/** Ranks of one process that map the memory of another do so one after the other. */
class ImportedBufferTest {
    @Test
    void shouldMapAndUnmapOneAfterTheOther() {
        RecordingDriver recording = new RecordingDriver(1, 1L << 30);
        AtomicInteger inside = new AtomicInteger();
        AtomicInteger most = new AtomicInteger();
        AtomicInteger calls = new AtomicInteger();
        Driver slow =
                (Driver)
                        Proxy.newProxyInstance(
                                Driver.class.getClassLoader(),
                                new Class<?>[] {Driver.class},
                                (proxy, method, arguments) -> {
                                    boolean maps = method.getName().startsWith("ipc");
                                    if (maps) {
                                        calls.incrementAndGet();
                                        most.accumulateAndGet(inside.incrementAndGet(), Math::max);
                                        Thread.sleep(20);
                                    }
                                    try {
                                        return method.invoke(recording, arguments);
                                    } catch (InvocationTargetException e) {
                                        throw e.getCause();
                                    } finally {
                                        inside.addAndGet(maps ? -1 : 0);
                                    }
                                });
        Group.together(
                List.of(0, 1, 2),
                rank -> {
                    try (Context context = new Context(slow, 0)) {
                        byte[] key = new byte[64];
                        key[0] = (byte) (int) rank;
                        new ImportedBuffer(context, key).close();
                    }
                });
        assertThat(calls).hasValue(6);
        assertThat(most).as("threads that map or unmap at once").hasValue(1);
    }
}
