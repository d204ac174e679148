package io.moe4j.cuda.driver;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermission;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.locks.ReentrantLock;

/**
 * Native libraries of jars, extracted where only this process's user can write.
 *
 * <p>JCuda extracts its libraries to a fixed name in {@code java.io.tmpdir} and loads whatever file
 * of that name is there: another user could plant one, and processes that start together could load
 * one half written. So the libraries are extracted here first, into a directory of mode 0700 with
 * an unpredictable name, and JCuda's class is initialised while {@code java.io.tmpdir} points
 * there. JCuda then finds its file and loads it. Closing deletes the files; what is loaded stays
 * loaded.
 */
public final class PrivateNatives implements AutoCloseable {
    private static final Set<PosixFilePermission> OWNER_ONLY =
            PosixFilePermissions.fromString("rwx------");
    private static final ReentrantLock TMPDIR_LOCK = new ReentrantLock();

    private final Path directory;

    private PrivateNatives(Path directory) {
        this.directory = directory;
    }

    /**
     * {@return an empty directory of mode 0700}
     *
     * @throws IOException if none of the usual places can be written
     */
    public static PrivateNatives create() throws IOException {
        IOException failure = new IOException("no directory for native libraries can be written");
        for (Path base : bases()) {
            try {
                return createUnder(base);
            } catch (IOException | UnsupportedOperationException e) {
                failure.addSuppressed(e);
            }
        }
        throw failure;
    }

    /** An empty directory of mode 0700 under {@code base}. */
    static PrivateNatives createUnder(Path base) throws IOException {
        Path directory =
                Files.createTempDirectory(
                        base, "moe4j-", PosixFilePermissions.asFileAttribute(OWNER_ONLY));
        return new PrivateNatives(directory);
    }

    /** {@return where the libraries lie} */
    public Path directory() {
        return directory;
    }

    /**
     * Extracts a resource of the jar that {@code owner} comes from.
     *
     * @param owner a class of the jar
     * @param resource name of the resource
     * @param fileName name of the new file
     * @return the file, which nobody but the user can write
     * @throws IOException if there is no such resource
     */
    public Path extract(Class<?> owner, String resource, String fileName) throws IOException {
        Path file = directory.resolve(fileName);
        try (InputStream in = owner.getResourceAsStream(resource)) {
            if (in == null) {
                throw new IOException("no resource " + resource + " on the class path");
            }
            Files.copy(in, file);
        }
        Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("r-x------"));
        return file;
    }

    /**
     * Runs {@code action} while {@code java.io.tmpdir} points to this directory. The classes of the
     * JDK that remember the property are made to read it before, so they keep the real one.
     *
     * @param <T> type of the result
     * @param action what to run
     * @return what the action returned
     * @throws Exception what the action throws
     */
    public <T> T asTemporaryDirectory(Callable<T> action) throws Exception {
        TMPDIR_LOCK.lock();
        try {
            Files.delete(File.createTempFile("moe4j-", null).toPath());
            String before = System.getProperty("java.io.tmpdir");
            String jnaBefore = System.getProperty("jna.tmpdir");
            System.setProperty("java.io.tmpdir", directory.toString());
            System.setProperty("jna.tmpdir", directory.toString());
            try {
                return action.call();
            } finally {
                restore("java.io.tmpdir", before);
                restore("jna.tmpdir", jnaBefore);
            }
        } finally {
            TMPDIR_LOCK.unlock();
        }
    }

    /** Deletes the files and the directory as far as possible. */
    @Override
    public void close() {
        try (var files = Files.newDirectoryStream(directory)) {
            for (Path file : files) {
                Files.deleteIfExists(file);
            }
            Files.deleteIfExists(directory);
        } catch (IOException e) {
            System.getLogger("io.moe4j")
                    .log(System.Logger.Level.DEBUG, "left behind: " + directory, e);
        }
    }

    private static List<Path> bases() {
        List<Path> bases = new ArrayList<>();
        bases.add(Path.of(System.getProperty("java.io.tmpdir", "/tmp")));
        bases.add(Path.of(System.getProperty("user.home", ".")));
        bases.removeIf(base -> !Files.isDirectory(base));
        return bases;
    }

    private static void restore(String property, String value) {
        if (value == null) {
            System.clearProperty(property);
        } else {
            System.setProperty(property, value);
        }
    }
}
