package io.moe4j.observe;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cuda.ChildJvm;
import io.moe4j.cuda.OnCpu;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import jdk.jfr.FlightRecorder;
import jdk.jfr.consumer.RecordingFile;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** A JVM made by jlink may lack jdk.jfr; a program that never records should not pay for it. */
class WithoutFlightRecorderTest {
    @TempDir Path directory;

    @Test
    void shouldRunInAJvmOfTheBaseModuleAlone() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of(),
                        List.of("--limit-modules=java.base", "-Xlog:class+load"),
                        OnCpu.class.getName());
        assertThat(result.output()).contains("computed on cpu");
        assertThat(result.exit()).isZero();
        assertThat(result.output())
                .contains("io.moe4j.observe.Events$None")
                .doesNotContain("io.moe4j.observe.JfrEvents")
                .doesNotContain("jdk.jfr.");
    }

    /** Runs a layer and says whether the recorder was started. */
    public static final class Main {
        private Main() {}

        /** Needs no arguments. */
        public static void main(String[] args) {
            OnCpu.main(args);
            System.out.println("recorder started: " + FlightRecorder.isInitialized());
        }
    }

    @Test
    void shouldNotStartTheRecorderByItself() throws Exception {
        ChildJvm.Result result = ChildJvm.run(Map.of(), List.of(), Main.class.getName());
        assertThat(result.output()).contains("recorder started: false");
    }

    @Test
    void shouldBeRecordedFromTheCommandLine() throws Exception {
        Path file = directory.resolve("run.jfr");
        ChildJvm.Result result =
                ChildJvm.run(
                        Map.of(),
                        List.of("-XX:StartFlightRecording:filename=" + file),
                        Main.class.getName());
        assertThat(result.output()).contains("recorder started: true");
        assertThat(RecordingFile.readAllEvents(file))
                .extracting(event -> event.getEventType().getName())
                .contains("moe4j.LayerOpen", "moe4j.LayerPrepare", "moe4j.Counters");
    }

    @Test
    void shouldWorkWithoutMicrometer() throws Exception {
        ChildJvm.Result result =
                ChildJvm.run(
                        ChildJvm.classPathWithout("micrometer"),
                        Map.of(),
                        List.of(),
                        OnCpu.class.getName());
        assertThat(result.output()).contains("computed on cpu");
    }
}
