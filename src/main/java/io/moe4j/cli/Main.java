package io.moe4j.cli;

import io.moe4j.BackendUnavailableException;
import io.moe4j.MoeFaultException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.NoSuchFileException;
import java.util.logging.Level;
import java.util.logging.Logger;
import picocli.CommandLine;
import picocli.CommandLine.Command;
import picocli.CommandLine.Option;
import picocli.CommandLine.ScopeType;

/**
 * Entry point of the command line tool. Holds the options all subcommands share and turns
 * exceptions into one line on stderr and an exit code.
 */
@Command(
        name = "moe4j",
        mixinStandardHelpOptions = true,
        scope = ScopeType.INHERIT,
        versionProvider = Version.class,
        description = "Runs, checks and plans Mixture-of-Experts layers.",
        subcommands = {
            DemoCommand.class,
            CheckCommand.class,
            PlanCommand.class,
            BenchCommand.class,
            PlotCommand.class,
            InfoCommand.class,
            CommandLine.HelpCommand.class
        },
        exitCodeListHeading = "%nExit codes:%n",
        exitCodeList = {
            "0:everything agrees",
            "1:an output differs from its reference, or the computation failed",
            "2:wrong usage, or input that cannot be read",
            "3:a GPU was asked for and none is usable"
        })
public final class Main {
    /** Held here because java.util.logging keeps its loggers, and their levels, only weakly. */
    private static final Logger LIBRARY_LOG = Logger.getLogger("io.moe4j");

    @Option(
            names = "--stacktrace",
            scope = ScopeType.INHERIT,
            description = "Print the stack trace of an error (as MOE4J_STACKTRACE=1 does).")
    private boolean stacktrace;

    /** For picocli. */
    public Main() {}

    /**
     * Runs a command and exits with its code.
     *
     * @param args the command line
     */
    public static void main(String[] args) {
        LIBRARY_LOG.setLevel(Level.WARNING); // commands print the chosen backend themselves
        System.exit(commandLine().execute(args));
    }

    /** {@return the configured command line; tests set its writers} */
    public static CommandLine commandLine() {
        Main main = new Main();
        return new CommandLine(main)
                .setCaseInsensitiveEnumValuesAllowed(true)
                .setExecutionExceptionHandler(
                        (failure, command, parsed) -> main.report(failure, command));
    }

    private int report(Exception failure, CommandLine command) {
        command.getErr().println(command.getColorScheme().errorText("moe4j: " + message(failure)));
        if (stacktrace || System.getenv("MOE4J_STACKTRACE") != null) {
            failure.printStackTrace(command.getErr());
        }
        command.getErr().flush();
        return exitCode(failure);
    }

    private static int exitCode(Exception failure) {
        if (failure instanceof BackendUnavailableException) {
            return ExitCodes.NO_GPU;
        }
        return isBadInput(failure) ? ExitCodes.BAD_INPUT : ExitCodes.MISMATCH;
    }

    private static boolean isBadInput(Exception failure) {
        return failure instanceof IllegalArgumentException
                || failure instanceof IOException
                || failure instanceof UncheckedIOException;
    }

    private static String message(Exception failure) {
        if (failure instanceof UncheckedIOException wrapper) {
            return message(wrapper.getCause());
        }
        if (failure instanceof NoSuchFileException missing) {
            return missing.getFile() + " does not exist: check the path";
        }
        boolean speaksForItself =
                isBadInput(failure)
                        || failure instanceof BackendUnavailableException
                        || failure instanceof MoeFaultException;
        return speaksForItself && failure.getMessage() != null
                ? failure.getMessage()
                : failure.toString();
    }
}
