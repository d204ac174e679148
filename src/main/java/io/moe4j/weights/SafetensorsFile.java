package io.moe4j.weights;

import io.moe4j.tensor.DType;
import io.moe4j.tensor.Fp16;
import io.moe4j.tensor.Fp8E4m3;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;

/**
 * A safetensors file, opened read-only and mapped into memory window by window as it is read, so
 * that neither the file nor a tensor is limited to 2 GiB. The header is checked completely when the
 * file opens; the data is not looked at until asked for.
 *
 * <p>The instance owns the open file. All methods are safe for concurrent use; the file must not
 * change while it is open. Windows stay mapped until the instance and the buffers it handed out are
 * garbage.
 */
public final class SafetensorsFile implements AutoCloseable {
    /**
     * Distance between windows. A window reaches almost twice as far, so that any range up to this
     * size lies within one window.
     */
    private static final long WINDOW_STRIDE = 1L << 30;

    /** Elements converted per step: small enough for the first-level cache. */
    private static final int CHUNK = 8192;

    private final String label;
    private final FileChannel channel;
    private final long fileBytes;
    private final long dataStart;
    private final SafetensorsHeader header;
    private final Map<Long, MappedByteBuffer> windows = new ConcurrentHashMap<>();

    private SafetensorsFile(
            String label,
            FileChannel channel,
            long fileBytes,
            long dataStart,
            SafetensorsHeader header) {
        this.label = label;
        this.channel = channel;
        this.fileBytes = fileBytes;
        this.dataStart = dataStart;
        this.header = header;
    }

    /**
     * Opens a file and checks its header.
     *
     * @param path the file
     * @return the file; the caller closes it
     * @throws CheckpointException if the file is missing, unreadable or not strictly safetensors
     */
    public static SafetensorsFile open(Path path) {
        return open(path, path.toString());
    }

    /** The same with another name for messages, for a file reached through a link. */
    static SafetensorsFile open(Path path, String label) {
        if (!Files.isRegularFile(path)) {
            throw new CheckpointException(
                    label
                            + (Files.exists(path)
                                    ? ": is not a regular file"
                                    : ": no such file: check the path"));
        }
        FileChannel channel = null;
        try {
            channel = FileChannel.open(path, StandardOpenOption.READ);
            SafetensorsFile file = read(channel, label);
            channel = null;
            return file;
        } catch (IOException e) {
            throw unreadable(label, e);
        } finally {
            closeQuietly(channel);
        }
    }

    /** {@return the file's name in messages} */
    public String label() {
        return label;
    }

    /** {@return the names of all tensors, in the order of the header} */
    public Set<String> names() {
        return header.tensors().keySet();
    }

    /** {@return the header's {@code __metadata__}, empty if it has none} */
    public Map<String, String> metadata() {
        return header.metadata();
    }

    /**
     * What the header says about a tensor.
     *
     * @param name name of the tensor
     * @return its type, shape and place
     * @throws CheckpointException if there is no such tensor
     */
    public TensorInfo info(String name) {
        TensorInfo info = header.tensors().get(name);
        if (info == null) {
            throw new CheckpointException(
                    label
                            + ": has no tensor "
                            + CheckpointException.quote(name)
                            + " among its "
                            + header.tensors().size()
                            + ": check the name");
        }
        return info;
    }

    /**
     * A read-only little-endian view of part of a tensor's bytes, position 0.
     *
     * @param name name of the tensor
     * @param byteOffset first byte, counted from the tensor's start
     * @param byteCount how many bytes
     * @return the view, which stays readable as long as it is held
     * @throws CheckpointException if there is no such tensor or the file cannot be mapped
     * @throws IndexOutOfBoundsException if the range leaves the tensor
     * @throws IllegalStateException after {@link #close}
     */
    public ByteBuffer slice(String name, long byteOffset, int byteCount) {
        TensorInfo info = info(name);
        Objects.checkFromIndexSize(byteOffset, byteCount, info.bytes());
        return map(dataStart + info.begin() + byteOffset, byteCount);
    }

    /**
     * Decodes elements of a tensor of type F64, F32, F16, BF16, F8_E4M3 or I32 to float32.
     *
     * @param name name of the tensor
     * @param elementOffset first element, row-major
     * @param to destination
     * @param toOffset index of the first float written
     * @param count number of elements
     * @throws CheckpointException if there is no such tensor or its type has no float view
     * @throws IndexOutOfBoundsException if a range leaves the tensor or the destination
     * @throws IllegalStateException after {@link #close}
     */
    public void readFloats(String name, long elementOffset, float[] to, int toOffset, int count) {
        TensorInfo info = info(name);
        DType type = info.type().dtype();
        if (type == null || type == DType.U8 || type == DType.I64) {
            throw new CheckpointException(
                    label
                            + ": tensor "
                            + CheckpointException.quote(name)
                            + " is "
                            + info.type()
                            + ", which cannot be read as float: supported are F64, F32, F16, BF16,"
                            + " F8_E4M3 and I32");
        }
        Objects.checkFromIndexSize(elementOffset, count, info.elements());
        Objects.checkFromIndexSize(toOffset, count, to.length);
        int done = 0;
        while (done < count) {
            int n = (int) Math.min(count - done, WINDOW_STRIDE / type.bytes());
            long at = dataStart + info.begin() + (elementOffset + done) * type.bytes();
            decode(type, map(at, n * type.bytes()), to, toOffset + done, n);
            done += n;
        }
    }

    /**
     * Reads elements of a tensor of type I32.
     *
     * @param name name of the tensor
     * @param elementOffset first element, row-major
     * @param to destination
     * @param toOffset first element of the destination
     * @param count how many
     * @throws CheckpointException if there is no such tensor or it is not I32
     * @throws IndexOutOfBoundsException if a range leaves the tensor or the destination
     * @throws IllegalStateException after {@link #close}
     */
    public void readInts(String name, long elementOffset, int[] to, int toOffset, int count) {
        TensorInfo info = info(name);
        if (info.type() != StoredType.I32) {
            throw new CheckpointException(
                    label
                            + ": tensor "
                            + CheckpointException.quote(name)
                            + " is "
                            + info.type()
                            + ", expected I32");
        }
        Objects.checkFromIndexSize(elementOffset, count, info.elements());
        Objects.checkFromIndexSize(toOffset, count, to.length);
        int done = 0;
        while (done < count) {
            int n = (int) Math.min(count - done, WINDOW_STRIDE / 4);
            map(dataStart + info.begin() + (elementOffset + done) * 4, n * 4)
                    .asIntBuffer()
                    .get(to, toOffset + done, n);
            done += n;
        }
    }

    /** Closes the file; buffers handed out stay readable. Calling it again does nothing. */
    @Override
    public void close() {
        closeQuietly(channel);
        windows.clear();
    }

    private static SafetensorsFile read(FileChannel channel, String label) throws IOException {
        long fileBytes = channel.size();
        ByteBuffer prefix = ByteBuffer.allocate(SafetensorsHeader.PREFIX_BYTES);
        while (prefix.hasRemaining() && channel.read(prefix, prefix.position()) > 0) {
            // a short read: go on
        }
        int length = SafetensorsHeader.length(prefix.rewind(), fileBytes, label);
        long dataStart = SafetensorsHeader.PREFIX_BYTES + (long) length;
        ByteBuffer json =
                channel.map(FileChannel.MapMode.READ_ONLY, SafetensorsHeader.PREFIX_BYTES, length);
        SafetensorsHeader header = SafetensorsHeader.parse(json, fileBytes - dataStart, label);
        return new SafetensorsFile(label, channel, fileBytes, dataStart, header);
    }

    private ByteBuffer map(long position, int count) {
        if (!channel.isOpen()) {
            throw new IllegalStateException(label + " is closed: read before closing it");
        }
        long window = position / WINDOW_STRIDE;
        long offset = position - window * WINDOW_STRIDE;
        if (offset + count > Integer.MAX_VALUE) {
            return mapRange(position, count).order(ByteOrder.LITTLE_ENDIAN);
        }
        return windows.computeIfAbsent(window, this::mapWindow)
                .slice((int) offset, count)
                .order(ByteOrder.LITTLE_ENDIAN);
    }

    private MappedByteBuffer mapWindow(long window) {
        long start = window * WINDOW_STRIDE;
        return mapRange(start, Math.min(Integer.MAX_VALUE, fileBytes - start));
    }

    private MappedByteBuffer mapRange(long start, long count) {
        try {
            return channel.map(FileChannel.MapMode.READ_ONLY, start, count);
        } catch (IOException e) {
            throw unreadable(label, e);
        }
    }

    private static void decode(DType type, ByteBuffer from, float[] to, int toOffset, int count) {
        switch (type) {
            case F32 -> from.asFloatBuffer().get(to, toOffset, count);
            case BF16, F16 -> decodeHalves(type, from, to, toOffset, count);
            case F8_E4M3 -> decodeFp8(from, to, toOffset, count);
            case F64 -> {
                for (int i = 0; i < count; i++) {
                    to[toOffset + i] = (float) from.getDouble(i * 8);
                }
            }
            case I32 -> {
                for (int i = 0; i < count; i++) {
                    to[toOffset + i] = from.getInt(i * 4);
                }
            }
            default -> throw new AssertionError(type);
        }
    }

    // why: a bulk copy to an array first lets the compiler vectorise the conversion loop
    private static void decodeHalves(
            DType type, ByteBuffer from, float[] to, int toOffset, int count) {
        short[] chunk = new short[Math.min(count, CHUNK)];
        for (int done = 0; done < count; done += chunk.length) {
            int n = Math.min(chunk.length, count - done);
            from.asShortBuffer().get(done, chunk, 0, n);
            int at = toOffset + done;
            if (type == DType.BF16) {
                for (int i = 0; i < n; i++) {
                    to[at + i] = Float.intBitsToFloat(chunk[i] << 16);
                }
            } else {
                for (int i = 0; i < n; i++) {
                    to[at + i] = Fp16.toFloat(chunk[i]);
                }
            }
        }
    }

    private static void decodeFp8(ByteBuffer from, float[] to, int toOffset, int count) {
        byte[] chunk = new byte[Math.min(count, CHUNK)];
        for (int done = 0; done < count; done += chunk.length) {
            int n = Math.min(chunk.length, count - done);
            from.get(done, chunk, 0, n);
            for (int i = 0; i < n; i++) {
                to[toOffset + done + i] = Fp8E4m3.toFloat(chunk[i]);
            }
        }
    }

    private static CheckpointException unreadable(String label, IOException cause) {
        return new CheckpointException(
                label + ": cannot be read (" + cause + "): check the file and its permissions",
                cause);
    }

    private static void closeQuietly(FileChannel channel) {
        if (channel != null) {
            try {
                channel.close();
            } catch (IOException e) {
                // why: nothing was written, so nothing can be lost
            }
        }
    }
}
