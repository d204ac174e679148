package io.moe4j.docs;

import static org.assertj.core.api.Assertions.assertThat;

import java.io.StringWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;
import javax.tools.DocumentationTool;
import javax.tools.StandardJavaFileManager;
import javax.tools.ToolProvider;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** The javadoc has no warning of any kind and a page for every public type. */
class JavadocTest {
    private static final Path SOURCES = Path.of("src/main/java");

    @Test
    void shouldDocumentEveryPublicTypeAndMethodWithoutAWarning(@TempDir Path pages)
            throws Exception {
        DocumentationTool javadoc = ToolProvider.getSystemDocumentationTool();
        List<Path> sources = sources();
        StringWriter messages = new StringWriter();
        try (StandardJavaFileManager files = javadoc.getStandardFileManager(null, null, null)) {
            List<String> options =
                    List.of(
                            "-Xdoclint:all",
                            "-Werror",
                            "-quiet",
                            "-Xmaxwarns",
                            "1000",
                            "-encoding",
                            "UTF-8",
                            "-d",
                            pages.toString(),
                            "-classpath",
                            System.getProperty("java.class.path"));
            boolean passed =
                    javadoc.getTask(
                                    messages,
                                    files,
                                    null,
                                    null,
                                    options,
                                    files.getJavaFileObjectsFromPaths(sources))
                            .call();
            assertThat(messages.toString()).isEmpty();
            assertThat(passed).isTrue();
        }
        for (Path source : sources) {
            String type = source.getFileName().toString().replaceFirst("\\.java$", "");
            if (Files.readString(source)
                    .matches("(?s).*public [a-z -]*(class|interface|record|enum) " + type + ".*")) {
                Path page = SOURCES.relativize(source).resolveSibling(type + ".html");
                assertThat(pages.resolve(page)).exists();
            }
        }
    }

    private static List<Path> sources() throws Exception {
        try (Stream<Path> files = Files.walk(SOURCES)) {
            return files.filter(file -> file.toString().endsWith(".java")).sorted().toList();
        }
    }
}
