package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assumptions.assumeThat;

import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class SafetensorsLargeFileTest {
    private static final long GIB = 1L << 30;
    private static final long LARGE_ELEMENTS = (22 * GIB / 10) & ~1L;
    private static final long DATA_BYTES = 2 * LARGE_ELEMENTS + 8;

    @TempDir Path dir;
    private Path path;
    private long dataStart;

    /** A sparse file: BF16 tensor of 4.4 GiB, then a small F32 tensor. */
    @BeforeEach
    void writeSparseFile() throws IOException {
        path = dir.resolve("large.safetensors");
        String header =
                String.format(
                        "{\"large\":{\"dtype\":\"BF16\",\"shape\":[%d],\"data_offsets\":[0,%d]},"
                                + "\"small\":{\"dtype\":\"F32\",\"shape\":[2],"
                                + "\"data_offsets\":[%d,%d]}}",
                        LARGE_ELEMENTS, 2 * LARGE_ELEMENTS, 2 * LARGE_ELEMENTS, DATA_BYTES);
        byte[] json =
                (header + " ".repeat((8 - header.length() % 8) % 8))
                        .getBytes(StandardCharsets.UTF_8);
        dataStart = 8 + json.length;
        try (RandomAccessFile file = new RandomAccessFile(path.toFile(), "rw")) {
            file.setLength(dataStart + DATA_BYTES);
            file.writeLong(Long.reverseBytes(json.length));
            file.write(json);
            putBf16(file, LARGE_ELEMENTS - 1, 0x3fc0); // 1.5
            putBf16(file, GIB / 2 - 1 - dataStart / 2, 0x4000); // 2, last of window 0
            putBf16(file, GIB / 2 - dataStart / 2, 0x4040); // 3, first of window 1
            file.seek(dataStart + 2 * LARGE_ELEMENTS + 4);
            file.writeInt(Integer.reverseBytes(Float.floatToIntBits(-7f)));
        } catch (IOException e) {
            assumeThat(e).as("the disk has no room or no sparse files: %s", e).isNull();
        }
        assumeThat(Files.size(path)).isEqualTo(dataStart + DATA_BYTES);
    }

    @Test
    void shouldReadBeyondTwoGibibytes() {
        try (SafetensorsFile file = SafetensorsFile.open(path)) {
            float[] values = new float[3];
            file.readFloats("large", LARGE_ELEMENTS - 3, values, 0, 3);
            assertThat(values).containsExactly(0f, 0f, 1.5f);
            file.readFloats("small", 0, values, 1, 2);
            assertThat(values).containsExactly(0f, 0f, -7f);
        }
    }

    @Test
    void shouldReadAcrossTheEdgeOfAWindow() {
        try (SafetensorsFile file = SafetensorsFile.open(path)) {
            float[] values = new float[4];
            file.readFloats("large", GIB / 2 - 2 - dataStart / 2, values, 0, 4);
            assertThat(values).containsExactly(0f, 2f, 3f, 0f);
        }
    }

    @Test
    void shouldSliceMoreThanAWindow() {
        try (SafetensorsFile file = SafetensorsFile.open(path)) {
            ByteBuffer slice =
                    file.slice("large", 2 * LARGE_ELEMENTS - 2_000_000_000, 2_000_000_000);
            assertThat(slice.order()).isEqualTo(ByteOrder.LITTLE_ENDIAN);
            assertThat(slice.getShort(2_000_000_000 - 2)).isEqualTo((short) 0x3fc0);
        }
    }

    private void putBf16(RandomAccessFile file, long element, int bits) throws IOException {
        file.seek(dataStart + 2 * element);
        file.write(bits & 0xff);
        file.write(bits >> 8);
    }
}
