package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Set;
import java.util.TreeSet;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.xml.parsers.DocumentBuilderFactory;
import org.junit.jupiter.api.Test;
import org.w3c.dom.Document;
import org.w3c.dom.Element;
import org.w3c.dom.Node;

/**
 * The POM says what a repository and those who depend on moe4j need, and the pages say the same.
 */
class ArtifactTest {
    private static final Path EXAMPLE = Path.of("examples/hello-moe/pom.xml");

    @Test
    void shouldSayWhatMavenCentralAsksFor() throws Exception {
        Element project = pom(Path.of("pom.xml"));
        for (String field :
                new String[] {
                    "name", "description", "url", "licenses", "developers", "scm", "issueManagement"
                }) {
            assertThat(child(project, field)).as(field).isNotNull();
        }
        assertThat(text(child(child(project, "licenses"), "license"), "name"))
                .isEqualTo("Apache-2.0");
        for (String field : new String[] {"connection", "developerConnection", "url"}) {
            assertThat(text(child(project, "scm"), field)).as(field).contains("moe4j");
        }
    }

    @Test
    void shouldBringAlongWhatThePageSays() throws Exception {
        Set<String> coming = new TreeSet<>();
        Element dependencies = child(pom(Path.of("pom.xml")), "dependencies");
        for (Node n = dependencies.getFirstChild(); n != null; n = n.getNextSibling()) {
            if (n instanceof Element dependency
                    && !"true".equals(text(dependency, "optional"))
                    && !"test".equals(text(dependency, "scope"))) {
                coming.add(text(dependency, "groupId") + ":" + text(dependency, "artifactId"));
            }
        }
        assertThat(coming)
                .containsExactly(
                        "com.fasterxml.jackson.core:jackson-databind",
                        "net.java.dev.jna:jna",
                        "org.jcuda:jcuda",
                        "org.jcuda:jcuda-natives");
        String page = Files.readString(Path.of("docs/artifact.md"));
        assertThat(coming).allSatisfy(name -> assertThat(page).contains("`" + name + "`"));
    }

    @Test
    void shouldUseOneVersionInTheBuildTheExampleAndThePage() throws Exception {
        String version = text(pom(Path.of("pom.xml")), "version");
        assertThat(text(child(pom(EXAMPLE), "properties"), "moe4j.version")).isEqualTo(version);
        assertThat(text(pom(Path.of("engines/pom.xml")), "version")).isEqualTo(version);
        assertThat(Files.readString(Path.of("docs/artifact.md")))
                .contains("<version>" + version + "</version>");
        Matcher plugins =
                Pattern.compile(
                                "<artifactId>(maven-[a-z]+-plugin)</artifactId>\\s*<version>([^<]+)<")
                        .matcher(Files.readString(EXAMPLE));
        String build = Files.readString(Path.of("pom.xml"));
        int found = 0;
        while (plugins.find()) {
            assertThat(build)
                    .containsPattern(
                            "<artifactId>"
                                    + plugins.group(1)
                                    + "</artifactId>\\s*<version>"
                                    + Pattern.quote(plugins.group(2))
                                    + "<");
            found++;
        }
        assertThat(found).isEqualTo(5);
        assertThat(Files.readString(Path.of("artifact.mk")))
                .contains("maven-install-plugin:" + installPlugin(build) + ":install-file");
    }

    private static String installPlugin(String build) {
        Matcher version =
                Pattern.compile("maven-install-plugin</artifactId>\\s*<version>([^<]+)<")
                        .matcher(build);
        assertThat(version.find()).isTrue();
        return version.group(1);
    }

    private static Element pom(Path file) throws Exception {
        Document document =
                DocumentBuilderFactory.newInstance().newDocumentBuilder().parse(file.toFile());
        return document.getDocumentElement();
    }

    private static Element child(Element parent, String name) {
        for (Node n = parent.getFirstChild(); n != null; n = n.getNextSibling()) {
            if (n instanceof Element element && element.getTagName().equals(name)) {
                return element;
            }
        }
        return null;
    }

    private static String text(Element parent, String name) {
        Element element = child(parent, name);
        return element == null ? null : element.getTextContent().strip();
    }
}
