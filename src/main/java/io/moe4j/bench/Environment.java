package io.moe4j.bench;

import java.io.IOException;
import java.io.InputStream;
import java.net.URL;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.jar.Attributes;
import java.util.jar.Manifest;

/** Where a measurement was made. Stateless. */
final class Environment {
    private Environment() {}

    /** The parts that need no GPU. */
    static Map<String, String> ofHost() {
        Map<String, String> facts = new LinkedHashMap<>();
        facts.put("date", Instant.now().truncatedTo(ChronoUnit.SECONDS).toString());
        facts.put("commit", commit());
        facts.put("jdk", System.getProperty("java.vm.name") + " " + Runtime.version());
        facts.put(
                "os",
                System.getProperty("os.name")
                        + " "
                        + System.getProperty("os.version")
                        + " "
                        + System.getProperty("os.arch"));
        facts.put("processors", "" + Runtime.getRuntime().availableProcessors());
        return facts;
    }

    /** The commit the jar was built from; {@code unknown} for classes outside a jar. */
    static String commit() {
        String path = Environment.class.getName().replace('.', '/') + ".class";
        URL self = Environment.class.getClassLoader().getResource(path);
        if (self == null || !self.getProtocol().equals("jar")) {
            return "unknown";
        }
        String text = self.toString();
        String manifest = text.substring(0, text.indexOf("!/") + 2) + "META-INF/MANIFEST.MF";
        try (InputStream in = new URL(manifest).openStream()) {
            Attributes main = new Manifest(in).getMainAttributes();
            String commit = main.getValue("Git-Commit");
            return commit == null ? "unknown" : commit;
        } catch (IOException e) {
            return "unknown";
        }
    }

    /**
     * Driver and clocks by nvidia-smi if it is there and answers; adds nothing else. The GPU has
     * nothing to do then: its clock is that of an idle GPU, its power still that of the last
     * second.
     */
    static void addNvidiaSmi(Map<String, String> facts, String pciBusId) {
        String fields =
                "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu";
        try {
            Process process =
                    new ProcessBuilder(
                                    "nvidia-smi",
                                    "--id=" + pciBusId,
                                    "--query-gpu=" + fields,
                                    "--format=csv,noheader")
                            .redirectErrorStream(true)
                            .start();
            process.getOutputStream().close();
            if (!process.waitFor(10, TimeUnit.SECONDS)) {
                process.destroyForcibly();
                return;
            }
            String line =
                    new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8)
                            .trim();
            String[] values = line.split(", *");
            if (process.exitValue() == 0 && values.length == 6) {
                facts.put("driver", values[0]);
                facts.put("sm clock when idle again", values[1]);
                facts.put("sm clock at most", values[2]);
                facts.put("memory clock", values[3]);
                facts.put("power over the last second", values[4]);
                facts.put("temperature", values[5] + " C");
            }
        } catch (IOException e) {
            // why nothing: without nvidia-smi these facts are missing, no more
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }
}
