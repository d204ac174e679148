package io.moe4j.cuda;

import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** Runs a main class in a fresh JVM, and a C compiler: what tests of native loading need. */
public final class ChildJvm {
    /**
     * How a process ended.
     *
     * @param exit its status
     * @param output both streams
     */
    public record Result(int exit, String output) {}

    private ChildJvm() {}

    /** Runs a main class with the class path of this JVM. */
    public static Result run(Map<String, String> environment, List<String> jvm, String... args)
            throws IOException, InterruptedException {
        return run(System.getProperty("java.class.path"), environment, jvm, args);
    }

    /** Runs a main class with the given class path. */
    public static Result run(
            String classPath, Map<String, String> environment, List<String> jvm, String... args)
            throws IOException, InterruptedException {
        List<String> command = new ArrayList<>();
        command.add(Path.of(System.getProperty("java.home"), "bin", "java").toString());
        command.add("-Xmx256m");
        command.addAll(jvm);
        command.add("-cp");
        command.add(classPath);
        command.addAll(List.of(args));
        return execute(command, environment);
    }

    /** Whether gcc can be run. */
    public static boolean hasCompiler() {
        try {
            return execute(List.of("gcc", "--version"), Map.of()).exit() == 0;
        } catch (IOException e) {
            return false;
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            return false;
        }
    }

    /** Compiles a shared library; fails with the compiler's output. */
    public static void compileLibrary(Path source, Path library, String... options)
            throws IOException, InterruptedException {
        List<String> command =
                new ArrayList<>(
                        List.of(
                                "gcc",
                                "-shared",
                                "-fPIC",
                                "-O1",
                                "-Wl,-soname," + library.getFileName(),
                                "-o",
                                library.toString(),
                                source.toString()));
        command.addAll(List.of(options));
        Result result = execute(command, Map.of());
        if (result.exit() != 0) {
            throw new IOException(result.output());
        }
    }

    /** The class path of this JVM without the entries whose file name contains a word. */
    public static String classPathWithout(String... words) {
        List<String> kept = new ArrayList<>();
        for (String entry : System.getProperty("java.class.path").split(File.pathSeparator)) {
            String name = Path.of(entry).getFileName().toString();
            boolean drop = false;
            for (String word : words) {
                drop |= name.contains(word);
            }
            if (!drop) {
                kept.add(entry);
            }
        }
        return String.join(File.pathSeparator, kept);
    }

    /** Runs a command to its end, at most two minutes. */
    public static Result execute(List<String> command, Map<String, String> environment)
            throws IOException, InterruptedException {
        ProcessBuilder builder = new ProcessBuilder(command).redirectErrorStream(true);
        builder.environment().putAll(environment);
        Process process = builder.start();
        String output = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        if (!process.waitFor(120, TimeUnit.SECONDS)) {
            process.destroyForcibly();
            throw new IOException(command.get(0) + " did not end within 120 s");
        }
        return new Result(process.exitValue(), output);
    }
}
