package io.moe4j.tensor;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Arrays;
import java.util.Objects;

/**
 * A typed, row-major view of memory that somebody else owns: either host memory (a {@link
 * ByteBuffer}, read little-endian) or device memory (a raw address). A tensor never frees anything
 * and holds no context; the owner keeps the memory alive while a layer may touch it.
 *
 * <p>Instances are immutable and may be shared between threads; the memory behind them follows the
 * owner's rules.
 */
public final class Tensor {
    private final DType dtype;
    private final long[] shape;
    private final long elements;
    private final ByteBuffer host;
    private final long address;

    private Tensor(DType dtype, long[] shape, ByteBuffer host, long address) {
        this.dtype = Objects.requireNonNull(dtype, "dtype");
        this.shape = shape.clone();
        this.elements = elements(shape);
        this.host = host;
        this.address = address;
    }

    /**
     * A view of host memory from the buffer's position on.
     *
     * @param buffer heap or direct; its byte order is ignored, elements are little-endian
     * @param dtype element type
     * @param shape sizes, the last one contiguous
     * @return the view; it shares the buffer's content and does not move its position
     * @throws IllegalArgumentException if fewer bytes remain than the shape needs
     */
    public static Tensor host(ByteBuffer buffer, DType dtype, long... shape) {
        long needed = Math.multiplyExact(elements(shape), dtype.bytes());
        if (buffer.remaining() < needed) {
            throw new IllegalArgumentException(
                    "buffer has "
                            + buffer.remaining()
                            + " bytes left but "
                            + dtype
                            + Arrays.toString(shape)
                            + " needs "
                            + needed
                            + ": pass a larger buffer or a smaller shape");
        }
        return new Tensor(dtype, shape, buffer.slice().order(ByteOrder.LITTLE_ENDIAN), 0L);
    }

    /**
     * New zeroed direct host memory, freed by the garbage collector.
     *
     * @param dtype element type
     * @param shape sizes, the last one contiguous
     * @return the tensor
     * @throws IllegalArgumentException if the tensor needs 2 GiB or more (the limit of one buffer)
     */
    public static Tensor allocateHost(DType dtype, long... shape) {
        long bytes = Math.multiplyExact(elements(shape), dtype.bytes());
        if (bytes > Integer.MAX_VALUE) {
            throw new IllegalArgumentException(
                    "a host tensor of "
                            + bytes
                            + " bytes does not fit one buffer (limit 2147483647): split it");
        }
        return host(ByteBuffer.allocateDirect((int) bytes), dtype, shape);
    }

    /**
     * A new host tensor of type F32 with a copy of {@code values}.
     *
     * @param values as many as the shape has elements; copied
     * @param shape sizes, the last one contiguous
     * @return the tensor
     * @throws IllegalArgumentException if the number of values does not fit the shape
     */
    public static Tensor ofFloats(float[] values, long... shape) {
        Tensor tensor = allocateHost(DType.F32, shape);
        tensor.setFloats(values);
        return tensor;
    }

    /**
     * A new host tensor of type I32 with a copy of {@code values}.
     *
     * @param values as many as the shape has elements; copied
     * @param shape sizes, the last one contiguous
     * @return the tensor
     * @throws IllegalArgumentException if the number of values does not fit the shape
     */
    public static Tensor ofInts(int[] values, long... shape) {
        Tensor tensor = allocateHost(DType.I32, shape);
        tensor.requireCount(values.length);
        tensor.host.asIntBuffer().put(values);
        return tensor;
    }

    /**
     * A view of device memory.
     *
     * @param address device address in bytes (a CUdeviceptr), owned by the caller
     * @param dtype element type
     * @param shape sizes, the last one contiguous
     * @return the view; it owns nothing, and the memory must outlive every step and graph that uses
     *     it
     * @throws IllegalArgumentException if the address is 0 or not aligned to the element size
     */
    public static Tensor device(long address, DType dtype, long... shape) {
        if (address == 0L) {
            throw new IllegalArgumentException(
                    "device address is 0: pass the address the allocation returned");
        }
        if (address % dtype.bytes() != 0) {
            throw new IllegalArgumentException(
                    String.format(
                            "device address 0x%x is not aligned to %s (%d bytes): align the allocation",
                            address, dtype, dtype.bytes()));
        }
        return new Tensor(dtype, shape, null, address);
    }

    /** {@return the element type} */
    public DType dtype() {
        return dtype;
    }

    /** {@return a copy of the shape} */
    public long[] shape() {
        return shape.clone();
    }

    /** {@return the number of elements} */
    public long elements() {
        return elements;
    }

    /** {@return the number of bytes: elements × element size} */
    public long bytes() {
        return elements * dtype.bytes();
    }

    /** {@return true if the memory is host memory} */
    public boolean isHost() {
        return host != null;
    }

    /**
     * {@return the device address in bytes}
     *
     * @throws IllegalStateException for host memory
     */
    public long address() {
        if (host != null) {
            throw new IllegalStateException("a host tensor has no device address");
        }
        return address;
    }

    /**
     * {@return the host memory, little-endian, position 0; shares content with this tensor}
     *
     * @throws IllegalStateException for device memory
     */
    public ByteBuffer buffer() {
        if (host == null) {
            throw new IllegalStateException(
                    "tensor " + this + " is device memory: copy it to the host first");
        }
        return host.duplicate().order(ByteOrder.LITTLE_ENDIAN);
    }

    /**
     * {@return the element {@code index} widened to float; host tensors of any floating or I32
     * type}
     *
     * @param index element, row-major
     * @throws IllegalStateException for device memory
     */
    public float getFloat(long index) {
        int i = Math.toIntExact(Objects.checkIndex(index, elements));
        return switch (dtype) {
            case F32 -> host.getFloat(i * 4);
            case BF16 -> Bf16.toFloat(host.getShort(i * 2));
            case F16 -> Fp16.toFloat(host.getShort(i * 2));
            case F8_E4M3 -> Fp8E4m3.toFloat(host.get(i));
            case F64 -> (float) host.getDouble(i * 8);
            case I32 -> host.getInt(i * 4);
            default -> throw new IllegalStateException("no float view of " + dtype);
        };
    }

    /**
     * Stores {@code value}, rounded to nearest even; host tensors of type F32, F16 or BF16.
     *
     * @param index element, row-major
     * @param value stored as the nearest value of the type
     * @throws IllegalStateException for device memory
     */
    public void setFloat(long index, float value) {
        int i = Math.toIntExact(Objects.checkIndex(index, elements));
        switch (dtype) {
            case F32 -> host.putFloat(i * 4, value);
            case BF16 -> host.putShort(i * 2, Bf16.fromFloat(value));
            case F16 -> host.putShort(i * 2, Fp16.fromFloat(value));
            default -> throw new IllegalStateException("cannot store a float as " + dtype);
        }
    }

    /**
     * {@return the element {@code index} of an I32 host tensor}
     *
     * @param index element, row-major
     * @throws IllegalStateException for device memory
     */
    public int getInt(long index) {
        requireInts();
        return host.getInt(Math.toIntExact(Objects.checkIndex(index, elements)) * 4);
    }

    /**
     * Stores element {@code index} of an I32 host tensor.
     *
     * @param index element, row-major
     * @param value the value
     * @throws IllegalStateException for device memory
     */
    public void setInt(long index, int value) {
        requireInts();
        host.putInt(Math.toIntExact(Objects.checkIndex(index, elements)) * 4, value);
    }

    /**
     * {@return all elements widened to float, row-major; host tensors only}
     *
     * @throws IllegalStateException for device memory
     */
    public float[] toFloats() {
        float[] values = new float[Math.toIntExact(elements)];
        readFloats(0, values, 0, values.length);
        return values;
    }

    /**
     * {@return all elements of an I32 host tensor, row-major}
     *
     * @throws IllegalStateException for device memory
     */
    public int[] toInts() {
        requireInts();
        int[] values = new int[Math.toIntExact(elements)];
        host.asIntBuffer().get(values);
        return values;
    }

    /**
     * Fills a host tensor from {@code values}, rounding to nearest even.
     *
     * @param values as many as the tensor has elements, row-major
     * @throws IllegalStateException for device memory
     */
    public void setFloats(float[] values) {
        requireCount(values.length);
        writeFloats(values, 0, 0, values.length);
    }

    /**
     * Reads {@code count} elements from element {@code from} on, widened; host tensors only.
     *
     * @param from first element, row-major
     * @param to destination
     * @param toOffset first element of the destination
     * @param count how many
     * @throws IllegalStateException for device memory
     */
    public void readFloats(long from, float[] to, int toOffset, int count) {
        Objects.checkFromIndexSize(from, count, elements);
        ByteBuffer bytes = buffer();
        int at = Math.toIntExact(from) * dtype.bytes();
        switch (dtype) {
            case F32 ->
                    bytes.position(at)
                            .slice()
                            .order(ByteOrder.LITTLE_ENDIAN)
                            .asFloatBuffer()
                            .get(to, toOffset, count);
            case BF16 -> {
                for (int i = 0; i < count; i++) {
                    to[toOffset + i] = Bf16.toFloat(bytes.getShort(at + 2 * i));
                }
            }
            case F16 -> {
                for (int i = 0; i < count; i++) {
                    to[toOffset + i] = Fp16.toFloat(bytes.getShort(at + 2 * i));
                }
            }
            default -> {
                for (int i = 0; i < count; i++) {
                    to[toOffset + i] = getFloat(from + i);
                }
            }
        }
    }

    /**
     * Stores {@code count} values at element {@code to} on, rounded; host tensors only.
     *
     * @param from source
     * @param fromOffset first element of the source
     * @param to first element of the tensor, row-major
     * @param count how many
     * @throws IllegalStateException for device memory
     */
    public void writeFloats(float[] from, int fromOffset, long to, int count) {
        Objects.checkFromIndexSize(to, count, elements);
        ByteBuffer bytes = buffer();
        int at = Math.toIntExact(to) * dtype.bytes();
        switch (dtype) {
            case F32 ->
                    bytes.position(at)
                            .slice()
                            .order(ByteOrder.LITTLE_ENDIAN)
                            .asFloatBuffer()
                            .put(from, fromOffset, count);
            case BF16 -> {
                for (int i = 0; i < count; i++) {
                    bytes.putShort(at + 2 * i, Bf16.fromFloat(from[fromOffset + i]));
                }
            }
            case F16 -> {
                for (int i = 0; i < count; i++) {
                    bytes.putShort(at + 2 * i, Fp16.fromFloat(from[fromOffset + i]));
                }
            }
            default -> throw new IllegalStateException("cannot store floats as " + dtype);
        }
    }

    /**
     * {@return true if the other tensor is of this type and shape and stands for the same memory:
     * the same device address; on the host the same tensor, or a copy of the reference to it}
     *
     * @param other any tensor
     */
    public boolean isSameAs(Tensor other) {
        return other == this
                || (other != null
                        && host == null
                        && other.host == null
                        && address == other.address
                        && dtype == other.dtype
                        && Arrays.equals(shape, other.shape));
    }

    /**
     * {@return true if the shape is exactly {@code expected}}
     *
     * @param expected the sizes, outermost first
     */
    public boolean hasShape(long... expected) {
        return Arrays.equals(shape, expected);
    }

    /** For example {@code BF16[8, 2048] host}. */
    @Override
    public String toString() {
        return dtype + Arrays.toString(shape) + (host != null ? " host" : " device");
    }

    private static long elements(long[] shape) {
        long product = 1;
        for (long extent : shape) {
            if (extent < 0) {
                throw new IllegalArgumentException(
                        "shape " + Arrays.toString(shape) + " has a negative extent");
            }
            product = Math.multiplyExact(product, extent);
        }
        return product;
    }

    private void requireInts() {
        if (dtype != DType.I32 || host == null) {
            throw new IllegalStateException("tensor " + this + " is not an I32 host tensor");
        }
    }

    private void requireCount(int count) {
        if (count != elements) {
            throw new IllegalArgumentException(
                    "got " + count + " values for " + this + ", which has " + elements);
        }
    }
}
