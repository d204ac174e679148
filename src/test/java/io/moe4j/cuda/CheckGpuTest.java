package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.GoldenFolders;
import io.moe4j.HostSyncCheckedLayer;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.weights.TinyCheckpoints;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The checker on CUDA: golden folders and generated checkpoints of every family, R = 1 to 8. */
@EnabledIfCuda
class CheckGpuTest {
    @TempDir Path folder;

    @ParameterizedTest
    @MethodSource("io.moe4j.GoldenFolders#names")
    void shouldAgreeWithGoldenOutput(String name) {
        check(GoldenFolders.of(name));
    }

    @ParameterizedTest
    @ValueSource(
            strings = {
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "olmoe",
                "deepseek_v3",
                "kimi_k2",
                "glm4_moe",
                "gpt_oss"
            })
    void shouldAgreeWithTheOracleOnGeneratedCheckpoints(String family) throws Exception {
        TinyCheckpoints.write(folder, family, TinyCheckpoints.Options.defaults(), 77);
        check(folder);
    }

    @ParameterizedTest
    @ValueSource(strings = {"qwen2_moe", "qwen3_moe_fp8", "deepseek_v3", "gpt_oss"})
    void shouldFindNoDifferingStageAndNoHostSync(String name) {
        String out = check(GoldenFolders.of(name), "--debug-sync", "--host-sync");
        assertThat(out)
                .contains("cuda: all ", " stages agree", "cuda: no host sync in 3 steps")
                .doesNotContain("MISMATCH");
    }

    @Test
    void shouldCheckEveryLayerOfAnApplicationThatAsksForItByProperty() {
        System.setProperty("moe4j.cuda.checked", "true");
        try {
            check(GoldenFolders.of("mixtral"));
            MoeConfig config =
                    MoeConfig.builder()
                            .weights(RandomWeights.of(MoeShape.of(64, 48, 12, 4), 1))
                            .backend("cuda")
                            .build();
            try (MoeLayer layer = Moe.open(config)) {
                assertThat(layer).isInstanceOf(HostSyncCheckedLayer.class);
            }
        } finally {
            System.clearProperty("moe4j.cuda.checked");
        }
    }

    private static String check(Path checkpoint, String... more) {
        List<String> arguments =
                new ArrayList<>(List.of("--backend", "cuda", "--ranks", "1,2,4,8"));
        arguments.addAll(List.of(more));
        return CheckRun.of(checkpoint, arguments.toArray(String[]::new));
    }
}
