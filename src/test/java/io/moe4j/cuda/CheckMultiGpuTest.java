package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.GoldenFolders;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;

/**
 * Every golden folder on two GPUs, by threads and by processes: the bounds of one GPU, and no bit
 * that differs from two virtual ranks on one GPU.
 */
@EnabledIfCuda(devices = 2)
class CheckMultiGpuTest {
    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithGoldenOutputAndVirtualRanksByThreads(String name) {
        check(name, "--gpus", "2");
    }

    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithGoldenOutputAndVirtualRanksByProcesses(String name) {
        check(name, "--gpus", "2", "--processes");
    }

    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithGoldenOutputAndVirtualRanksWhereTwoRanksShareEachGpu(String name) {
        check(name, "--gpus", "2", "--ranks", "4");
    }

    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithGoldenOutputAndVirtualRanksByProcessesOfTwoRanks(String name) {
        check(name, "--gpus", "2", "--ranks", "4", "--processes");
    }

    private static void check(String name, String... more) {
        assertThat(CheckRun.of(GoldenFolders.of(name), more))
                .contains("OK: ")
                .doesNotContain("MISMATCH");
    }
}
