package io.moe4j.observe;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import jdk.jfr.Recording;
import jdk.jfr.consumer.RecordedEvent;
import jdk.jfr.consumer.RecordingFile;

/** Runs something while the Flight Recorder records the events of moe4j. */
public final class Recorded {
    /** Something that may fail. */
    @FunctionalInterface
    public interface Work {
        void run() throws Exception;
    }

    private static final List<String> NAMES =
            List.of("LayerOpen", "LayerPrepare", "GraphCapture", "Replays", "Counters", "Fault");

    private Recorded() {}

    /** Starts a recording of every event of moe4j, periodic ones each {@code period}. */
    public static Recording start(String period) {
        Recording recording = new Recording();
        NAMES.forEach(name -> recording.enable("moe4j." + name));
        for (String periodic : List.of("Replays", "Counters")) {
            recording.enable("moe4j." + periodic).with("period", period);
        }
        recording.start();
        return recording;
    }

    /** The events made by {@code work}, in order of time. */
    public static List<RecordedEvent> during(String period, Work work) throws Exception {
        try (Recording recording = start(period)) {
            work.run();
            return stop(recording);
        }
    }

    /** The events of moe4j so far. */
    public static List<RecordedEvent> stop(Recording recording) {
        Path file = null;
        try {
            recording.stop();
            file = Files.createTempFile("moe4j", ".jfr");
            recording.dump(file);
            return RecordingFile.readAllEvents(file).stream()
                    .filter(event -> event.getEventType().getName().startsWith("moe4j."))
                    .toList();
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        } finally {
            if (file != null) {
                file.toFile().delete();
            }
        }
    }

    /** Those of one name, without "moe4j.". */
    public static List<RecordedEvent> of(List<RecordedEvent> events, String name) {
        return events.stream()
                .filter(event -> event.getEventType().getName().equals("moe4j." + name))
                .toList();
    }
}
