package io.moe4j.cuda;

import io.moe4j.BackendProvider;
import io.moe4j.BackendUnavailableException;
import io.moe4j.HostSyncCheckedLayer;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.cuda.driver.CheckedDriver;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.CudaException;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.nvtx.Nvtx;
import io.moe4j.cuda.nvtx.Ranges;
import io.moe4j.cuda.oracle.LibraryBridge;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;

/**
 * Offers the CUDA backend. Usable where the driver can be loaded, a device of compute capability
 * 8.0 or newer is there, and this build has a kernel image for it; otherwise it says what is
 * missing. Uses device 0, or the one named by the system property {@code moe4j.cuda.device}. With
 * {@code moe4j.cuda.checked=true} every layer refuses driver calls that a step must not make, with
 * an {@link IllegalStateException} that says where they came from; with {@code moe4j.nvtx=true} its
 * work on the host is shown to a profiler as NVTX ranges.
 */
public final class CudaBackendProvider implements BackendProvider {
    private static final String DEVICE = "moe4j.cuda.device";

    /** For {@link java.util.ServiceLoader}; loads no native code. */
    public CudaBackendProvider() {}

    @Override
    public String name() {
        return "cuda";
    }

    @Override
    public int preference() {
        return 100;
    }

    @Override
    public Availability availability() {
        Availability driver = Drivers.availability();
        List<String> details = new ArrayList<>();
        boolean usable = driver.usable();
        String reason = driver.reason();
        if (usable) {
            details.addAll(driver.details());
        } else {
            details.add("driver: " + reason);
            details.add("PDL: not known without a driver");
        }
        details.add("kernels: " + KernelCatalog.shipped());
        if (usable) {
            try {
                KernelCatalog catalog = KernelCatalog.choose(Drivers.open(), device());
                details.add("kernels for GPU " + device() + ": " + catalog.description());
            } catch (BackendUnavailableException | CudaException e) {
                usable = false;
                reason = e.getMessage();
            }
        }
        details.addAll(Installed.LINES);
        return new Availability(usable, reason, details);
    }

    /** What does not change while the process runs, looked for once. */
    private static final class Installed {
        static final List<String> LINES = lines();

        private static List<String> lines() {
            List<String> lines = new ArrayList<>();
            lines.add(onClassPath("jcuda", "jcuda.driver.JCudaDriver", "12.6.0"));
            lines.add(onClassPath("jcublas", "jcuda.jcublas.JCublas2", "12.6.0"));
            lines.add(onClassPath("jcudnn", "jcuda.jcudnn.JCudnn", "11.7.0"));
            lines.addAll(LibraryBridge.statusLines());
            return List.copyOf(lines);
        }

        private static String onClassPath(String artifact, String className, String version) {
            try {
                Class.forName(className, false, CudaBackendProvider.class.getClassLoader());
                return artifact + ": on the class path";
            } catch (ClassNotFoundException | LinkageError e) {
                return artifact
                        + ": not on the class path: add org.jcuda:"
                        + artifact
                        + ":"
                        + version
                        + " and its natives";
            }
        }
    }

    @Override
    public MemoryPlan plan(MoeConfig config) {
        return new DeviceLayout(config).plan();
    }

    @Override
    public MoeLayer open(MoeConfig config, String reason) {
        Driver driver = Drivers.open();
        KernelCatalog catalog = KernelCatalog.choose(driver, device(driver, config));
        return openAsAsked(driver, catalog, config, reason);
    }

    /** Opens a layer with the checks and ranges that properties ask for. */
    static MoeLayer openAsAsked(
            Driver driver, KernelCatalog catalog, MoeConfig config, String reason) {
        Optional<Ranges> ranges = Nvtx.ranges();
        if (Boolean.getBoolean("moe4j.cuda.checked")) {
            CheckedCudaLayer layer =
                    openChecked(driver, CheckedDriver.Mode.THROW, catalog, config, reason);
            return ranges.isEmpty() ? layer : new RangedLayer(layer, ranges.get(), layer.number());
        }
        CudaLayer layer = open(driver, catalog, config, reason);
        return ranges.isEmpty() ? layer : new RangedLayer(layer, ranges.get(), layer.number());
    }

    @Override
    public HostSyncCheckedLayer openHostSyncChecked(MoeConfig config, String reason) {
        Driver driver = Drivers.open();
        KernelCatalog catalog = KernelCatalog.choose(driver, device(driver, config));
        return openChecked(driver, CheckedDriver.Mode.RECORD, catalog, config, reason);
    }

    /** Opens a layer whose steps the host-sync checker watches. */
    static CheckedCudaLayer openChecked(
            Driver driver,
            CheckedDriver.Mode mode,
            KernelCatalog catalog,
            MoeConfig config,
            String reason) {
        CheckedDriver checked = new CheckedDriver(driver, mode);
        return new CheckedCudaLayer(open(checked, catalog, config, reason), checked);
    }

    /** Opens a layer on a given driver: the seam for the checked and the recording driver. */
    static CudaLayer open(Driver driver, KernelCatalog catalog, MoeConfig config, String reason) {
        Context context =
                config.cudaContext() == 0
                        ? new Context(driver, device(driver, config))
                        : Context.ofEngine(driver, config.cudaContext());
        try {
            return new CudaLayer(config, reason, context, catalog);
        } catch (RuntimeException | Error e) {
            context.close();
            throw e;
        }
    }

    private static int device(Driver driver, MoeConfig config) {
        if (config.cudaContext() != 0) {
            return Context.ofEngine(driver, config.cudaContext()).device();
        }
        int devices = driver.deviceCount();
        int device = config.device();
        if (device < 0 && config.group() != null && System.getProperty(DEVICE) == null) {
            return config.group().rank() % Math.max(1, devices);
        }
        device = device < 0 ? device() : device;
        if (device >= devices) {
            throw new IllegalArgumentException(
                    "device=" + device + " but there are " + devices + " GPUs, numbered from 0");
        }
        return device;
    }

    private static int device() {
        return Integer.getInteger(DEVICE, 0);
    }
}
