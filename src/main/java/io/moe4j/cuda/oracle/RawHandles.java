package io.moe4j.cuda.oracle;

import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import jcuda.NativePointerObject;
import jcuda.Pointer;
import jcuda.driver.CUdeviceptr;
import jcuda.driver.CUstream;
import jcuda.runtime.cudaStream_t;

/** JCuda objects for the raw addresses and handles that the rest of moe4j uses. Stateless. */
final class RawHandles {
    private static final VarHandle NATIVE_POINTER = nativePointer();

    private RawHandles() {}

    /** A device address. */
    static Pointer device(long address) {
        CUdeviceptr pointer = new CUdeviceptr();
        NATIVE_POINTER.set((NativePointerObject) pointer, address);
        return pointer;
    }

    /** A stream. */
    static cudaStream_t stream(long handle) {
        CUstream stream = new CUstream();
        NATIVE_POINTER.set((NativePointerObject) stream, handle);
        return new cudaStream_t(stream);
    }

    private static VarHandle nativePointer() {
        try {
            return MethodHandles.privateLookupIn(NativePointerObject.class, MethodHandles.lookup())
                    .findVarHandle(NativePointerObject.class, "nativePointer", long.class);
        } catch (ReflectiveOperationException e) {
            throw new LinkageError("use JCuda 12.6.0 on the class path", e);
        }
    }
}
