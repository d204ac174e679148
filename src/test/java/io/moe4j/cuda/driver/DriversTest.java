package io.moe4j.cuda.driver;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.BackendUnavailableException;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class DriversTest {
    @Test
    void shouldAlwaysAnswerWithAReason() {
        var first = Drivers.availability();
        var second = Drivers.availability();
        assertThat(first.reason()).isNotBlank().doesNotContain("\n");
        assertThat(second.reason()).as("a failure does not stick").isEqualTo(first.reason());
        if (!first.usable()) {
            assertThatThrownBy(Drivers::open)
                    .isInstanceOf(BackendUnavailableException.class)
                    .hasMessage(first.reason());
        }
    }

    @Test
    void shouldNameThePlatformItNeeds() {
        assertThatThrownBy(() -> Drivers.requirePlatform("Windows 11", "amd64"))
                .hasMessageContaining("Linux x86_64 only, this is Windows 11 amd64");
        assertThatThrownBy(() -> Drivers.requirePlatform("Linux", "aarch64"))
                .hasMessageContaining("aarch64");
        Drivers.requirePlatform("Linux", "amd64");
    }

    @Test
    void shouldExtractWhereOnlyTheOwnerCanWrite(@TempDir Path base) throws Exception {
        Path directory;
        try (PrivateNatives natives = PrivateNatives.createUnder(base);
                PrivateNatives other = PrivateNatives.createUnder(base)) {
            directory = natives.directory();
            assertThat(other.directory()).isNotEqualTo(directory);
            assertThat(PosixFilePermissions.toString(Files.getPosixFilePermissions(directory)))
                    .isEqualTo("rwx------");
            Path file =
                    natives.extract(
                            DriversTest.class,
                            "/" + DriversTest.class.getName().replace('.', '/') + ".class",
                            "a.so");
            assertThat(PosixFilePermissions.toString(Files.getPosixFilePermissions(file)))
                    .isEqualTo("r-x------");
            assertThatThrownBy(() -> natives.extract(DriversTest.class, "/missing.so", "b.so"))
                    .isInstanceOf(IOException.class)
                    .hasMessageContaining("/missing.so");
            String before = System.getProperty("java.io.tmpdir");
            String inside =
                    natives.asTemporaryDirectory(() -> System.getProperty("java.io.tmpdir"));
            assertThat(inside).isEqualTo(directory.toString());
            assertThat(System.getProperty("java.io.tmpdir")).isEqualTo(before);
        }
        assertThat(directory).doesNotExist();
    }
}
