package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;

/** A program that stays on the CPU backend needs no GPU library, neither loaded nor present. */
class CpuUseLoadsNoJCudaTest {

    @Test
    void shouldLoadNoGpuClassOnTheCpuBackend() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(Map.of(), List.of("-Xlog:class+load"), OnCpu.class.getName());
        assertThat(result.output()).contains("computed on cpu");
        assertThat(result.output().lines().filter(line -> line.contains("[class,load]")))
                .as("the log works")
                .anyMatch(line -> line.contains("io.moe4j.cpu."))
                .noneMatch(line -> line.contains(" jcuda.") || line.contains(" com.sun.jna."));
    }

    @Test
    void shouldRunWithoutTheGpuLibraries() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        ChildJvm.classPathWithout("jcuda", "jcublas", "jcudnn", "jna"),
                        Map.of(),
                        List.of(),
                        OnCpu.class.getName());
        assertThat(result.output()).contains("computed on cpu");
        assertThat(result.exit()).isZero();
    }
}
