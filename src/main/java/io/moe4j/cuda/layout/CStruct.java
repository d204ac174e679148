package io.moe4j.cuda.layout;

import java.nio.ByteBuffer;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * Offsets of a C struct on a 64-bit little-endian machine, from its fields in order. A field is
 * {@code "type name"} with type ptr, u64, i32, u32 or f32. Immutable.
 */
public final class CStruct {
    private final String name;
    private final Map<String, Integer> offsets = new LinkedHashMap<>();
    private final Map<String, String> types = new LinkedHashMap<>();
    private final int size;

    private CStruct(String name, String[] fields) {
        this.name = name;
        int at = 0;
        int largest = 1;
        for (String field : fields) {
            String[] parts = field.split(" ");
            int bytes = parts[0].equals("ptr") || parts[0].equals("u64") ? 8 : 4;
            at = (at + bytes - 1) / bytes * bytes;
            if (offsets.put(parts[1], at) != null) {
                throw new IllegalArgumentException(name + " has two fields " + parts[1]);
            }
            types.put(parts[1], parts[0]);
            at += bytes;
            largest = Math.max(largest, bytes);
        }
        this.size = (at + largest - 1) / largest * largest;
    }

    static CStruct of(String name, String... fields) {
        return new CStruct(name, fields);
    }

    /** {@return the name of the struct in the CUDA sources} */
    public String name() {
        return name;
    }

    /** {@return the sizeof} */
    public int size() {
        return size;
    }

    /** {@return the field names and offsets, in order} */
    public Map<String, Integer> offsets() {
        return java.util.Collections.unmodifiableMap(offsets);
    }

    /**
     * {@return the offsetof}
     *
     * @param field name of the field
     * @throws IllegalArgumentException for a field the struct does not have
     */
    public int offset(String field) {
        Integer offset = offsets.get(field);
        if (offset == null) {
            throw new IllegalArgumentException(name + " has no field " + field);
        }
        return offset;
    }

    /**
     * Writes fields into {@code buffer}, which starts at the struct's first byte.
     *
     * @param buffer direct or heap; its byte order is set
     * @return this writer
     */
    public Writer writer(ByteBuffer buffer) {
        if (buffer.remaining() < size) {
            throw new IllegalArgumentException(
                    name + " needs " + size + " bytes, the buffer has " + buffer.remaining());
        }
        return new Writer(buffer, buffer.position());
    }

    /** Sets fields by name; a wrong type or name is an error, not a silent overwrite. */
    public final class Writer {
        private final ByteBuffer buffer;
        private final int base;

        private Writer(ByteBuffer buffer, int base) {
            this.buffer = buffer;
            this.base = base;
        }

        /**
         * Sets a pointer or a 64-bit integer.
         *
         * @param field name of the field
         * @param value what to store
         * @return this writer
         */
        public Writer put(String field, long value) {
            require(field, 8);
            buffer.putLong(base + offset(field), value);
            return this;
        }

        /**
         * Sets a 32-bit integer.
         *
         * @param field name of the field
         * @param value what to store
         * @return this writer
         */
        public Writer put(String field, int value) {
            require(field, 4);
            if (types.get(field).equals("f32")) {
                throw new IllegalArgumentException(name + "." + field + " is a float");
            }
            buffer.putInt(base + offset(field), value);
            return this;
        }

        /**
         * Sets a float.
         *
         * @param field name of the field
         * @param value what to store
         * @return this writer
         */
        public Writer put(String field, float value) {
            if (!"f32".equals(types.get(field))) {
                throw new IllegalArgumentException(name + "." + field + " is not a float");
            }
            buffer.putFloat(base + offset(field), value);
            return this;
        }

        private void require(String field, int bytes) {
            String type = types.get(field);
            offset(field);
            if ((type.equals("ptr") || type.equals("u64")) != (bytes == 8)) {
                throw new IllegalArgumentException(
                        name + "." + field + " is " + type + ", not " + bytes + " bytes");
            }
        }
    }
}
