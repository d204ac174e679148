package io.moe4j.cuda;

import io.moe4j.BackendProvider;
import io.moe4j.BackendUnavailableException;
import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceLayout;
import java.util.ArrayList;
import java.util.List;

/**
 * Offers the CUDA backend. Usable where the driver can be loaded, a device of compute capability
 * 8.0 or newer is there, and this build has a kernel image for it; otherwise it says what is
 * missing. Uses device 0, or the one named by the system property {@code moe4j.cuda.device}.
 */
public final class CudaBackendProvider implements BackendProvider {
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
        if (!driver.usable()) {
            return driver;
        }
        List<String> details = new ArrayList<>(driver.details());
        try {
            KernelCatalog catalog = KernelCatalog.choose(Drivers.open(), device());
            details.add("kernels: " + catalog.description());
            return new Availability(true, driver.reason(), details);
        } catch (BackendUnavailableException e) {
            return new Availability(false, e.getMessage(), details);
        }
    }

    @Override
    public MemoryPlan plan(MoeConfig config) {
        return new DeviceLayout(config).plan();
    }

    @Override
    public MoeLayer open(MoeConfig config, String reason) {
        Driver driver = Drivers.open();
        KernelCatalog catalog = KernelCatalog.choose(driver, device());
        return open(driver, catalog, config, reason);
    }

    /** Opens a layer on a given driver: the seam for the checked and the recording driver. */
    static CudaLayer open(Driver driver, KernelCatalog catalog, MoeConfig config, String reason) {
        Context context = new Context(driver, device());
        try {
            return new CudaLayer(config, reason, context, catalog);
        } catch (RuntimeException | Error e) {
            context.close();
            throw e;
        }
    }

    private static int device() {
        return Integer.getInteger("moe4j.cuda.device", 0);
    }
}
