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
    void shouldBenchOnTheCpuWithoutTheGpuLibraries() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        ChildJvm.classPathWithout("jcuda", "jcublas", "jcudnn", "jna"),
                        Map.of(),
                        List.of(),
                        "io.moe4j.cli.Main",
                        "bench",
                        "experts",
                        "--experts=4",
                        "--top-k=2",
                        "--hidden=64",
                        "--intermediate=32",
                        "--tokens=2",
                        "--backend=cpu",
                        "--sample-ms=1",
                        "--output=csv");
        assertThat(result.output()).contains("experts,0,custom,64,32,4,2,1,2,uniform,ch,cpu,");
        assertThat(result.exit()).isZero();
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
