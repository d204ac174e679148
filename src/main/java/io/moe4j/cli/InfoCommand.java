package io.moe4j.cli;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.SerializationFeature;
import io.moe4j.BackendProvider;
import io.moe4j.MemoryPlan;
import io.moe4j.Moe;
import java.io.IOException;
import java.io.PrintWriter;
import java.util.ArrayList;
import java.util.List;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;

/** {@code moe4j info}: what this machine has, which backends are usable, and what is missing. */
@Command(
        name = "info",
        description = "Shows what this machine can run, and what is missing for the rest.")
final class InfoCommand extends BaseCommand {
    @Option(names = "--json", description = "Print JSON.")
    private boolean json;

    @Option(names = "--require-gpu", description = "Exit with 3 if no GPU is usable.")
    private boolean requireGpu;

    /** The machine, for the table and as JSON. */
    record Machine(
            String moe4j,
            String jdk,
            String os,
            int processors,
            long maxHeapBytes,
            String defaultBackend,
            List<Backend> backends) {}

    /** One backend and whether it runs here. */
    record Backend(String name, boolean usable, String reason, List<String> details) {}

    @Override
    public Integer call() throws IOException {
        Machine machine = machine();
        if (json) {
            out().println(
                            new ObjectMapper()
                                    .enable(SerializationFeature.INDENT_OUTPUT)
                                    .writeValueAsString(machine));
        } else {
            print(machine);
        }
        boolean gpu =
                machine.backends().stream().anyMatch(b -> b.name().equals("cuda") && b.usable());
        return requireGpu && !gpu ? ExitCodes.NO_GPU : ExitCodes.OK;
    }

    private static Machine machine() {
        List<Backend> backends = new ArrayList<>();
        for (BackendProvider provider : Moe.backends()) {
            BackendProvider.Availability found = provider.availability();
            backends.add(
                    new Backend(provider.name(), found.usable(), found.reason(), found.details()));
        }
        return new Machine(
                Version.number(),
                System.getProperty("java.vm.name") + " " + Runtime.version(),
                System.getProperty("os.name")
                        + " "
                        + System.getProperty("os.version")
                        + " "
                        + System.getProperty("os.arch"),
                Runtime.getRuntime().availableProcessors(),
                Runtime.getRuntime().maxMemory(),
                backends.stream()
                        .filter(Backend::usable)
                        .map(Backend::name)
                        .findFirst()
                        .orElse("none"),
                backends);
    }

    private void print(Machine machine) {
        PrintWriter out = out();
        out.printf("moe4j       %s%n", machine.moe4j());
        out.printf("JDK         %s%n", machine.jdk());
        out.printf("OS          %s%n", machine.os());
        out.printf("processors  %d%n", machine.processors());
        out.printf("heap        at most %s%n", MemoryPlan.human(machine.maxHeapBytes()));
        out.printf("default     %s%n", machine.defaultBackend());
        out.printf("%nbackends%n");
        for (Backend backend : machine.backends()) {
            out.printf(
                    "  %-5s %-10s %s%n",
                    backend.name(), backend.usable() ? "usable" : "not usable", backend.reason());
            for (String detail : backend.details()) {
                out.printf("  %16s %s%n", "", detail);
            }
        }
        out.flush();
    }
}
