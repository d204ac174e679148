package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.cli.Main;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import picocli.CommandLine;

/** {@code moe4j check} in this process, which must succeed. */
final class CheckRun {
    private CheckRun() {}

    /** What it printed. */
    static String of(Path checkpoint, String... more) {
        StringWriter out = new StringWriter();
        CommandLine main = Main.commandLine();
        main.setOut(new PrintWriter(out));
        main.setErr(new PrintWriter(out));
        List<String> arguments =
                new ArrayList<>(List.of("check", "--checkpoint", checkpoint.toString()));
        arguments.addAll(List.of(more));
        int exit = main.execute(arguments.toArray(String[]::new));
        System.out.println(out);
        assertThat(exit).as(out.toString()).isZero();
        return out.toString();
    }
}
