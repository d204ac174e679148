package io.moe4j.cuda.oracle;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.cuda.ChildJvm;
import io.moe4j.cuda.oracle.LibraryBridge.Library;
import io.moe4j.cuda.oracle.LibraryBridge.Way;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class LibraryBridgeTest {
    @TempDir Path folder;

    @Test
    void shouldForwardToTheNewerLibraries() throws Exception {
        assumeTrue(ChildJvm.hasCompiler(), "gcc is not installed");
        assumeTrue(
                LibraryBridge.class.getResource("/io/moe4j/natives/linux-x86_64/libcudnn.so.8")
                        != null,
                "the bridges were not built");
        stub("libcublasLt.so.13", "int cublasLtVersion(void) { return 13; }");
        stub(
                "libcublas.so.13",
                "int cublasCreate_v2(void** h) { *h = (void*)42; return 0; }\n"
                        + "int cublasGetVersion_v2(void* h, int* v)"
                        + " { *v = 130000; return h == (void*)42 ? 0 : 1; }\n");
        stub("libcudnn.so.9", "unsigned long cudnnGetVersion(void) { return 91500; }\n");

        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of("MOE4J_CUDA_LIBS", folder.toString()),
                        List.of(),
                        BridgeMain.class.getName());
        assertThat(result.output())
                .contains("libcublas.so.13, bridged from libcublas.so.12")
                .contains("libcudnn.so.9, bridged from libcudnn.so.8")
                .contains("cublasCreate 0", "cublasGetVersion 0", "cublas version 130000")
                .contains("cublas missing 15")
                .contains("cudnn version 91500", "cudnn missing 9")
                .contains("cudnn text NOT_SUPPORTED (missing in libcudnn.so.9)");
        assertThat(result.exit()).isZero();
    }

    @Test
    void shouldPreferTheVersionJCudaWasLinkedAgainst() throws Exception {
        Files.createFile(folder.resolve("libcublas.so.13"));
        Files.createFile(folder.resolve("libcublas.so.12"));
        var finding =
                LibraryBridge.find(Library.CUBLAS, Map.of("MOE4J_CUDA_LIBS", folder.toString()));
        assertThat(finding.way()).isEqualTo(Way.DIRECT);
        assertThat(finding.path()).isEqualTo(folder.resolve("libcublas.so.12"));
    }

    @Test
    void shouldSkipFoldersThatEverybodyCanWrite() throws Exception {
        Path open = Files.createDirectory(folder.resolve("open"));
        Files.setPosixFilePermissions(open, PosixFilePermissions.fromString("rwxrwxrwx"));
        assertThat(LibraryBridge.folders(Map.of("LD_LIBRARY_PATH", open.toString())))
                .doesNotContain(open);
        assertThat(LibraryBridge.folders(Map.of("MOE4J_CUDA_LIBS", open.toString())))
                .as("named on purpose")
                .startsWith(open);
    }

    @Test
    void shouldFindThePackagesOfPython() throws Exception {
        Path lib =
                Files.createDirectories(
                        folder.resolve("lib/python3.12/site-packages/nvidia/cudnn/lib"));
        Files.createFile(lib.resolve("libcudnn.so.8"));
        assertThat(LibraryBridge.folders(Map.of("VIRTUAL_ENV", folder.toString()))).contains(lib);
    }

    private void stub(String name, String source) throws Exception {
        Path file = folder.resolve(name + ".c");
        Files.writeString(file, source);
        ChildJvm.compileLibrary(file, folder.resolve(name));
    }
}
