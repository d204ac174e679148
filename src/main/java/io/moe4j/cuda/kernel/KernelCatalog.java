package io.moe4j.cuda.kernel;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import io.moe4j.BackendUnavailableException;
import io.moe4j.MoeConfig;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceAttribute;
import io.moe4j.cuda.driver.Driver;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;

/**
 * The kernel image of this build that fits a device, and the list of kernels in it. Images come
 * from the jar alone and are checked against the manifest's SHA-256 before they are used; nothing
 * is compiled by this library at run time. Immutable.
 *
 * <p>The system property {@code moe4j.cuda.kernels=ptx} passes over machine code, so that the
 * portable image can be tested on any GPU.
 */
public final class KernelCatalog {
    private static final String FOLDER = "/io/moe4j/kernels/";

    private final String file;
    private final byte[] image;
    private final List<KernelDef> defs;

    private KernelCatalog(String file, byte[] image, List<KernelDef> defs) {
        this.file = file;
        this.image = image;
        this.defs = defs;
    }

    /**
     * One line of {@code kernels.def}.
     *
     * @param symbol name in the module
     * @param threads threads of a block
     * @param dynamicSharedBytes dynamic shared memory of a block
     * @param grid rule for grid.x, see kernels.def
     * @param stage the stage it belongs to
     * @param hopperOnly whether only the images for sm_90a have it
     * @param pdl whether it may start before its predecessor ends
     */
    record KernelDef(
            String symbol,
            int threads,
            int dynamicSharedBytes,
            String grid,
            String stage,
            boolean hopperOnly,
            boolean pdl) {}

    /**
     * {@return the image for a device of this machine}
     *
     * @param driver calls go through it
     * @param device number of the device
     * @throws BackendUnavailableException if this build has none that the device and its driver can
     *     run; names what was found and what is needed
     */
    public static KernelCatalog choose(Driver driver, int device) {
        int major = driver.deviceAttribute(device, DeviceAttribute.COMPUTE_CAPABILITY_MAJOR);
        int minor = driver.deviceAttribute(device, DeviceAttribute.COMPUTE_CAPABILITY_MINOR);
        boolean ptxOnly = "ptx".equals(System.getProperty("moe4j.cuda.kernels"));
        return choose(10 * major + minor, driver.version(), ptxOnly);
    }

    static KernelCatalog choose(int architecture, int cudaVersion, boolean portableOnly) {
        JsonNode modules = manifest().path("modules");
        for (JsonNode module : modules) {
            boolean exact = module.path("match").asText().equals("exact");
            int needs = module.path("architecture").asInt();
            boolean fits = exact ? architecture == needs : architecture >= needs;
            if (!fits || (exact && portableOnly)) {
                continue;
            }
            int minimum = module.path("min_cuda").asInt();
            if (cudaVersion < minimum) {
                throw new BackendUnavailableException(
                        "the driver supports CUDA "
                                + version(cudaVersion)
                                + " but the kernels need CUDA "
                                + version(minimum)
                                + ": install a newer NVIDIA driver (580 or later for CUDA 13)");
            }
            String file = module.path("file").asText();
            return new KernelCatalog(
                    file,
                    verified(file, module.path("sha256").asText()),
                    definitions(exact && needs == 90));
        }
        throw new BackendUnavailableException(
                "the GPU has compute capability "
                        + architecture / 10
                        + "."
                        + architecture % 10
                        + " but the kernels need 8.0 or newer");
    }

    private static String version(int cuda) {
        return cuda / 1000 + "." + cuda % 1000 / 10;
    }

    private static JsonNode manifest() {
        byte[] json = resource("manifest.json");
        if (json == null) {
            throw new BackendUnavailableException(
                    "this build has no GPU kernels: build it where nvcc is installed (make kernels)");
        }
        try {
            return new ObjectMapper().readTree(json);
        } catch (IOException e) {
            throw new IllegalStateException("the kernel manifest in the jar is damaged", e);
        }
    }

    private static byte[] verified(String file, String sha256) {
        byte[] image = resource(file);
        if (image == null) {
            throw new IllegalStateException("kernel image " + file + " is missing in the jar");
        }
        try {
            byte[] digest = MessageDigest.getInstance("SHA-256").digest(image);
            String found = HexFormat.of().formatHex(digest);
            if (!found.equals(sha256)) {
                throw new IllegalStateException(
                        "kernel image "
                                + file
                                + " has SHA-256 "
                                + found
                                + " but the manifest says "
                                + sha256
                                + ": the jar is damaged, build or download it again");
            }
            return image;
        } catch (NoSuchAlgorithmException e) {
            throw new IllegalStateException(e);
        }
    }

    private static List<KernelDef> definitions(boolean hopper) {
        List<KernelDef> defs = new ArrayList<>();
        new String(resource("kernels.def"), StandardCharsets.UTF_8)
                .lines()
                .filter(line -> !line.isBlank() && !line.startsWith("#"))
                .forEach(
                        line -> {
                            String[] c = line.trim().split("\\s+");
                            defs.add(
                                    new KernelDef(
                                            c[0],
                                            Integer.parseInt(c[2]),
                                            Integer.parseInt(c[3]),
                                            c[4],
                                            c[5],
                                            c[6].equals("sm_90a"),
                                            c[7].equals("pdl")));
                        });
        defs.removeIf(def -> def.hopperOnly() && !hopper);
        return List.copyOf(defs);
    }

    private static byte[] resource(String name) {
        try (InputStream in = KernelCatalog.class.getResourceAsStream(FOLDER + name)) {
            return in == null ? null : in.readAllBytes();
        } catch (IOException e) {
            throw new IllegalStateException("cannot read kernel resource " + name, e);
        }
    }

    /** {@return one line: the images of this build, or that there are none and how to get them} */
    public static String shipped() {
        if (resource("manifest.json") == null) {
            return "none in this build: build it where nvcc is installed (make kernels)";
        }
        List<String> files = new ArrayList<>();
        manifest().path("modules").forEach(module -> files.add(module.path("file").asText()));
        return String.join(", ", files) + " in this build";
    }

    /** {@return the file name and size of the image} */
    public String description() {
        return file + ", " + image.length + " bytes, " + defs.size() + " kernels";
    }

    List<KernelDef> defs() {
        return defs;
    }

    /** {@return a copy of the image, for programs that load kernels of their own choice from it} */
    public byte[] imageBytes() {
        return image.clone();
    }

    String file() {
        return file;
    }

    /**
     * Loads the image and resolves every kernel, with the grids of this layer.
     *
     * @param context everything is made and used in it
     * @param config the layer the kernels are for
     * @return the image
     */
    public LoadedKernels load(Context context, MoeConfig config) {
        return load(context, config, 1);
    }

    /**
     * Loads the image for one of several ranks of a group on the same GPU.
     *
     * @param context everything is made and used in it
     * @param config the layer the kernels are for
     * @param sharing ranks of the group on this GPU, at least 1
     * @return the image
     */
    public LoadedKernels load(Context context, MoeConfig config, int sharing) {
        return new LoadedKernels(context, this, config, sharing);
    }
}
