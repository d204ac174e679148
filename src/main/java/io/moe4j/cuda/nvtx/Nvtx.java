package io.moe4j.cuda.nvtx;

import com.sun.jna.Memory;
import com.sun.jna.Native;
import com.sun.jna.NativeLibrary;
import com.sun.jna.Pointer;
import io.moe4j.cuda.driver.PrivateNatives;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Optional;

/**
 * Ranges through the library that a profiler names in {@code NVTX_INJECTION64_PATH}, as Nsight
 * Systems does, or through {@code libnvToolsExt.so.1} of CUDA 12 and older. Asked for by the system
 * property {@code moe4j.nvtx}; what was found is said once in the log.
 */
public final class Nvtx {
    private static final System.Logger LOG = System.getLogger("io.moe4j");
    private static final String LIBRARY = "libmoe4j_nvtx.so";

    private Nvtx() {}

    /** {@return the ranges, if {@code moe4j.nvtx=true} and a profiler takes them} */
    public static Optional<Ranges> ranges() {
        return Boolean.getBoolean("moe4j.nvtx") ? Found.RANGES : Optional.empty();
    }

    /** Looked for once. */
    private static final class Found {
        static final Optional<Ranges> RANGES = find();

        private static Optional<Ranges> find() {
            try {
                return open();
            } catch (Exception | LinkageError e) {
                return none(e.toString());
            }
        }
    }

    private static Optional<Ranges> open() throws Exception {
        String resource = "/io/moe4j/natives/linux-x86_64/" + LIBRARY;
        if (Nvtx.class.getResource(resource) == null) {
            return none("this build has no " + LIBRARY + ": build on a machine with gcc");
        }
        try (PrivateNatives natives = PrivateNatives.create()) {
            Path file = natives.extract(Nvtx.class, resource, LIBRARY);
            int way = natives.asTemporaryDirectory(() -> Bridge.load(file));
            if (way == 0) {
                return none(missing());
            }
            LOG.log(
                    System.Logger.Level.INFO,
                    "NVTX ranges through "
                            + (way == 1
                                    ? System.getenv("NVTX_INJECTION64_PATH")
                                    : "libnvToolsExt.so.1"));
            return Optional.of(new Bridge());
        }
    }

    private static String missing() {
        String injection = System.getenv("NVTX_INJECTION64_PATH");
        return injection == null
                ? "no profiler set NVTX_INJECTION64_PATH and there is no libnvToolsExt.so.1: start"
                        + " the program under nsys profile --trace=nvtx"
                : injection + ", named by NVTX_INJECTION64_PATH, takes none";
    }

    private static Optional<Ranges> none(String reason) {
        LOG.log(System.Logger.Level.WARNING, "moe4j.nvtx=true but no NVTX ranges: " + reason);
        return Optional.empty();
    }

    /** why bound directly: such a call makes no object, a JNA Function makes an array. */
    private static final class Bridge implements Ranges {
        private static final List<Memory> NAMES = Collections.synchronizedList(new ArrayList<>());

        static int load(Path file) {
            if (Native.POINTER_SIZE != 8) {
                throw new UnsatisfiedLinkError("a 64-bit JVM is needed");
            }
            Native.register(Bridge.class, NativeLibrary.getInstance(file.toString()));
            return moe4j_nvtx_open();
        }

        private static native int moe4j_nvtx_open();

        private static native int moe4j_nvtx_push(long name);

        private static native int moe4j_nvtx_pop();

        @Override
        public long name(String text) {
            byte[] bytes = Native.toByteArray(text, "UTF-8");
            Memory name = new Memory(bytes.length);
            name.write(0, bytes, 0, bytes.length);
            NAMES.add(name);
            return Pointer.nativeValue(name);
        }

        @Override
        public void push(long name) {
            moe4j_nvtx_push(name);
        }

        @Override
        public void pop() {
            moe4j_nvtx_pop();
        }
    }
}
