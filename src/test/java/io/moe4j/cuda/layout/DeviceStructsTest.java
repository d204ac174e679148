package io.moe4j.cuda.layout;

import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.regex.MatchResult;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Test;

/** The Java twins of the device structs, compared with the headers field by field. */
class DeviceStructsTest {
    private static final Path LAYOUT = Path.of("src/main/cuda/layout");
    private static final Pattern FIELD =
            Pattern.compile(
                    "^\\s*(?:const )?(\\w+)(\\*)? (\\w+)(?:\\[(\\d+)])?;", Pattern.MULTILINE);
    private static final Pattern SIZE =
            Pattern.compile("static_assert\\(sizeof\\((\\w+)\\) == (\\d+)");

    @Test
    void shouldMatchTheHeadersFieldByField() throws IOException {
        assumeTrue(Files.isDirectory(LAYOUT), "the sources are not here");
        String headers =
                Files.readString(LAYOUT.resolve("step_params.cuh"))
                        + Files.readString(LAYOUT.resolve("pack_params.cuh"));
        for (CStruct struct : DeviceStructs.ALL) {
            Map<String, Integer> offsets = new LinkedHashMap<>();
            int at = 0;
            for (MatchResult field :
                    FIELD.matcher(body(headers, struct.name())).results().toList()) {
                int bytes = field.group(2) != null ? 8 : bytes(field.group(1));
                int count = field.group(4) == null ? 1 : Integer.parseInt(field.group(4));
                at = (at + bytes - 1) / bytes * bytes;
                for (int i = 0; i < count; i++) {
                    offsets.put(field.group(3) + (field.group(4) == null ? "" : i), at);
                    at += bytes;
                }
            }
            assertThat(struct.offsets()).as(struct.name()).containsExactlyEntriesOf(offsets);
            assertThat(struct.size()).as(struct.name()).isEqualTo((at + 7) / 8 * 8);
        }
        SIZE.matcher(headers)
                .results()
                .forEach(
                        size ->
                                DeviceStructs.ALL.stream()
                                        .filter(s -> s.name().equals(size.group(1)))
                                        .forEach(
                                                s ->
                                                        assertThat(s.size())
                                                                .isEqualTo(
                                                                        Integer.parseInt(
                                                                                size.group(2)))));
    }

    private static String body(String headers, String struct) {
        Pattern start = Pattern.compile("struct (?:alignas\\(64\\) )?" + struct + " \\{\n");
        MatchResult found = start.matcher(headers).results().findFirst().orElseThrow();
        return headers.substring(found.end(), headers.indexOf("\n};", found.end()) + 1);
    }

    private static int bytes(String type) {
        return switch (type) {
            case "uint64_t" -> 8;
            case "int32_t", "uint32_t", "float" -> 4;
            default -> throw new AssertionError("type " + type);
        };
    }
}
