package io.moe4j.cli;

import java.io.PrintWriter;
import java.util.concurrent.Callable;
import picocli.CommandLine;
import picocli.CommandLine.Model.CommandSpec;
import picocli.CommandLine.Spec;

/** What every subcommand has: the writers of its command line and an exit code as its result. */
abstract class BaseCommand implements Callable<Integer> {
    @Spec private CommandSpec spec;

    /** Where results go. */
    PrintWriter out() {
        return spec.commandLine().getOut();
    }

    /** The command line it is part of, with its arguments. */
    CommandLine commandLine() {
        return spec.commandLine();
    }

    /** How the tool was called, for commands that repeat something. */
    static String toolName() {
        return System.getProperty("moe4j.command", "moe4j");
    }
}
