package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.cuda.ChildJvm;
import io.moe4j.engines.EngineSmoke;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/**
 * The real way through JCuda and JNA, against a libcuda built here from {@code
 * src/test/native/fake_libcuda.c}. Needs gcc, no GPU.
 */
class NativeDriverFakeTest {
    @TempDir static Path directory;

    @BeforeAll
    static void buildFakeDriver() throws Exception {
        Path source = Path.of("src/test/native/fake_libcuda.c");
        assumeTrue(Files.exists(source), "the sources are not here");
        assumeTrue(ChildJvm.hasCompiler(), "gcc is not installed");
        ChildJvm.compileLibrary(source, directory.resolve("libcuda.so.1"));
    }

    @Test
    void shouldRunEveryCallThroughJCuda() throws Exception {
        Path tmp = Files.createDirectory(directory.resolve("tmp"));
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of("LD_LIBRARY_PATH", directory.toString()),
                        List.of("-Djava.io.tmpdir=" + tmp),
                        FakeCudaMain.class.getName());
        assertThat(result.output()).contains("2 × Fake GPU 0", "compute capability 9.0", "OK");
        assertThat(result.exit()).isZero();
        try (var left = Files.list(tmp)) {
            assertThat(left).as("nothing stays in java.io.tmpdir").isEmpty();
        }
    }

    /** The engine of the contract's GPU tests makes its own calls. */
    @Test
    void shouldRunAnEngineInPlainJCuda() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of("LD_LIBRARY_PATH", directory.toString()),
                        List.of(),
                        EngineSmoke.class.getName());
        assertThat(result.output()).contains("OK");
        assertThat(result.exit()).isZero();
    }

    @Test
    void shouldSayWhyThereIsNoDevice() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of("LD_LIBRARY_PATH", directory.toString(), "FAKE_CUDA_INIT", "100"),
                        List.of(),
                        FakeCudaMain.class.getName());
        assertThat(result.output())
                .contains("usable=false", "CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES");
        assertThat(result.exit()).isZero();
    }

    @Test
    void shouldNameTheStubLibrary() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of("LD_LIBRARY_PATH", directory.toString(), "FAKE_CUDA_INIT", "34"),
                        List.of(),
                        FakeCudaMain.class.getName());
        assertThat(result.output()).contains("stubs folder");
    }

    @Test
    void shouldLaunchOrdinarilyWithoutJna() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        ChildJvm.classPathWithout("jna"),
                        Map.of("LD_LIBRARY_PATH", directory.toString()),
                        List.of(),
                        FakeCudaMain.class.getName());
        assertThat(result.output())
                .contains("ordinary launches: JNA is not on the class path")
                .contains("usable=true");
    }

    @Test
    void shouldSayThatJCudaIsMissing() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        ChildJvm.classPathWithout("jcuda"),
                        Map.of("LD_LIBRARY_PATH", directory.toString()),
                        List.of(),
                        FakeCudaMain.class.getName());
        assertThat(result.output()).contains("usable=false", "add org.jcuda:jcuda:12.6.0");
        assertThat(result.exit()).isZero();
    }
}
