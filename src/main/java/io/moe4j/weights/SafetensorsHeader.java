package io.moe4j.weights;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Comparator;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * The parsed header of a safetensors file: every rule of the format that can be checked without
 * looking at the data. Immutable.
 *
 * <p>The rules are those of the official reader: the byte ranges of the tensors cover the data
 * section exactly, without hole or overlap, and each range has the size its shape and type ask for.
 *
 * @param tensors by name, in the order of the header
 * @param metadata the {@code __metadata__} map, empty if there is none
 */
record SafetensorsHeader(Map<String, TensorInfo> tensors, Map<String, String> metadata) {
    /** Bytes before the JSON: its length, unsigned 64-bit little-endian. */
    static final int PREFIX_BYTES = 8;

    /** The official limit on the JSON's length. */
    static final long MAX_HEADER_BYTES = 100_000_000;

    /** Far above any published file; bounds the memory that many tiny entries could take. */
    private static final int MAX_TENSORS = 500_000;

    private static final int MAX_RANK = 16;
    private static final int MAX_METADATA_ENTRIES = 100_000;
    private static final String METADATA = "__metadata__";

    /**
     * The length of the JSON header, checked against the file's size.
     *
     * @param prefix the file's first 8 bytes
     * @throws CheckpointException if the length is not possible
     */
    static int length(ByteBuffer prefix, long fileBytes, String file) {
        if (fileBytes < PREFIX_BYTES) {
            throw new CheckpointException(
                    file
                            + ": has "
                            + fileBytes
                            + " bytes, a safetensors file has at least 8: download it again");
        }
        long length = prefix.order(ByteOrder.LITTLE_ENDIAN).getLong(prefix.position());
        long limit = Math.min(MAX_HEADER_BYTES, fileBytes - PREFIX_BYTES);
        if (length < 0 || length > limit) {
            throw new CheckpointException(
                    file
                            + ": the header claims "
                            + Long.toUnsignedString(length)
                            + " bytes, more than the "
                            + limit
                            + " possible: the file is truncated or not safetensors, download it"
                            + " again");
        }
        return (int) length;
    }

    /**
     * Parses and checks the JSON header.
     *
     * @param json the header's bytes, from position to limit
     * @param dataBytes size of the data section behind it
     * @param file named in messages
     * @throws CheckpointException for anything the format does not allow
     */
    static SafetensorsHeader parse(ByteBuffer json, long dataBytes, String file) {
        if (!json.hasRemaining() || json.get(json.position()) != '{') {
            throw new CheckpointException(
                    file + ": the header does not start with '{': this is not a safetensors file");
        }
        try (JsonParser parser = StrictJson.parser(stream(json))) {
            SafetensorsHeader header = new Reader(parser, dataBytes, file).read();
            header.requireExactCover(dataBytes, file);
            return header;
        } catch (IOException e) {
            throw new CheckpointException(
                    file
                            + ": the header is not valid JSON ("
                            + StrictJson.reason(e)
                            + "): the file is damaged, download it again",
                    e);
        }
    }

    private static InputStream stream(ByteBuffer bytes) {
        ByteBuffer view = bytes.duplicate();
        return new InputStream() {
            @Override
            public int read() {
                return view.hasRemaining() ? view.get() & 0xff : -1;
            }

            @Override
            public int read(byte[] to, int offset, int count) {
                int n = Math.min(count, view.remaining());
                if (n == 0) {
                    return count == 0 ? 0 : -1;
                }
                view.get(to, offset, n);
                return n;
            }
        };
    }

    private void requireExactCover(long dataBytes, String file) {
        List<Map.Entry<String, TensorInfo>> ordered = new ArrayList<>(tensors.entrySet());
        ordered.sort(
                Comparator.<Map.Entry<String, TensorInfo>>comparingLong(e -> e.getValue().begin())
                        .thenComparingLong(e -> e.getValue().end()));
        long covered = 0;
        for (Map.Entry<String, TensorInfo> entry : ordered) {
            TensorInfo info = entry.getValue();
            if (info.begin() != covered) {
                throw new CheckpointException(
                        file
                                + ": tensor "
                                + CheckpointException.quote(entry.getKey())
                                + " begins at byte "
                                + info.begin()
                                + " of the data, expected "
                                + covered
                                + (info.begin() < covered
                                        ? ": it overlaps the tensor before it"
                                        : ": there is a hole before it")
                                + "; write the file again with a safetensors library");
            }
            covered = info.end();
        }
        if (covered != dataBytes) {
            throw new CheckpointException(
                    file
                            + ": the tensors cover "
                            + covered
                            + " bytes but the data section has "
                            + dataBytes
                            + ": the file is truncated or has trailing bytes, download it again");
        }
    }

    /** One pass over the tokens; all state of a parse. */
    private static final class Reader {
        private final JsonParser parser;
        private final long dataBytes;
        private final String file;
        private final Map<String, TensorInfo> tensors = new LinkedHashMap<>();
        private final Map<String, String> metadata = new HashMap<>();
        private boolean metadataSeen;

        Reader(JsonParser parser, long dataBytes, String file) {
            this.parser = parser;
            this.dataBytes = dataBytes;
            this.file = file;
        }

        SafetensorsHeader read() throws IOException {
            parser.nextToken(); // the '{' that parse() has seen
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String name = parser.currentName();
                if (name.equals(METADATA)) {
                    readMetadata();
                } else if (tensors.put(name, readTensor(name)) != null) {
                    throw bad(name, "is listed twice");
                } else if (tensors.size() > MAX_TENSORS) {
                    throw bad(name, "is one too many: at most " + MAX_TENSORS + " are read");
                }
            }
            if (parser.nextToken() != null) {
                throw new CheckpointException(
                        file + ": content follows the header's JSON: the file is damaged");
            }
            return new SafetensorsHeader(
                    Collections.unmodifiableMap(tensors), Collections.unmodifiableMap(metadata));
        }

        private void readMetadata() throws IOException {
            if (metadataSeen || parser.nextToken() != JsonToken.START_OBJECT) {
                throw bad(METADATA, metadataSeen ? "is listed twice" : "is not an object");
            }
            metadataSeen = true;
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String key = parser.currentName();
                if (parser.nextToken() != JsonToken.VALUE_STRING) {
                    throw bad(METADATA, "has a value that is not a string at key " + key);
                }
                if (metadata.put(key, parser.getText()) != null) {
                    throw bad(METADATA, "has key " + key + " twice");
                }
                if (metadata.size() > MAX_METADATA_ENTRIES) {
                    throw bad(METADATA, "has more than " + MAX_METADATA_ENTRIES + " entries");
                }
            }
        }

        private TensorInfo readTensor(String name) throws IOException {
            if (parser.nextToken() != JsonToken.START_OBJECT) {
                throw bad(name, "is not described by an object");
            }
            StoredType type = null;
            List<Long> shape = null;
            List<Long> offsets = null;
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String field = parser.currentName();
                boolean again =
                        switch (field) {
                            case "dtype" -> type != null;
                            case "shape" -> shape != null;
                            case "data_offsets" -> offsets != null;
                            default -> throw bad(name, "has the unknown field " + field);
                        };
                if (again) {
                    throw bad(name, "has " + field + " twice");
                }
                parser.nextToken();
                switch (field) {
                    case "dtype" -> type = readType(name);
                    case "shape" -> shape = readIntegers(name, field);
                    default -> offsets = readIntegers(name, field);
                }
            }
            if (type == null || shape == null || offsets == null) {
                throw bad(name, "lacks one of dtype, shape and data_offsets");
            }
            return checked(name, type, shape, offsets);
        }

        private StoredType readType(String name) throws IOException {
            if (parser.currentToken() != JsonToken.VALUE_STRING) {
                throw bad(name, "has a dtype that is not a string");
            }
            String text = parser.getText();
            for (StoredType type : StoredType.values()) {
                if (type.name().equals(text)) {
                    return type;
                }
            }
            throw bad(name, "has the unknown dtype " + text);
        }

        private List<Long> readIntegers(String name, String field) throws IOException {
            if (parser.currentToken() != JsonToken.START_ARRAY) {
                throw bad(name, "has a " + field + " that is not an array");
            }
            List<Long> values = new ArrayList<>(4);
            while (parser.nextToken() != JsonToken.END_ARRAY) {
                if (parser.currentToken() != JsonToken.VALUE_NUMBER_INT
                        || parser.getNumberType() == JsonParser.NumberType.BIG_INTEGER
                        || parser.getLongValue() < 0) {
                    String found = parser.currentToken() == null ? "the end" : parser.getText();
                    throw bad(
                            name,
                            "has " + found + " in " + field + ", expected integers 0..2^63-1");
                }
                values.add(parser.getLongValue());
                if (values.size() > MAX_RANK) {
                    throw bad(name, "has more than " + MAX_RANK + " entries in " + field);
                }
            }
            return values;
        }

        private TensorInfo checked(
                String name, StoredType type, List<Long> shape, List<Long> offsets) {
            if (offsets.size() != 2
                    || offsets.get(0) > offsets.get(1)
                    || offsets.get(1) > dataBytes) {
                throw bad(
                        name,
                        "has data_offsets "
                                + offsets
                                + ", expected [begin, end] with begin <= end <= "
                                + dataBytes
                                + ", the size of the data");
            }
            long bits;
            try {
                long product = 1;
                for (long extent : shape) {
                    product = Math.multiplyExact(product, extent);
                }
                bits = Math.multiplyExact(product, type.bits());
            } catch (ArithmeticException e) {
                throw bad(name, "has shape " + shape + ", which overflows 64-bit sizes");
            }
            long bytes = offsets.get(1) - offsets.get(0);
            if (bits % 8 != 0 || bits / 8 != bytes) {
                throw bad(
                        name,
                        "has "
                                + bytes
                                + " bytes but "
                                + type
                                + shape
                                + " needs "
                                + bits / 8
                                + (bits % 8 == 0 ? "" : " and a fraction"));
            }
            return new TensorInfo(type, shape, offsets.get(0), offsets.get(1));
        }

        private CheckpointException bad(String name, String problem) {
            return new CheckpointException(
                    file
                            + ": tensor "
                            + CheckpointException.quote(name)
                            + " "
                            + CheckpointException.quote(problem)
                            + "; the file is damaged or not safetensors, download or write it"
                            + " again");
        }
    }
}
