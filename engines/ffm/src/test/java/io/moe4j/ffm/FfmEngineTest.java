package io.moe4j.ffm;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.cuda.ChildJvm;
import io.moe4j.engines.EngineSmoke;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The engine of the contract's GPU tests makes the right calls; needs gcc, no GPU. */
class FfmEngineTest {
    @TempDir static Path directory;

    @Test
    void shouldRunAnEngineInPlainFfm() throws Exception {
        assumeTrue(ChildJvm.hasCompiler(), "gcc is not installed");
        Path fake = directory.resolve("libfakecuda.so");
        ChildJvm.compileLibrary(Path.of("../../src/test/native/fake_libcuda.c"), fake);
        try (FfmEngine engine = FfmEngine.open(fake)) {
            EngineSmoke.run(engine);
            assertThat(engine.context()).isNotZero();
            long memory = engine.allocate(16);
            engine.write(memory, ByteBuffer.allocateDirect(16));
            engine.free(memory);
        }
    }
}
