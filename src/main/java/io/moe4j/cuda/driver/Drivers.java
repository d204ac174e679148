package io.moe4j.cuda.driver;

import io.moe4j.BackendProvider.Availability;
import io.moe4j.BackendUnavailableException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.locks.ReentrantLock;

/**
 * The way to the CUDA driver of this machine. Says why there is none instead of failing with a
 * linker error, and can be asked again: a failed attempt leaves no class behind that can never be
 * initialised.
 */
public final class Drivers {
    private static final String JCUDA_DRIVER = "jcuda.driver.JCudaDriver";
    private static final ReentrantLock LOCK = new ReentrantLock();
    private static Driver opened;

    private Drivers() {}

    /**
     * {@return whether a driver and at least one device can be used here, and which; never throws}
     * The first call loads the native libraries.
     */
    public static Availability availability() {
        try {
            Driver driver = open();
            return new Availability(true, summary(driver), details(driver));
        } catch (BackendUnavailableException | CudaException e) {
            return new Availability(false, e.getMessage(), List.of());
        }
    }

    /**
     * {@return the driver of this machine, initialised, with at least one device}
     *
     * @throws BackendUnavailableException saying what is missing
     */
    public static Driver open() {
        LOCK.lock();
        try {
            if (opened == null) {
                opened = load();
            }
            return opened;
        } finally {
            LOCK.unlock();
        }
    }

    private static Driver load() {
        requirePlatform(System.getProperty("os.name"), System.getProperty("os.arch"));
        Class<?> jcuda = findJCuda();
        try {
            loadNatives(jcuda);
            NativeDriver driver = new NativeDriver();
            driver.initialize();
            if (driver.deviceCount() == 0) {
                throw new CudaException(Call.DEVICE_GET_COUNT, CudaErrors.NO_DEVICE, "");
            }
            return driver;
        } catch (CudaException e) {
            throw unavailable("no CUDA device: " + e.getMessage(), e);
        } catch (BackendUnavailableException e) {
            throw e;
        } catch (Exception | LinkageError e) {
            throw unavailable("the JCuda library could not be loaded: " + firstLine(e), e);
        }
    }

    static void requirePlatform(String os, String arch) {
        if (!os.toLowerCase(java.util.Locale.ROOT).contains("linux")
                || !(arch.equals("amd64") || arch.equals("x86_64"))) {
            throw new BackendUnavailableException(
                    "the CUDA backend runs on Linux x86_64 only, this is " + os + " " + arch);
        }
    }

    private static Class<?> findJCuda() {
        try {
            return Class.forName(JCUDA_DRIVER, false, Drivers.class.getClassLoader());
        } catch (ClassNotFoundException e) {
            throw unavailable(
                    "JCuda is not on the class path: add org.jcuda:jcuda:12.6.0 and"
                            + " org.jcuda:jcuda-natives:12.6.0:linux-x86_64",
                    e);
        }
    }

    private static void loadNatives(Class<?> jcuda) throws Exception {
        String file = "libJCudaDriver-" + jcudaVersion(jcuda) + "-linux-x86_64.so";
        try (PrivateNatives natives = PrivateNatives.create()) {
            Path library = natives.extract(jcuda, "/lib/" + file, file);
            if (jcuda.getClassLoader() == Drivers.class.getClassLoader()) {
                // why: if libcuda is missing this fails before JCudaDriver is touched, whose
                // static initialiser would otherwise fail for good
                loadFirst(library);
            }
            natives.asTemporaryDirectory(
                    () -> Class.forName(JCUDA_DRIVER, true, jcuda.getClassLoader()));
        }
    }

    private static String jcudaVersion(Class<?> jcuda) throws ReflectiveOperationException {
        Class<?> version = Class.forName("jcuda.JCudaVersion", false, jcuda.getClassLoader());
        return (String) version.getMethod("get").invoke(null);
    }

    private static void loadFirst(Path library) {
        try {
            System.load(library.toString());
        } catch (UnsatisfiedLinkError e) {
            String message = firstLine(e);
            if (message.contains("libcuda.so")) {
                throw unavailable("no NVIDIA driver: libcuda.so.1 was not found", e);
            }
            if (message.contains("failed to map segment")) {
                throw unavailable(
                        library.getParent().getParent()
                                + " is mounted noexec: set -Djava.io.tmpdir to another directory",
                        e);
            }
            throw unavailable("the JCuda library could not be loaded: " + message, e);
        }
    }

    private static BackendUnavailableException unavailable(String reason, Throwable cause) {
        BackendUnavailableException e = new BackendUnavailableException(reason);
        e.initCause(cause);
        return e;
    }

    private static String firstLine(Throwable t) {
        Throwable root = t;
        while (root instanceof ExceptionInInitializerError && root.getCause() != null) {
            root = root.getCause();
        }
        String message = root.getMessage() == null ? root.toString() : root.getMessage();
        return message.lines().findFirst().orElse(root.toString());
    }

    private static String summary(Driver driver) {
        int count = driver.deviceCount();
        return (count > 1 ? count + " × " : "")
                + driver.deviceName(0)
                + " (compute capability "
                + computeCapability(driver, 0)
                + "), driver for CUDA "
                + driver.version() / 1000
                + "."
                + driver.version() % 1000 / 10;
    }

    private static List<String> details(Driver driver) {
        List<String> lines = new ArrayList<>();
        for (int device = 0; device < driver.deviceCount(); device++) {
            lines.add(
                    "GPU "
                            + device
                            + ": "
                            + driver.deviceName(device)
                            + ", "
                            + driver.devicePciBusId(device)
                            + ", compute capability "
                            + computeCapability(driver, device)
                            + ", "
                            + driver.deviceAttribute(device, DeviceAttribute.MULTIPROCESSOR_COUNT)
                            + " SMs, "
                            + (driver.deviceTotalMemory(device) >> 20)
                            + " MiB");
        }
        lines.add("PDL: " + driver.pdlSupport().reason());
        return lines;
    }

    private static String computeCapability(Driver driver, int device) {
        return driver.deviceAttribute(device, DeviceAttribute.COMPUTE_CAPABILITY_MAJOR)
                + "."
                + driver.deviceAttribute(device, DeviceAttribute.COMPUTE_CAPABILITY_MINOR);
    }
}
