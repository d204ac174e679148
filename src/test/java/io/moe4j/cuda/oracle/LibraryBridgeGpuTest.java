package io.moe4j.cuda.oracle;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.cuda.EnabledIfCuda;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.oracle.LibraryBridge.Finding;
import io.moe4j.cuda.oracle.LibraryBridge.Library;
import io.moe4j.cuda.oracle.LibraryBridge.Way;
import jcuda.jcublas.JCublas2;
import jcuda.jcublas.cublasHandle;
import jcuda.jcudnn.JCudnn;
import jcuda.jcudnn.cudnnHandle;
import org.junit.jupiter.api.Test;

/** The installed cuBLAS and cuDNN open through JCuda, whatever their version. */
@EnabledIfCuda
class LibraryBridgeGpuTest {
    @Test
    void shouldOpenCublas() {
        Finding finding = LibraryBridge.find(Library.CUBLAS);
        assumeTrue(finding.way() != Way.MISSING, finding.line());
        LibraryBridge.load(Library.CUBLAS);
        try (Context context = new Context(Drivers.open(), 0);
                Scope scope = context.enter()) {
            cublasHandle handle = new cublasHandle();
            int[] version = new int[1];
            assertThat(JCublas2.cublasCreate(handle)).isZero();
            assertThat(JCublas2.cublasGetVersion(handle, version)).isZero();
            assertThat(version[0]).isGreaterThanOrEqualTo(120_000);
            assertThat(JCublas2.cublasDestroy(handle)).isZero();
        }
    }

    @Test
    void shouldOpenCudnn() {
        Finding finding = LibraryBridge.find(Library.CUDNN);
        assumeTrue(finding.way() != Way.MISSING, finding.line());
        LibraryBridge.load(Library.CUDNN);
        try (Context context = new Context(Drivers.open(), 0);
                Scope scope = context.enter()) {
            cudnnHandle handle = new cudnnHandle();
            assertThat(JCudnn.cudnnGetVersion()).isGreaterThanOrEqualTo(8000);
            assertThat(JCudnn.cudnnCreate(handle)).isZero();
            assertThat(JCudnn.cudnnDestroy(handle)).isZero();
        }
    }
}
