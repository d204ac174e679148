package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.file.Path;
import java.util.List;
import org.assertj.core.data.Percentage;
import org.junit.jupiter.api.Test;

class CostTest {
    private static final Path CASES = Path.of("bench/cases.json");

    @Test
    void shouldReproduceEveryFloorOfTheCaseFile() throws IOException {
        var floors = CaseFile.floors(CASES);
        int compared = 0;
        for (BenchCase benchCase : CaseFile.read(CASES)) {
            for (Stage stage : List.of(Stage.G1, Stage.G2, Stage.CHAIN)) {
                Cost cost =
                        Cost.experts(
                                stage,
                                benchCase.hidden(),
                                benchCase.intermediate(),
                                benchCase.rows(),
                                benchCase.hitExperts());
                double stated = floors.get(benchCase.number()).get("bf16").get(stage.id());
                assertThat(cost.floorUs())
                        .as("case %d %s", benchCase.number(), stage)
                        .isCloseTo(stated, Percentage.withPercentage(1));
                compared++;
            }
        }
        assertThat(compared).isEqualTo(30);
    }

    @Test
    void shouldBeBoundByComputeWithManyRows() {
        Cost cost = Cost.experts(Stage.CHAIN, 4096, 1536, 100_000, 8);
        assertThat(cost.floorUs()).isEqualTo(1e6 * cost.flops() / Cost.FLOOR_FLOPS_PER_S);
        assertThat(cost.flops()).isEqualTo(2.0 * 100_000 * 3 * 4096 * 1536);
        assertThat(cost.weightBytes()).isEqualTo(2.0 * 8 * 3 * 4096 * 1536);
    }

    @Test
    void shouldRefuseStagesThatAreNotOfTheExperts() {
        assertThatThrownBy(() -> Cost.experts(Stage.STEP, 1, 1, 1, 1)).hasMessageContaining("STEP");
    }
}
