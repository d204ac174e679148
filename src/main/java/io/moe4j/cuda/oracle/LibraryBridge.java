package io.moe4j.cuda.oracle;

import io.moe4j.BackendUnavailableException;
import io.moe4j.cuda.driver.PrivateNatives;
import java.io.File;
import java.io.IOException;
import java.nio.file.DirectoryStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermission;
import java.util.ArrayList;
import java.util.EnumSet;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.locks.ReentrantLock;

/**
 * Finds cuBLAS and cuDNN and loads JCuda's bindings for them. The bindings were linked against
 * {@code libcublas.so.12} and {@code libcudnn.so.8}; where only {@code .13} and {@code .9} are
 * installed, a forwarding library from our jar stands in for the old name. A function that the
 * newer library no longer has returns "not supported".
 *
 * <p>Searched are the folders of {@code MOE4J_CUDA_LIBS}, {@code LD_LIBRARY_PATH}, the usual
 * folders of CUDA and of the system, and the {@code nvidia} packages of Python. Folders that
 * everybody can write are skipped unless {@code MOE4J_CUDA_LIBS} names them.
 */
public final class LibraryBridge {
    /** A library, its name in JCuda's bindings and its successor. */
    public enum Library {
        /** cuBLAS, for JCublas2. */
        CUBLAS(
                "cuBLAS",
                "libcublas.so.12",
                "libcublas.so.13",
                List.of("libcublasLt.so.12"),
                List.of("libcublasLt.so.13"),
                "jcuda.jcublas.JCublas2",
                "JCublas2",
                null),
        /** cuDNN, for JCudnn; its binding 11.7.0 is the newest there is. */
        CUDNN(
                "cuDNN",
                "libcudnn.so.8",
                "libcudnn.so.9",
                List.of(),
                List.of(),
                "jcuda.jcudnn.JCudnn",
                "JCudnn",
                "11.7.0");

        private final String title;
        private final String boundName;
        private final String newerName;
        private final List<String> boundNeeds;
        private final List<String> newerNeeds;
        private final String bindingClass;
        private final String bindingName;
        private final String bindingVersion;

        Library(
                String title,
                String boundName,
                String newerName,
                List<String> boundNeeds,
                List<String> newerNeeds,
                String bindingClass,
                String bindingName,
                String bindingVersion) {
            this.title = title;
            this.boundName = boundName;
            this.newerName = newerName;
            this.boundNeeds = boundNeeds;
            this.newerNeeds = newerNeeds;
            this.bindingClass = bindingClass;
            this.bindingName = bindingName;
            this.bindingVersion = bindingVersion;
        }
    }

    /** How a library would be reached. */
    public enum Way {
        /** The version JCuda was linked against is installed. */
        DIRECT,
        /** The newer version is installed; our forwarding library stands between. */
        BRIDGED,
        /** It cannot be used. */
        MISSING
    }

    /**
     * What was found.
     *
     * @param library the library
     * @param way how it would be reached
     * @param path where it is, or null
     * @param line one line for people
     */
    public record Finding(Library library, Way way, Path path, String line) {}

    private static final String BRIDGES = "/io/moe4j/natives/linux-x86_64/";
    private static final ReentrantLock LOCK = new ReentrantLock();
    private static final Set<Library> LOADED = EnumSet.noneOf(Library.class);

    private LibraryBridge() {}

    /**
     * Looks for a library; loads nothing and needs no JCuda.
     *
     * @param library which library
     * @return what was found, or why not
     */
    public static Finding find(Library library) {
        return find(library, System.getenv());
    }

    /** {@return what was found for every library: one line each, for {@code moe4j info}} */
    public static List<String> statusLines() {
        List<String> lines = new ArrayList<>();
        for (Library library : Library.values()) {
            lines.add(find(library).line());
        }
        return lines;
    }

    /**
     * Loads a library and JCuda's binding for it, so that the binding's class can be used.
     * Idempotent.
     *
     * @param library which library
     * @return what was found, or why not
     * @throws BackendUnavailableException saying what is missing
     */
    public static Finding load(Library library) {
        Finding finding = find(library);
        if (finding.way() == Way.MISSING) {
            throw new BackendUnavailableException(finding.line());
        }
        LOCK.lock();
        try {
            if (!LOADED.contains(library)) {
                load(finding);
                LOADED.add(library);
            }
            return finding;
        } catch (ClassNotFoundException e) {
            throw unavailable(
                    library.bindingClass
                            + " is not on the class path: add org.jcuda:jcublas:12.6.0 and"
                            + " org.jcuda:jcudnn:11.7.0 with their natives",
                    e);
        } catch (Exception | LinkageError e) {
            throw unavailable(library.title + " could not be loaded: " + firstLine(e), e);
        } finally {
            LOCK.unlock();
        }
    }

    private static void load(Finding finding) throws Exception {
        Library library = finding.library();
        ClassLoader loader = LibraryBridge.class.getClassLoader();
        Class<?> binding = Class.forName(library.bindingClass, false, loader);
        boolean direct = finding.way() == Way.DIRECT;
        // why: each by its path and in order of need; the loader then matches the names inside the
        // next library with what is already there, so no LD_LIBRARY_PATH is needed
        for (String needed : direct ? library.boundNeeds : library.newerNeeds) {
            Path path = finding.path().resolveSibling(needed);
            if (Files.exists(path)) {
                System.load(path.toString());
            }
        }
        System.load(finding.path().toString());
        try (PrivateNatives natives = PrivateNatives.create()) {
            if (!direct) {
                System.load(
                        natives.extract(
                                        LibraryBridge.class,
                                        BRIDGES + library.boundName,
                                        library.boundName)
                                .toString());
            }
            String jcuda = jcudaVersion(loader);
            String version = library.bindingVersion == null ? jcuda : library.bindingVersion;
            // why: JCuda looks for its own version in the name, also for JCudnn 11.7.0
            natives.extract(
                    binding, "/lib/" + fileName(library, version), fileName(library, jcuda));
            natives.asTemporaryDirectory(() -> Class.forName(library.bindingClass, true, loader));
        }
    }

    static Finding find(Library library, Map<String, String> environment) {
        List<Path> folders = folders(environment);
        for (Path folder : folders) {
            Path path = folder.resolve(library.boundName);
            if (Files.isRegularFile(path)) {
                return new Finding(
                        library, Way.DIRECT, path, library.title + ": " + path + ", used directly");
            }
        }
        for (Path folder : folders) {
            Path path = folder.resolve(library.newerName);
            if (Files.isRegularFile(path)) {
                return bridged(library, path);
            }
        }
        return new Finding(
                library,
                Way.MISSING,
                null,
                library.title
                        + ": not found ("
                        + library.newerName
                        + " or "
                        + library.boundName
                        + "): set MOE4J_CUDA_LIBS to the folder that has it");
    }

    private static Finding bridged(Library library, Path path) {
        if (LibraryBridge.class.getResource(BRIDGES + library.boundName) == null) {
            return new Finding(
                    library,
                    Way.MISSING,
                    path,
                    library.title
                            + ": "
                            + path
                            + " found, but this build has no bridge from "
                            + library.boundName
                            + ": build on a machine with gcc, or install "
                            + library.boundName);
        }
        return new Finding(
                library,
                Way.BRIDGED,
                path,
                library.title + ": " + path + ", bridged from " + library.boundName);
    }

    /** Where to look, in order, without folders that everybody can write. */
    static List<Path> folders(Map<String, String> environment) {
        Set<Path> folders = new LinkedHashSet<>();
        addAll(folders, environment.get("MOE4J_CUDA_LIBS"), false);
        addAll(folders, environment.get("LD_LIBRARY_PATH"), true);
        for (String usual :
                List.of(
                        "/usr/local/cuda/lib64",
                        "/usr/local/cuda/targets/x86_64-linux/lib",
                        "/opt/cuda/lib64",
                        "/usr/lib/x86_64-linux-gnu",
                        "/usr/lib64",
                        "/lib/x86_64-linux-gnu")) {
            addFolder(folders, Path.of(usual), true);
        }
        for (String root : List.of("VIRTUAL_ENV", "CONDA_PREFIX")) {
            if (environment.get(root) != null) {
                addFolder(folders, Path.of(environment.get(root), "lib"), true);
                addPythonPackages(folders, Path.of(environment.get(root), "lib"));
            }
        }
        addPythonPackages(folders, Path.of("/usr/local/lib"));
        addPythonPackages(folders, Path.of("/usr/lib"));
        python(environment).ifPresent(lib -> addPythonPackages(folders, lib));
        return List.copyOf(folders);
    }

    private static java.util.Optional<Path> python(Map<String, String> environment) {
        for (String entry : environment.getOrDefault("PATH", "").split(File.pathSeparator)) {
            if (entry.isEmpty()) {
                continue;
            }
            Path python = Path.of(entry, "python3");
            if (Files.isExecutable(python)) {
                try {
                    Path bin = python.toRealPath().getParent();
                    return java.util.Optional.of(bin.resolveSibling("lib"));
                } catch (IOException e) {
                    return java.util.Optional.empty();
                }
            }
        }
        return java.util.Optional.empty();
    }

    /** The {@code nvidia/<package>/lib} folders of every Python under a lib folder. */
    private static void addPythonPackages(Set<Path> folders, Path lib) {
        for (Path python : children(lib, "python3*")) {
            for (String packages : List.of("site-packages", "dist-packages")) {
                for (Path nvidia : children(python.resolve(packages).resolve("nvidia"), "*")) {
                    addFolder(folders, nvidia.resolve("lib"), true);
                }
            }
        }
    }

    private static List<Path> children(Path folder, String glob) {
        List<Path> children = new ArrayList<>();
        if (Files.isDirectory(folder)) {
            try (DirectoryStream<Path> stream = Files.newDirectoryStream(folder, glob)) {
                stream.forEach(children::add);
            } catch (IOException | java.nio.file.DirectoryIteratorException e) {
                return List.of();
            }
        }
        children.sort(null);
        return children;
    }

    private static void addAll(Set<Path> folders, String pathList, boolean careful) {
        if (pathList != null) {
            for (String entry : pathList.split(File.pathSeparator)) {
                if (!entry.isEmpty()) {
                    addFolder(folders, Path.of(entry).toAbsolutePath(), careful);
                }
            }
        }
    }

    private static void addFolder(Set<Path> folders, Path folder, boolean careful) {
        if (Files.isDirectory(folder) && !(careful && everybodyCanWrite(folder))) {
            folders.add(folder);
        }
    }

    private static boolean everybodyCanWrite(Path folder) {
        try {
            return Files.getPosixFilePermissions(folder).contains(PosixFilePermission.OTHERS_WRITE);
        } catch (IOException | UnsupportedOperationException e) {
            return true;
        }
    }

    private static String fileName(Library library, String version) {
        return "lib" + library.bindingName + "-" + version + "-linux-x86_64.so";
    }

    private static String jcudaVersion(ClassLoader loader) throws ReflectiveOperationException {
        Class<?> version = Class.forName("jcuda.JCudaVersion", false, loader);
        return (String) version.getMethod("get").invoke(null);
    }

    private static BackendUnavailableException unavailable(String reason, Throwable cause) {
        BackendUnavailableException e = new BackendUnavailableException(reason);
        e.initCause(cause);
        return e;
    }

    private static String firstLine(Throwable t) {
        Throwable root =
                t instanceof ExceptionInInitializerError && t.getCause() != null ? t.getCause() : t;
        String message = root.getMessage() == null ? root.toString() : root.getMessage();
        return message.lines().findFirst().orElse(root.toString());
    }
}
