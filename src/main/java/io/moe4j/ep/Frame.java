package io.moe4j.ep;

import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;

/**
 * What travels between ranks: a fixed header of 16 bytes, big endian, then the name and the bytes.
 *
 * <pre>
 * magic "M4EP" u32 | version u8 | kind u8 | length of the name u16 | length of the bytes u32 | zero u32
 * </pre>
 *
 * A header is checked before anything is allocated for what follows.
 *
 * @param kind what it is for
 * @param what name of a meeting, or empty
 * @param bytes what was given; not copied
 */
record Frame(Kind kind, String what, byte[] bytes) {
    static final int HEADER = 16;
    static final int MAX_NAME = 200;
    private static final int MAGIC = 0x4d344550;
    private static final byte VERSION = 1;

    /** Order is part of the format. */
    enum Kind {
        HELLO,
        WELCOME,
        REFUSED,
        EXCHANGE,
        MEET,
        ANNOUNCE,
        BYE
    }

    /** A header that was read: what follows. */
    record Header(Kind kind, int nameLength, int byteLength) {
        int length() {
            return nameLength + byteLength;
        }
    }

    /** Bytes that are no frame of ours. */
    static final class Malformed extends Exception {
        private static final long serialVersionUID = 1L;

        Malformed(String message) {
            super(message);
        }
    }

    static Frame of(Kind kind, String what, byte[] bytes) {
        if (what.getBytes(StandardCharsets.UTF_8).length > MAX_NAME) {
            throw new IllegalArgumentException(
                    "the name of a meeting has more than " + MAX_NAME + " bytes: " + what);
        }
        if (bytes.length > Group.MAX_BYTES) {
            throw new IllegalArgumentException(
                    bytes.length
                            + " bytes for "
                            + what
                            + " exceed the limit "
                            + Group.MAX_BYTES
                            + ": give them in several exchanges");
        }
        return new Frame(kind, what, bytes);
    }

    ByteBuffer encode() {
        byte[] name = what.getBytes(StandardCharsets.UTF_8);
        ByteBuffer to = ByteBuffer.allocate(HEADER + name.length + bytes.length);
        to.putInt(MAGIC).put(VERSION).put((byte) kind.ordinal()).putShort((short) name.length);
        to.putInt(bytes.length).putInt(0).put(name).put(bytes);
        return to.flip();
    }

    static Header header(ByteBuffer from) throws Malformed {
        int magic = from.getInt(0);
        if (magic != MAGIC) {
            throw new Malformed(String.format("bytes that are no frame (0x%08x)", magic));
        }
        if (from.get(4) != VERSION) {
            throw new Malformed(
                    "a frame of version " + from.get(4) + ", this library speaks " + VERSION);
        }
        int kind = from.get(5);
        int name = Short.toUnsignedInt(from.getShort(6));
        int bytes = from.getInt(8);
        if (kind < 0 || kind >= Kind.values().length || from.getInt(12) != 0) {
            throw new Malformed("a frame of unknown kind " + kind);
        }
        if (name > MAX_NAME || bytes < 0 || bytes > Group.MAX_BYTES) {
            throw new Malformed(
                    "a frame of "
                            + Integer.toUnsignedString(bytes)
                            + " bytes with a name of "
                            + name
                            + ", limits "
                            + Group.MAX_BYTES
                            + " and "
                            + MAX_NAME);
        }
        return new Header(Kind.values()[kind], name, bytes);
    }

    static Frame body(Header header, ByteBuffer from) {
        byte[] name = new byte[header.nameLength()];
        byte[] bytes = new byte[header.byteLength()];
        from.get(name).get(bytes);
        return new Frame(header.kind(), new String(name, StandardCharsets.UTF_8), bytes);
    }
}
