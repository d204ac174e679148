package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cuda.ChildJvm;
import io.moe4j.cuda.EnabledIfCuda;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;

/** In a fresh process the first output is there soon: machine code in the jar, nothing compiled. */
@EnabledIfCuda(computeCapability = 90)
class ColdStartGpuTest {
    private static final double MOST_MS = 1500;
    private static final String MARK = "cold start ms ";

    @Test
    void shouldGiveAFirstOutputWithinOneAndAHalfSeconds() throws Exception {
        ChildJvm.Result child =
                ChildJvm.run(
                        Map.of(),
                        List.of("-Xmx4g", "--enable-native-access=ALL-UNNAMED"),
                        Main.class.getName());
        assertThat(child.exit()).as(child.output()).isZero();
        String line =
                child.output().lines().filter(l -> l.startsWith(MARK)).findFirst().orElseThrow();
        double ms = Double.parseDouble(line.substring(MARK.length()));
        System.out.printf(
                "COLD first output of a fresh process after %.0f ms, at most %.0f%n", ms, MOST_MS);
        assertThat(ms).isLessThan(MOST_MS);
    }

    /** Runs in the child. */
    public static final class Main {
        private Main() {}

        public static void main(String[] args) {
            ColdStart cold = ColdStart.measure(1, 1);
            System.out.println(MARK + cold.us() / 1e3);
        }
    }
}
