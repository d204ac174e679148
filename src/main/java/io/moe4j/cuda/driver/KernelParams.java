package io.moe4j.cuda.driver;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;

/**
 * The arguments of one kernel launch, packed in page-locked memory together with the table of
 * pointers the driver wants, so that a launch passes one address and allocates nothing. Made by a
 * {@link ParamArena}, which owns the memory. Values may be changed between launches by the thread
 * that launches; the driver copies them before the launch call returns, also under capture.
 */
public final class KernelParams {
    private final ByteBuffer values;
    private final long tableAddress;
    private final int[] offsets;
    private final int[] sizes;

    KernelParams(ByteBuffer values, long tableAddress, int[] offsets, int[] sizes) {
        this.values = values;
        this.tableAddress = tableAddress;
        this.offsets = offsets;
        this.sizes = sizes;
    }

    /** {@return the number of arguments} */
    public int count() {
        return sizes.length;
    }

    /**
     * {@return the size of an argument in bytes}
     *
     * @param index number of the argument, from 0
     */
    public int sizeOf(int index) {
        return sizes[index];
    }

    /**
     * {@return the address of the table of pointers, the {@code kernelParams} of {@code
     * cuLaunchKernel}}
     */
    public long tableAddress() {
        return tableAddress;
    }

    /**
     * Sets an argument of 8 bytes: a pointer, an address or a long.
     *
     * @param index number of the argument, from 0
     * @param value its value
     * @return these arguments
     */
    public KernelParams putLong(int index, long value) {
        values.putLong(offset(index, 8), value);
        return this;
    }

    /**
     * Sets an argument of 4 bytes.
     *
     * @param index number of the argument, from 0
     * @param value its value
     * @return these arguments
     */
    public KernelParams putInt(int index, int value) {
        values.putInt(offset(index, 4), value);
        return this;
    }

    /**
     * Sets an argument of 4 bytes.
     *
     * @param index number of the argument, from 0
     * @param value its value
     * @return these arguments
     */
    public KernelParams putFloat(int index, float value) {
        values.putFloat(offset(index, 4), value);
        return this;
    }

    /**
     * {@return the bytes of an argument, little endian: the way to fill a parameter struct}
     *
     * @param index number of the argument, from 0
     */
    public ByteBuffer bytes(int index) {
        return values.slice(offsets[index], sizes[index]).order(ByteOrder.LITTLE_ENDIAN);
    }

    /** {@return a copy of all argument bytes, in order and without padding between them} */
    public byte[] snapshot() {
        int total = 0;
        for (int size : sizes) {
            total += size;
        }
        byte[] copy = new byte[total];
        int at = 0;
        for (int i = 0; i < sizes.length; i++) {
            values.get(offsets[i], copy, at, sizes[i]);
            at += sizes[i];
        }
        return copy;
    }

    private int offset(int index, int bytes) {
        if (sizes[index] != bytes) {
            throw new IllegalArgumentException(
                    "argument " + index + " has " + sizes[index] + " bytes, not " + bytes);
        }
        return offsets[index];
    }
}
