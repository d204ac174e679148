package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class SafetensorsFileTest {
    @TempDir Path dir;

    @Test
    void shouldReadWhatWasWritten() {
        Path path = dir.resolve("a.safetensors");
        byte[] ints = bytes(12).putInt(7).putInt(-1).putInt(Integer.MIN_VALUE).array();
        byte[] halves = bytes(6).putShort((short) 0x3c00).putShort((short) 0x8001).array();
        byte[] doubles = bytes(8).putDouble(-0.1).array();
        new SafetensorsWriter()
                .addFloats("f", new float[] {1f, -2.5f, Float.MIN_VALUE, 4f}, 2, 2)
                .add("i", "I32", ints, 3)
                .add("h", "F16", halves, 3)
                .add("b", "BF16", bytes(2).putShort((short) 0xc020).array(), 1)
                .add("e", "F8_E4M3", new byte[] {0x7e, (byte) 0x81, 0x38}, 3)
                .add("d", "F64", doubles)
                .add("empty", "F32", new byte[0], 0, 5)
                .write(path);
        try (SafetensorsFile file = SafetensorsFile.open(path)) {
            assertThat(file.names()).containsExactly("f", "i", "h", "b", "e", "d", "empty");
            assertThat(file.metadata()).containsEntry("format", "pt");
            assertThat(file.info("f").shape()).containsExactly(2L, 2L);
            assertThat(file.info("f").type()).isEqualTo(StoredType.F32);
            assertThat(file.info("i").begin()).isEqualTo(16);
            assertThat(file.info("i").end()).isEqualTo(28);
            assertThat(floats(file, "f", 1, 3)).containsExactly(-2.5f, Float.MIN_VALUE, 4f);
            assertThat(floats(file, "i", 0, 3)).containsExactly(7f, -1f, -0x1p31f);
            assertThat(floats(file, "h", 0, 2)).containsExactly(1f, -0x1p-24f);
            assertThat(floats(file, "b", 0, 1)).containsExactly(-2.5f);
            assertThat(floats(file, "e", 0, 3)).containsExactly(448f, -0x1p-9f, 1f);
            assertThat(floats(file, "d", 0, 1)).containsExactly(-0.1f);
            assertThat(floats(file, "empty", 0, 0)).isEmpty();
            int[] read = new int[4];
            file.readInts("i", 1, read, 2, 2);
            assertThat(read).containsExactly(0, 0, -1, Integer.MIN_VALUE);
            ByteBuffer slice = file.slice("f", 4, 4);
            assertThat(slice.order()).isEqualTo(ByteOrder.LITTLE_ENDIAN);
            assertThat(slice.isReadOnly()).isTrue();
            assertThat(slice.getFloat(0)).isEqualTo(-2.5f);
        }
    }

    @Test
    void shouldRefuseReadsOutsideATensorOrAfterClosing() {
        Path path = dir.resolve("a.safetensors");
        new SafetensorsWriter()
                .addFloats("f", new float[4], 4)
                .addFloats("g", new float[4], 4)
                .write(path);
        SafetensorsFile file = SafetensorsFile.open(path);
        assertThatThrownBy(() -> file.readFloats("f", 3, new float[8], 0, 2))
                .isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> file.readFloats("f", 0, new float[2], 0, 3))
                .isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> file.slice("f", 12, 8))
                .isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> file.slice("f", -1, 1))
                .isInstanceOf(IndexOutOfBoundsException.class);
        assertThatThrownBy(() -> file.info("nothing"))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("nothing")
                .hasMessageContaining("a.safetensors");
        assertThatThrownBy(() -> file.readInts("f", 0, new int[1], 0, 1))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("is F32, expected I32");
        file.close();
        file.close();
        assertThatThrownBy(() -> file.readFloats("f", 0, new float[1], 0, 1))
                .isInstanceOf(IllegalStateException.class)
                .hasMessageContaining("is closed");
    }

    @ParameterizedTest
    @CsvSource({
        "BOOL, 8",
        "F4, 4",
        "F6_E2M3, 8",
        "F6_E3M2, 8",
        "U8, 8",
        "I8, 8",
        "F8_E5M2, 8",
        "F8_E8M0, 8",
        "F8_E5M2FNUZ, 8",
        "F8_E4M3FNUZ, 8",
        "I16, 16",
        "U16, 16",
        "U32, 32",
        "C64, 64",
        "I64, 64",
        "U64, 64"
    })
    void shouldListButNotDecodeTypesItDoesNotKnow(String dtype, int bits) {
        Path path = dir.resolve("a.safetensors");
        int elements = dtype.startsWith("F6") ? 4 : 2;
        int bytes = dtype.startsWith("F6") ? 3 : 2 * bits / 8;
        new SafetensorsWriter().add("x", dtype, new byte[bytes], elements).write(path);
        try (SafetensorsFile file = SafetensorsFile.open(path)) {
            assertThat(file.info("x").bytes()).isEqualTo(bytes);
            assertThat(file.slice("x", 0, bytes).remaining()).isEqualTo(bytes);
            assertThatThrownBy(() -> file.readFloats("x", 0, new float[2], 0, 2))
                    .isInstanceOf(CheckpointException.class)
                    .hasMessageContaining("x is " + dtype + ", which cannot be read as float");
        }
    }

    @Test
    void shouldRefuseAFileTruncatedAtAnyLength() throws IOException {
        byte[] whole =
                new SafetensorsWriter()
                        .addFloats("a", new float[] {1, 2, 3}, 3)
                        .addFloats("b", new float[] {4}, 1, 1)
                        .toBytes();
        Path path = dir.resolve("a.safetensors");
        for (int length = 0; length < whole.length; length++) {
            Files.write(path, Arrays.copyOf(whole, length));
            assertThatThrownBy(() -> SafetensorsFile.open(path))
                    .as("length %d of %d", length, whole.length)
                    .isInstanceOf(CheckpointException.class)
                    .hasMessageContaining("a.safetensors");
        }
        Files.write(path, Arrays.copyOf(whole, whole.length + 1));
        assertThatThrownBy(() -> SafetensorsFile.open(path))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("trailing bytes");
        Files.write(path, whole);
        SafetensorsFile.open(path).close();
    }

    @ParameterizedTest
    @ValueSource(
            longs = {1000, 100_000_001L, Integer.MAX_VALUE, Long.MAX_VALUE, Long.MIN_VALUE, -1})
    void shouldRefuseAHeaderLengthThatCannotBe(long length) throws IOException {
        Path path = dir.resolve("a.safetensors");
        Files.write(path, bytes(64).putLong(length).array());
        assertThatThrownBy(() -> SafetensorsFile.open(path))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("the header claims " + Long.toUnsignedString(length));
    }

    @ParameterizedTest
    @CsvSource(
            delimiter = '|',
            quoteCharacter = '\'',
            value = {
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}} | 4 | needs 8",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}} | 8 | cover 4",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}} | 8 | hole",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}} | 8 | begin <= end",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} | 4 | begin <= end <= 4",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}} | 4 | -4 in data_offsets",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}} | 4 | -1 in shape",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}} | 4 | 1.0 in shape",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[\"1\"],\"data_offsets\":[0,4]}} | 4 | in shape",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[18446744073709551616],\"data_offsets\":[0,4]}} | 4 | in shape",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}} | 4 | overflows",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}} | 0 | overflows",
                "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]}} | 2 | fraction",
                "{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}} | 4 | unknown dtype F33",
                "{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}} | 4 | not a string",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}} | 4 | data_offsets [0, 4, 8]",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}} | 4 | lacks one of",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}} | 4 | unknown field x",
                "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}} | 4 | dtype twice",
                "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}} | 8 | listed twice",
                "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}} | 6 | overlaps",
                "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}} | 4 | overlaps",
                "{\"__metadata__\":{\"a\":1}} | 0 | not a string",
                "{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}} | 0 | twice",
                "{\"__metadata__\":{},\"__metadata__\":{}} | 0 | listed twice",
                "{\"__metadata__\":[]} | 0 | not an object",
                "{\"a\":[]} | 0 | not described by an object",
                "{} {} | 0 | content follows",
                "{\"a\":NaN} | 0 | not valid JSON",
                "[] | 0 | does not start with",
                "{{{{{{{{{{{{{{ | 0 | not valid JSON",
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[[[[[[[[[[[[1]]]]]]]]]]]],\"data_offsets\":[0,4]}} | 4 | in shape"
            })
    void shouldRefuseAHeaderThatBreaksARule(String header, int dataBytes, String reason)
            throws IOException {
        Path path = dir.resolve("a.safetensors");
        Files.write(path, SafetensorsWriter.raw(header, dataBytes));
        assertThatThrownBy(() -> SafetensorsFile.open(path))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("a.safetensors")
                .hasMessageContaining(reason);
    }

    @Test
    void shouldRefuseAHeaderThatIsNotUtf8() {
        byte[] json = "{\"?\":{}}".getBytes(StandardCharsets.ISO_8859_1);
        json[2] = (byte) 0xff;
        assertThatThrownBy(() -> SafetensorsHeader.parse(ByteBuffer.wrap(json), 0, "file"))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("not valid UTF-8");
    }

    @Test
    void shouldShowHostileNamesOnOneShortLine() {
        String name = "x\\n\\u001b[31m" + "y".repeat(5000);
        byte[] json = ("{\"" + name + "\":3}").getBytes(StandardCharsets.UTF_8);
        assertThatThrownBy(() -> SafetensorsHeader.parse(ByteBuffer.wrap(json), 0, "file"))
                .isInstanceOf(CheckpointException.class)
                .satisfies(
                        e -> {
                            assertThat(e.getMessage().length()).isLessThan(600);
                            assertThat(e.getMessage()).doesNotContain("\n", "\u001b");
                        });
    }

    @Test
    void shouldRefuseWhatIsNotARegularFile() {
        assertThatThrownBy(() -> SafetensorsFile.open(dir))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("not a regular file");
        assertThatThrownBy(() -> SafetensorsFile.open(dir.resolve("none")))
                .isInstanceOf(CheckpointException.class)
                .hasMessageContaining("no such file");
    }

    private static ByteBuffer bytes(int count) {
        return ByteBuffer.allocate(count).order(ByteOrder.LITTLE_ENDIAN);
    }

    private static float[] floats(SafetensorsFile file, String name, long from, int count) {
        float[] values = new float[count];
        file.readFloats(name, from, values, 0, count);
        return values;
    }
}
