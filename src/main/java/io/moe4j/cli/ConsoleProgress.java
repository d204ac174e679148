package io.moe4j.cli;

import io.moe4j.ProgressListener;
import java.io.Console;
import java.lang.reflect.InvocationTargetException;
import me.tongfei.progressbar.ProgressBar;
import me.tongfei.progressbar.ProgressBarBuilder;
import me.tongfei.progressbar.ProgressBarStyle;

/**
 * A progress bar on stderr if a person is watching, else nothing. Appears with the first report.
 * Thread-safe.
 */
final class ConsoleProgress implements ProgressListener, AutoCloseable {
    private static final long PART = 1000;

    private final String task;
    private final boolean watched = isTerminal();
    private ProgressBar bar;
    private long furthest;

    ConsoleProgress(String task) {
        this.task = task;
    }

    @Override
    public synchronized void progress(long done, long total) {
        if (!watched) {
            return;
        }
        if (bar == null) {
            bar =
                    new ProgressBarBuilder()
                            .setTaskName(task)
                            .setInitialMax(total)
                            .setStyle(ProgressBarStyle.ASCII)
                            .setUpdateIntervalMillis(100)
                            .build();
        }
        furthest = Math.max(furthest, done);
        bar.maxHint(total).stepTo(furthest);
    }

    /** A listener whose whole is one of {@code parts} equal parts of this bar. */
    ProgressListener part(int index, int parts) {
        return (done, total) ->
                progress(index * PART + PART * done / Math.max(1, total), parts * PART);
    }

    @Override
    public synchronized void close() {
        if (bar != null) {
            bar.close();
        }
    }

    /** From JDK 22 on there is a console without a terminal, and a method that tells. */
    private static boolean isTerminal() {
        Console console = System.console();
        if (console == null) {
            return false;
        }
        try {
            return (boolean) Console.class.getMethod("isTerminal").invoke(console);
        } catch (NoSuchMethodException before22) {
            return true;
        } catch (IllegalAccessException | InvocationTargetException e) {
            return false;
        }
    }
}
