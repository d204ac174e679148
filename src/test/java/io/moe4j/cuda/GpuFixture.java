package io.moe4j.cuda;

import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;

/** A context and a stream as an engine would own them, for GPU tests. */
final class GpuFixture implements AutoCloseable {
    final Driver driver = Drivers.open();
    final Context context = new Context(driver, 0);
    final Stream stream = new Stream(context);
    final ParamArena arena = new ParamArena(context);

    long stream() {
        return stream.handle();
    }

    long freeBytes() {
        try (Scope scope = context.enter()) {
            driver.contextSynchronize();
            return driver.memGetInfo().free();
        }
    }

    KernelParams params(int bytes) {
        return arena.params(bytes);
    }

    @Override
    public void close() {
        arena.close();
        stream.close();
        context.close();
    }
}
