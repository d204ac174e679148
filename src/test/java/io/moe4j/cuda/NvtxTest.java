package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.cuda.kernel.KernelCatalog;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/**
 * NVTX ranges as a profiler gets them, from a library made of {@code src/test/native/fake_nvtx.c}.
 * Where a CUDA toolkit is installed it is compiled against NVTX's own header, so that our numbers
 * and structs are compared with the real ones. Needs gcc, no GPU.
 */
class NvtxTest {
    private static final Path SOURCE = Path.of("src/test/native/fake_nvtx.c");
    private static final Path HEADERS = Path.of("/usr/local/cuda/include");
    private static final String ON = "-Dmoe4j.nvtx=true";
    @TempDir static Path directory;

    @BeforeAll
    static void needsACompiler() {
        assumeTrue(Files.exists(SOURCE), "the sources are not here");
        assumeTrue(ChildJvm.hasCompiler(), "gcc is not installed");
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
    }

    private static ChildJvm.Result run(Map<String, String> environment, String... jvm)
            throws Exception {
        ChildJvm.Result result = ChildJvm.run(environment, List.of(jvm), NvtxMain.class.getName());
        assertThat(result.exit()).as(result.output()).isZero();
        return result;
    }

    private static void shouldSeeTheLayer(List<String> log, String first) {
        assertThat(log)
                .containsExactly(
                        first,
                        "push moe4j: prepare, layer 2",
                        "pop",
                        "push moe4j: step, layer 2",
                        "pop",
                        "push moe4j: capture, layer 2",
                        "pop",
                        "push moe4j: replay, layer 2",
                        "pop");
    }

    @Test
    void shouldMakeRangesThroughTheLibraryThatAProfilerNames() throws Exception {
        List<String> options = new ArrayList<>();
        if (Files.exists(HEADERS.resolve("nvtx3/nvToolsExt.h"))) {
            options.addAll(List.of("-DNVTX_HEADER", "-I" + HEADERS));
        }
        Path library = directory.resolve("libfake_nvtx.so");
        ChildJvm.compileLibrary(SOURCE, library, options.toArray(String[]::new));
        Path log = directory.resolve("injected.log");
        ChildJvm.Result result =
                run(
                        Map.of(
                                "NVTX_INJECTION64_PATH",
                                library.toString(),
                                "FAKE_NVTX_LOG",
                                log.toString()),
                        ON);
        assertThat(result.output())
                .contains("NVTX ranges through " + library, "ran on a RangedLayer");
        shouldSeeTheLayer(Files.readAllLines(log), "attached");

        ChildJvm.Result counted =
                ChildJvm.run(
                        Map.of("NVTX_INJECTION64_PATH", library.toString()),
                        List.of(ON),
                        NvtxMain.class.getName(),
                        "count");
        assertThat(counted.output()).contains("bytes 0\n");
    }

    @Test
    void shouldMakeRangesThroughTheLibraryOfOlderToolkits() throws Exception {
        Path folder = Files.createDirectory(directory.resolve("older"));
        ChildJvm.compileLibrary(SOURCE, folder.resolve("libnvToolsExt.so.1"), "-DNVTX_TOOLS_EXT");
        Path log = directory.resolve("exported.log");
        ChildJvm.Result result =
                run(
                        Map.of(
                                "LD_LIBRARY_PATH",
                                folder.toString(),
                                "FAKE_NVTX_LOG",
                                log.toString()),
                        ON);
        assertThat(result.output()).contains("NVTX ranges through libnvToolsExt.so.1");
        shouldSeeTheLayer(Files.readAllLines(log), "exported");
    }

    @Test
    void shouldSayOnceThatThereIsNoProfilerAndGoOn() throws Exception {
        assumeTrue(
                !Files.exists(Path.of("/usr/local/cuda/lib64/libnvToolsExt.so.1")),
                "an older toolkit is installed");
        ChildJvm.Result result = run(Map.of(), ON);
        assertThat(result.output()).contains("ran on a CudaLayer");
        assertThat(result.output().lines().filter(line -> line.contains("no NVTX ranges")))
                .hasSize(1);
        ChildJvm.Result broken =
                run(Map.of("NVTX_INJECTION64_PATH", directory + "/nothing.so"), ON);
        assertThat(broken.output())
                .contains("no NVTX ranges: " + directory + "/nothing.so")
                .contains("ran on a CudaLayer");
    }

    @Test
    void shouldLoadNothingOfNvtxUnlessAskedFor() throws Exception {
        ChildJvm.Result result = run(Map.of(), "-Xlog:class+load");
        assertThat(result.output())
                .contains("ran on a CudaLayer")
                .doesNotContain("Nvtx$Bridge")
                .doesNotContain("NVTX ranges");
    }
}
