package io.moe4j;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;

/** The recorded checkpoints of the test data; {@code moe4j.golden} names another place. */
public final class GoldenFolders {
    private static final Path ALL =
            Path.of(System.getProperty("moe4j.golden", "src/test/resources/golden"));

    private GoldenFolders() {}

    /** One of them. */
    public static Path of(String name) {
        return ALL.resolve(name);
    }

    /** Names of all, for {@code @MethodSource}. */
    public static List<String> names() {
        try (Stream<Path> folders = Files.list(ALL)) {
            return folders.map(folder -> folder.getFileName().toString()).sorted().toList();
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }
}
