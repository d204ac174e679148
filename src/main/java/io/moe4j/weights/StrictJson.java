package io.moe4j.weights;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonFactoryBuilder;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.core.StreamReadConstraints;
import com.fasterxml.jackson.core.StreamReadFeature;
import com.fasterxml.jackson.core.json.JsonReadFeature;
import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.json.JsonMapper;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.Reader;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.CodingErrorAction;
import java.nio.charset.StandardCharsets;

/**
 * JSON from untrusted files: valid UTF-8 only, duplicate keys and trailing content refused, nesting
 * and token lengths bounded. Stateless.
 */
final class StrictJson {
    private static final int LONGEST_NAME = 16_384;
    private static final int LONGEST_STRING = 16 << 20;
    private static final int LONGEST_NUMBER = 400;

    // why: tensor names are many and differ all; interning or canonicalising them keeps a second
    // copy, and so does Jackson's duplicate detection: the streaming readers check against the map
    // they fill anyway.
    private static final JsonFactory STREAM =
            bounded(8)
                    .disable(JsonFactory.Feature.INTERN_FIELD_NAMES)
                    .disable(JsonFactory.Feature.CANONICALIZE_FIELD_NAMES)
                    .build();

    // why: configurations written by Python may hold NaN or Infinity in fields nobody here reads;
    // ModelConfig refuses them, by name, in the fields it does read.
    private static final ObjectMapper TREE =
            JsonMapper.builder(
                            bounded(64)
                                    .enable(StreamReadFeature.STRICT_DUPLICATE_DETECTION)
                                    .enable(JsonReadFeature.ALLOW_NON_NUMERIC_NUMBERS)
                                    .build())
                    .enable(DeserializationFeature.FAIL_ON_TRAILING_TOKENS)
                    .build();

    private StrictJson() {}

    /** A token reader; the caller detects duplicate keys and trailing content. */
    static JsonParser parser(InputStream utf8) throws IOException {
        return STREAM.createParser(reader(utf8));
    }

    /** A whole document as a tree. */
    static JsonNode tree(InputStream utf8) throws IOException {
        return TREE.readTree(reader(utf8));
    }

    /** The reason of a failed read, for a message: one line without positions in a buffer. */
    static String reason(IOException failure) {
        if (failure instanceof CharacterCodingException) {
            return "it is not valid UTF-8";
        }
        String text =
                failure instanceof JsonProcessingException json
                        ? json.getOriginalMessage()
                        : failure.getMessage();
        return CheckpointException.quote(String.valueOf(text));
    }

    private static Reader reader(InputStream utf8) {
        return new InputStreamReader(
                utf8,
                StandardCharsets.UTF_8
                        .newDecoder()
                        .onMalformedInput(CodingErrorAction.REPORT)
                        .onUnmappableCharacter(CodingErrorAction.REPORT));
    }

    private static JsonFactoryBuilder bounded(int depth) {
        return new JsonFactoryBuilder()
                .streamReadConstraints(
                        StreamReadConstraints.builder()
                                .maxNestingDepth(depth)
                                .maxNameLength(LONGEST_NAME)
                                .maxStringLength(LONGEST_STRING)
                                .maxNumberLength(LONGEST_NUMBER)
                                .build());
    }
}
