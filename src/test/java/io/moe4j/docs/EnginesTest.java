package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Test;

/** The build of the engines, which no parent joins to this one, uses the same versions. */
class EnginesTest {
    private static final Pattern VERSION = Pattern.compile("<([a-z.]+\\.version)>([^<]+)<");

    @Test
    void shouldUseTheVersionsOfTheBuild() throws Exception {
        String pom = Files.readString(Path.of("pom.xml"));
        String engines = Files.readString(Path.of("engines/pom.xml"));
        int shared = 0;
        Matcher versions = VERSION.matcher(engines);
        while (versions.find()) {
            if (pom.contains("<" + versions.group(1) + ">")) {
                assertThat(pom).contains(versions.group());
                shared++;
            }
        }
        assertThat(shared).isEqualTo(3);
        for (String plugin : new String[] {"compiler", "surefire", "jar", "resources"}) {
            Pattern pinned =
                    Pattern.compile(
                            "<artifactId>maven-"
                                    + plugin
                                    + "-plugin</artifactId>\\s*<version>([^<]+)<");
            Matcher here = pinned.matcher(pom);
            Matcher there = pinned.matcher(engines);
            assertThat(here.find()).isTrue();
            assertThat(there.find()).isTrue();
            assertThat(there.group(1)).as(plugin).isEqualTo(here.group(1));
        }
    }

    @Test
    void shouldNameTheVersionOfJlamaAndTheOldestJdk() throws Exception {
        String engines = Files.readString(Path.of("engines/pom.xml"));
        String page = Files.readString(Path.of("docs/engines.md"));
        assertThat(engines).contains("<jlama.version>0.8.4<");
        assertThat(page).contains("[Jlama](#jlama) 0.8.4").contains("Needs JDK 22 or newer");
        assertThat(engines).contains("<maven.compiler.release>22<");
        assertThat(Files.readString(Path.of("engines.mk"))).contains("newest-jdk.sh javac 22");
    }
}
