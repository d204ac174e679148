package io.moe4j.cuda;

import io.moe4j.MoeLayerContract;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;

/** The laws every backend keeps, on a GPU. */
@EnabledIfCuda
class CudaLayerGpuTest extends MoeLayerContract {
    private static GpuFixture gpu;

    @BeforeAll
    static void open() {
        gpu = new GpuFixture();
    }

    @AfterAll
    static void close() {
        gpu.close();
    }

    @Override
    protected String backend() {
        return "cuda";
    }

    @Override
    protected long stream() {
        return gpu.stream();
    }
}
