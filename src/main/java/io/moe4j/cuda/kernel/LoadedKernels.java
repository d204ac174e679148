package io.moe4j.cuda.kernel;

import io.moe4j.BackendUnavailableException;
import io.moe4j.MoeConfig;
import io.moe4j.Phase;
import io.moe4j.RoutingInput;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceAttribute;
import io.moe4j.cuda.driver.KernelModule;
import io.moe4j.cuda.layout.DeviceLayout;
import java.util.ArrayList;
import java.util.EnumMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * A layer's kernels, loaded and resolved: which run in each phase, in order, and with which grid.
 * Grids depend on the layer's sizes and the GPU alone, never on counts. Owned by a layer.
 */
public final class LoadedKernels implements AutoCloseable {
    private static final int SOME_ROWS = 64;

    private final KernelModule module;
    private final Map<String, Kernel> bySymbol = new LinkedHashMap<>();
    private final Map<Phase, Kernel[]> byPhase = new EnumMap<>(Phase.class);

    LoadedKernels(Context context, KernelCatalog catalog, MoeConfig config) {
        module = new KernelModule(context, catalog.file(), catalog.imageBytes());
        try {
            int sms = context.attribute(DeviceAttribute.MULTIPROCESSOR_COUNT);
            boolean pdl = context.driver().pdlSupport().usable();
            for (KernelCatalog.KernelDef def : catalog.defs()) {
                long function =
                        def.dynamicSharedBytes() == 0
                                ? module.function(def.symbol())
                                : module.function(def.symbol(), def.dynamicSharedBytes());
                bySymbol.put(
                        def.symbol(),
                        new Kernel(
                                def.symbol(),
                                function,
                                def.threads(),
                                def.dynamicSharedBytes(),
                                grid(def, config, sms),
                                def.pdl() && pdl));
            }
            String gemm = gemm(config, sms);
            for (Phase phase : Phase.values()) {
                byPhase.put(phase, flow(phase, config, gemm));
            }
        } catch (RuntimeException | Error e) {
            module.close();
            throw e;
        }
    }

    /** The kernels of a phase in launch order: the chain. */
    private Kernel[] flow(Phase phase, MoeConfig config, String gemm) {
        List<String> symbols = new ArrayList<>();
        switch (phase) {
            case ROUTE -> {
                if (config.routingInput() == RoutingInput.HIDDEN) {
                    symbols.add("moe_route_logits");
                }
                symbols.add("moe_route_topk");
            }
            case DISPATCH_SEND -> symbols.add("moe_dispatch_send");
            case DISPATCH_RECV -> {
                symbols.add("moe_dispatch_recv");
                symbols.add("moe_dispatch_index");
            }
            case EXPERTS -> {
                if (config.usesSharedExpert()) {
                    String shared = gemm.equals("mma") ? "mma" : "wgmma";
                    symbols.add("moe_shared_gate_up_" + shared);
                    symbols.add("moe_shared_down_" + shared);
                }
                symbols.add("moe_gate_up_" + gemm);
                symbols.add("moe_down_" + gemm);
            }
            case COMBINE_SEND -> symbols.add("moe_combine_send");
            case COMBINE_RECV -> symbols.add("moe_combine_recv");
            default -> throw new IllegalArgumentException("phase " + phase);
        }
        return symbols.stream().map(this::kernel).toArray(Kernel[]::new);
    }

    /**
     * Which matrix kernels run, all of which give the same bits: those of wgmma where the image has
     * them, unless the system property {@code moe4j.cuda.gemm} asks for {@code mma}. They come for
     * few, some and many rows of an expert; the choice is by the layer's sizes, never by counts.
     */
    private String gemm(MoeConfig config, int sms) {
        String wanted = System.getProperty("moe4j.cuda.gemm", "");
        if (!List.of("", "mma", "wgmma").contains(wanted)) {
            throw new IllegalArgumentException(
                    "moe4j.cuda.gemm=" + wanted + " is neither mma nor wgmma");
        }
        boolean hopper = bySymbol.containsKey("moe_gate_up_wgmma");
        if (wanted.equals("wgmma") && !hopper) {
            throw new BackendUnavailableException(
                    "moe4j.cuda.gemm=wgmma needs the kernels for sm_90a, but this image is portable");
        }
        if (wanted.equals("mma") || !hopper) {
            return "mma";
        }
        long rows = DeviceLayout.averageRows(config);
        if (rows <= DeviceLayout.FEW_ROWS) {
            return "wgmma_few";
        }
        // Tiles for fewer than two rounds fill the SMs better by two small CTAs each
        long tiles =
                (long) config.expertsPerRank()
                        * (2 * DeviceLayout.pad(config.shape().intermediate()) / 128);
        return rows <= SOME_ROWS && tiles <= 2L * sms ? "wgmma_some" : "wgmma";
    }

    /** The rules of kernels.def. */
    static int grid(KernelCatalog.KernelDef def, MoeConfig config, int sms) {
        long m = config.maxTokensPerRank();
        long chunks = (DeviceLayout.pad(config.shape().hidden()) + 2047) / 2048;
        long wanted =
                switch (def.grid()) {
                    case "logits" -> clamp((m * config.shape().experts() + 7) / 8, 4L * sms);
                    case "tokens" -> clamp((m + 3) / 4, 8L * sms);
                    case "rows" -> clamp(m * chunks, 2L * sms);
                    case "slots" -> clamp(config.ranks() * m * chunks, 2L * sms);
                    case "experts" -> clamp(config.expertsPerRank(), 4L * sms);
                    case "gemm" -> 2L * sms;
                    case "sm" -> sms;
                    case "pack" -> 8L * sms;
                    case "one" -> 1;
                    default ->
                            throw new IllegalStateException(
                                    "kernel "
                                            + def.symbol()
                                            + " has the unknown grid rule "
                                            + def.grid());
                };
        return (int) wanted;
    }

    private static long clamp(long wanted, long most) {
        return Math.max(1, Math.min(wanted, most));
    }

    /**
     * {@return the kernels of a phase, in order}
     *
     * @param phase which phase
     */
    public Kernel[] of(Phase phase) {
        return byPhase.get(phase);
    }

    /**
     * {@return a kernel by its symbol}
     *
     * @param symbol its name in the image
     */
    public Kernel kernel(String symbol) {
        Kernel kernel = bySymbol.get(symbol);
        if (kernel == null) {
            throw new IllegalStateException(
                    "the kernel image has no " + symbol + ": it is older than this library");
        }
        return kernel;
    }

    /** Unloads the image. */
    @Override
    public void close() {
        module.close();
    }
}
