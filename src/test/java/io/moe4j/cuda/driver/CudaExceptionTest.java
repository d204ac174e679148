package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;

import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class CudaExceptionTest {
    @ParameterizedTest
    @CsvSource({
        "2, CUDA_ERROR_OUT_OF_MEMORY, maxTokensPerRank",
        "34, CUDA_ERROR_STUB_LIBRARY, stubs",
        "35, CUDA_ERROR_INSUFFICIENT_DRIVER, too old",
        "100, CUDA_ERROR_NO_DEVICE, nvidia-smi",
        "201, CUDA_ERROR_INVALID_CONTEXT, Driver.enter",
        "209, CUDA_ERROR_NO_BINARY_FOR_GPU, compute capability",
        "222, CUDA_ERROR_UNSUPPORTED_PTX_VERSION, newer toolkit",
        "700, CUDA_ERROR_ILLEGAL_ADDRESS, compute-sanitizer",
        "719, CUDA_ERROR_LAUNCH_FAILED, context is lost",
        "900, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, before the capture",
        "904, CUDA_ERROR_STREAM_CAPTURE_UNJOINED, forked stream",
        "906, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, CU_STREAM_NON_BLOCKING",
        "908, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, thread"
    })
    void shouldNameCallCodeAndCure(int code, String name, String cure) {
        CudaException e = new CudaException(Call.MEM_ALLOC, code, "42 bytes");
        assertThat(e.code()).isEqualTo(code);
        assertThat(e.name()).isEqualTo(name);
        assertThat(e.hint()).contains(cure);
        assertThat(e).hasMessageStartingWith("cuMemAlloc(42 bytes) failed: " + code + " " + name);
        assertThat(CudaErrors.code(name)).isEqualTo(code);
    }

    @Test
    void shouldTellLostContextsFromOtherFailures() {
        for (int code : new int[] {700, 702, 709, 710, 714, 715, 716, 717, 718, 719}) {
            assertThat(new CudaException(Call.LAUNCH_KERNEL, code, "").poisonsContext()).isTrue();
        }
        for (int code : new int[] {1, 2, 100, 600, 701, 704, 720, 900}) {
            assertThat(new CudaException(Call.LAUNCH_KERNEL, code, "").poisonsContext()).isFalse();
        }
    }

    @Test
    void shouldNameUnknownCodes() {
        assertThat(new CudaException(Call.INIT, 12345, "").getMessage())
                .isEqualTo("cuInit failed: 12345 CUresult 12345");
        assertThat(CudaErrors.code("no such name")).isEqualTo(CudaErrors.UNKNOWN);
        assertThat(CudaErrors.code(null)).isEqualTo(CudaErrors.UNKNOWN);
    }
}
