package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The protocol between ranks, model-checked with Spin: see {@code docs/protocol.md}. */
class ProtocolModelTest {
    private static final Path RUNNER = Path.of("src/test/promela/run.sh");

    @TempDir Path directory;

    @Test
    void shouldProveEveryModelAndRefuteEveryMutant() throws Exception {
        assumeTrue(Files.exists(RUNNER), "the sources are not here");
        assumeTrue(isOnPath("spin"), "spin is not installed");
        assumeTrue(isOnPath("gcc"), "gcc is not installed");
        Path output = directory.resolve("output");
        Process run =
                new ProcessBuilder("sh", RUNNER.toString())
                        .redirectErrorStream(true)
                        .redirectOutput(output.toFile())
                        .start();
        try {
            boolean ended = run.waitFor(15, TimeUnit.MINUTES);
            String table = Files.readString(output);
            System.out.println(table);
            assertThat(ended).as(table).isTrue();
            assertThat(run.exitValue()).as(table).isZero();
        } finally {
            run.destroy();
        }
    }

    private static boolean isOnPath(String program) {
        return Arrays.stream(System.getenv("PATH").split(File.pathSeparator))
                .anyMatch(folder -> Files.isExecutable(Path.of(folder, program)));
    }
}
