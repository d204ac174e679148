package io.moe4j.weights;

import static org.assertj.core.api.Assertions.assertThat;

import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;

class SafetensorsHeaderFuzzTest {
    private static final int CASES = 1_000_000;
    private static final String VALID =
            "{\"__metadata__\":{\"format\":\"pt\"},"
                    + "\"a.weight\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[0,12]},"
                    + "\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[12,16]}}";
    private static final String[] TOKENS = {
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "-1",
        "9223372036854775807",
        "9223372036854775808",
        "1e9",
        "NaN",
        "null",
        "true",
        "\\u0000",
        "\\ud800",
        "0",
        "12",
        "BF16",
        "F4",
        "dtype",
        "shape",
        "data_offsets",
        "__metadata__",
        " ",
        "\n",
        "\u00e9",
        "4294967296"
    };

    @Test
    void shouldOnlyEverThrowCheckpointExceptionOnMutatedHeaders() {
        long seed = Long.getLong("moe4j.seed", 20261122L);
        SplittableRandom random = new SplittableRandom(seed);
        byte[] valid = VALID.getBytes(StandardCharsets.UTF_8);
        int accepted = 0;
        for (int i = 0; i < CASES; i++) {
            byte[] mutant = mutate(valid, random);
            try {
                parse(mutant, random.nextInt(50) == 0 ? random.nextLong() >>> 1 : 16);
                accepted++;
            } catch (CheckpointException expected) {
                // the only way to refuse
            } catch (Throwable t) {
                throw new AssertionError(
                        "seed "
                                + seed
                                + " case "
                                + i
                                + " (repeat: mvn test -Dtest=SafetensorsHeaderFuzzTest"
                                + " -DargLine=-Dmoe4j.seed="
                                + seed
                                + "): "
                                + new String(mutant, StandardCharsets.ISO_8859_1),
                        t);
            }
        }
        System.out.println("seed " + seed + ": " + accepted + " of " + CASES + " accepted");
        assertThat(accepted).isBetween(1, CASES / 2);
    }

    private static void parse(byte[] json, long dataBytes) {
        SafetensorsHeader header =
                SafetensorsHeader.parse(ByteBuffer.wrap(json), dataBytes, "fuzz");
        long covered = header.tensors().values().stream().mapToLong(TensorInfo::bytes).sum();
        assertThat(covered).isEqualTo(dataBytes);
    }

    private static byte[] mutate(byte[] valid, SplittableRandom random) {
        byte[] bytes = valid;
        int steps = 1 + random.nextInt(3);
        for (int i = 0; i < steps; i++) {
            int at = random.nextInt(bytes.length);
            bytes =
                    switch (random.nextInt(5)) {
                        case 0 -> splice(bytes, at, 1, new byte[] {(byte) random.nextInt(256)});
                        case 1 -> splice(bytes, at, random.nextInt(8), new byte[0]);
                        case 2 ->
                                splice(
                                        bytes,
                                        at,
                                        random.nextInt(4),
                                        TOKENS[random.nextInt(TOKENS.length)].getBytes(
                                                StandardCharsets.UTF_8));
                        case 3 -> splice(bytes, at, 1, new byte[] {(byte) ('0' + at % 10)});
                        default -> {
                            int from = random.nextInt(bytes.length);
                            int to = Math.min(bytes.length, from + random.nextInt(40));
                            yield splice(bytes, at, 0, Arrays.copyOfRange(bytes, from, to));
                        }
                    };
            if (bytes.length == 0) {
                return bytes;
            }
        }
        return bytes;
    }

    private static byte[] splice(byte[] bytes, int at, int removed, byte[] inserted) {
        int tail = Math.min(bytes.length, at + removed);
        byte[] result = new byte[at + inserted.length + bytes.length - tail];
        System.arraycopy(bytes, 0, result, 0, at);
        System.arraycopy(inserted, 0, result, at, inserted.length);
        System.arraycopy(bytes, tail, result, at + inserted.length, bytes.length - tail);
        return result;
    }
}
