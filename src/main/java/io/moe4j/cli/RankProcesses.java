package io.moe4j.cli;

import java.io.IOException;
import java.io.PrintWriter;
import java.io.UncheckedIOException;
import java.lang.management.ManagementFactory;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import picocli.CommandLine;

/** Runs a command once for every rank, each in a process of its own that joins the others. */
final class RankProcesses {
    private RankProcesses() {}

    /**
     * A process for each GPU, which is rank r of each GPU r modulo {@code gpus}: the worst exit
     * code; what the processes print comes here, one after another.
     */
    static int run(int gpus, int ranks, CommandLine command) {
        try {
            Path folder = Files.createTempDirectory("moe4j-group");
            List<Process> children = new ArrayList<>();
            try {
                for (int gpu = 0; gpu < Math.min(gpus, ranks); gpu++) {
                    List<String> own = new ArrayList<>();
                    for (int rank = gpu; rank < ranks; rank += gpus) {
                        own.add(Integer.toString(rank));
                    }
                    children.add(start(String.join(",", own), folder.resolve("meet"), command));
                }
                return finish(children, command.getOut());
            } finally {
                children.forEach(Process::destroyForcibly);
                Files.deleteIfExists(folder.resolve("meet"));
                Files.deleteIfExists(folder);
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private static Process start(String own, Path meeting, CommandLine command) throws IOException {
        List<String> line = new ArrayList<>();
        line.add(Path.of(System.getProperty("java.home"), "bin", "java").toString());
        for (String option : ManagementFactory.getRuntimeMXBean().getInputArguments()) {
            if (!option.startsWith("-agentlib:") && !option.startsWith("-javaagent:")) {
                line.add(option);
            }
        }
        line.addAll(List.of("-cp", System.getProperty("java.class.path"), Main.class.getName()));
        line.addAll(command.getParent().getParseResult().originalArgs());
        line.addAll(List.of("--rank", own, "--group", meeting.toString()));
        return new ProcessBuilder(line).redirectErrorStream(true).start();
    }

    /** why one reader each: a process whose pipe is full would keep the others waiting. */
    private static int finish(List<Process> children, PrintWriter out) throws IOException {
        String[] printed = new String[children.size()];
        List<Thread> readers = new ArrayList<>();
        for (int rank = 0; rank < printed.length; rank++) {
            int at = rank;
            Thread reader = new Thread(() -> printed[at] = all(children.get(at)));
            reader.setDaemon(true);
            reader.start();
            readers.add(reader);
        }
        int worst = ExitCodes.OK;
        try {
            for (int rank = 0; rank < printed.length; rank++) {
                int code = children.get(rank).waitFor();
                readers.get(rank).join();
                if (rank > 0 && !printed[rank].isBlank()) {
                    out.println("rank " + rank + ":");
                }
                out.print(printed[rank]);
                worst = Math.max(worst, code);
            }
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
            throw new IOException("interrupted while the ranks run", e);
        }
        out.flush();
        return worst;
    }

    private static String all(Process child) {
        try {
            return new String(child.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        } catch (IOException e) {
            return e + System.lineSeparator();
        }
    }
}
