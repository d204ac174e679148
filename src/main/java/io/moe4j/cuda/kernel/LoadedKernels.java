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
    // What the matrix kernels of a layer are called after
    private static final String MMA = "mma";
    private static final String FUSED = "wgmma";
    private static final String SPLIT = "wgmma_split";
    private static final String PREFILL = "wgmma_prefill";
    private static final String SPLIT_PREFILL = "wgmma_prefill_split";

    /**
     * From so many rows an expert on, pairs of blocks that share weights are no slower, and where
     * routing is uneven mostly faster.
     */
    private static final int PREFILL_ROWS = 32;

    /**
     * The same where a rank's experts have fewer bytes: their chain is so short that the start and
     * the boundary between the products, which cost pairs more, outweigh it.
     */
    private static final int PREFILL_ROWS_OF_FEW_BYTES = 80;

    private static final long FEW_BYTES = 400_000_000;

    private final KernelModule module;
    private final boolean waitsAlone;
    private final Map<String, Kernel> bySymbol = new LinkedHashMap<>();
    private final Flow rows;

    /** Null where rows do not travel in lines. */
    private final Flow lines;

    private Flow flow;

    /**
     * The kernels of one form of the wire.
     *
     * @param bySpan [first][last], in the order of Phase
     */
    private record Flow(Map<Phase, Kernel[]> byPhase, Kernel[][][] bySpan) {}

    /**
     * Measured up to here: with M tokens of H 2048 a kernel for each phase takes 150 µs in place of
     * 193, with H 7168 419 in place of 263; with one token 31 in place of 8.
     */
    private static final int LOCAL_UP_TO = 4096;

    private final Kernel gateUp;
    private final Kernel down;

    LoadedKernels(Context context, KernelCatalog catalog, MoeConfig config, int sharing) {
        waitsAlone = sharing == 1 && config.localRanks() == 1 && config.handles() == 1;
        module = new KernelModule(context, catalog.file(), catalog.imageBytes());
        try {
            int sms = context.attribute(DeviceAttribute.MULTIPROCESSOR_COUNT);
            // why: code for older targets has no wait of its own for the kernel before
            boolean hopper = catalog.defs().stream().anyMatch(KernelCatalog.KernelDef::hopperOnly);
            boolean pdl = hopper && context.driver().pdlSupport().usable();
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
                                grid(def, config, sms, sharing),
                                def.pdl() && pdl && mayStartEarly(def.symbol(), config)));
            }
            String gemm = gemm(config);
            String alone =
                    switch (gemm) {
                        case MMA -> MMA;
                        case PREFILL, SPLIT_PREFILL -> PREFILL;
                        default -> FUSED;
                    };
            gateUp = kernel("moe_gate_up_" + alone);
            down = kernel("moe_down_" + alone);
            boolean lines = DeviceLayout.usesLines(config);
            if (lines && config.localRanks() > sms) {
                throw new IllegalArgumentException(
                        "moe4j.cuda.wire=lines needs a multiprocessor for each rank, but "
                                + config.localRanks()
                                + " ranks share a GPU of "
                                + sms);
            }
            rows = flow(config, gemm, false);
            this.lines = lines ? flow(config, gemm, true) : null;
            flow = lines ? this.lines : rows;
        } catch (RuntimeException | Error e) {
            module.close();
            throw e;
        }
    }

    /**
     * why not the router of a group: its many blocks would stand beside a combine that waits for a
     * peer, and keep out what the peer may wait for.
     */
    private static boolean mayStartEarly(String symbol, MoeConfig config) {
        boolean hidden = config.routingInput() == RoutingInput.HIDDEN;
        String first = hidden ? "moe_route_logits" : "moe_route_topk";
        return config.group() == null || !symbol.equals(first);
    }

    private Flow flow(MoeConfig config, String gemm, boolean lines) {
        Map<Phase, Kernel[]> byPhase = new EnumMap<>(Phase.class);
        for (Phase phase : Phase.values()) {
            byPhase.put(phase, flow(phase, config, gemm, lines));
        }
        return new Flow(byPhase, spans(config, byPhase, lines));
    }

    /** The kernels of a phase in launch order: the chain. */
    private Kernel[] flow(Phase phase, MoeConfig config, String gemm, boolean lines) {
        List<String> symbols = new ArrayList<>();
        switch (phase) {
            case ROUTE -> {
                if (config.routingInput() == RoutingInput.HIDDEN) {
                    symbols.add("moe_route_logits");
                }
                symbols.add("moe_route_topk");
            }
            case DISPATCH_SEND -> symbols.add("moe_dispatch_send" + (lines ? "_lines" : ""));
            case DISPATCH_RECV -> {
                if (lines) {
                    symbols.add("moe_dispatch_recv_lines");
                    break;
                }
                symbols.add("moe_dispatch_recv");
                symbols.add("moe_dispatch_index");
            }
            case EXPERTS -> {
                String alone = gemm.equals(MMA) ? "mma" : "wgmma";
                if (config.usesSharedExpert()) {
                    symbols.add("moe_shared_gate_up_" + alone);
                    symbols.add("moe_shared_down_" + alone);
                }
                if (List.of(FUSED, PREFILL).contains(gemm)) {
                    symbols.add("moe_experts_" + gemm);
                } else {
                    symbols.add(gateUp.symbol());
                    symbols.add(down.symbol());
                }
            }
            case COMBINE_SEND -> symbols.add("moe_combine_send" + (lines ? "_lines" : ""));
            case COMBINE_RECV -> symbols.add("moe_combine_recv" + (lines ? "_lines" : ""));
            default -> throw new IllegalArgumentException("phase " + phase);
        }
        return symbols.stream().map(this::kernel).toArray(Kernel[]::new);
    }

    /** The kernels of every span of phases; one where a span has all that it does. */
    private Kernel[][][] spans(MoeConfig config, Map<Phase, Kernel[]> byPhase, boolean lines) {
        Phase[] phases = Phase.values();
        boolean local =
                config.ranks() == 1
                        && config.maxTokensPerRank() <= LOCAL_UP_TO
                        && DeviceLayout.listsFitOneBlock(config);
        String form = lines ? "lines" : local ? "local" : null;
        Kernel[][][] spans = new Kernel[phases.length][phases.length][];
        for (Phase first : phases) {
            for (int last = first.ordinal(); last < phases.length; last++) {
                List<Kernel> flow = new ArrayList<>();
                for (int i = first.ordinal(); i <= last; i++) {
                    if (form != null
                            && phases[i] == Phase.ROUTE
                            && last >= Phase.DISPATCH_RECV.ordinal()) {
                        if (config.routingInput() != RoutingInput.TOPK) {
                            flow.addAll(List.of(byPhase.get(Phase.ROUTE)));
                        }
                        flow.add(kernel("moe_dispatch_" + form));
                        i = Phase.DISPATCH_RECV.ordinal();
                    } else if (form != null
                            && phases[i] == Phase.COMBINE_SEND
                            && last >= Phase.COMBINE_RECV.ordinal()) {
                        flow.add(kernel("moe_combine_" + form));
                        i = Phase.COMBINE_RECV.ordinal();
                    } else {
                        flow.addAll(List.of(byPhase.get(phases[i])));
                    }
                }
                spans[first.ordinal()][last] = flow.toArray(Kernel[]::new);
            }
        }
        return spans;
    }

    /**
     * Which matrix kernels run, all of which give the same bits: those of wgmma where the image has
     * them, both products in one kernel, one of two by the rows that are expected, never by counts.
     * The system property {@code moe4j.cuda.gemm} may ask for {@code mma}, for {@code wgmma}, for
     * {@code prefill}, or for {@code split}, a kernel for each product: of prefill where the layer
     * would run that.
     */
    private String gemm(MoeConfig config) {
        String wanted = System.getProperty("moe4j.cuda.gemm", "");
        if (!List.of("", "mma", "wgmma", "prefill", "split").contains(wanted)) {
            throw new IllegalArgumentException(
                    "moe4j.cuda.gemm=" + wanted + " is none of mma, wgmma, prefill and split");
        }
        boolean hopper = bySymbol.containsKey("moe_experts_wgmma");
        if (!hopper && !List.of("", "mma").contains(wanted)) {
            throw new BackendUnavailableException(
                    "moe4j.cuda.gemm="
                            + wanted
                            + " needs the kernels for sm_90a, but this image is portable");
        }
        if (wanted.equals("mma") || !hopper) {
            return MMA;
        }
        boolean prefill = isForPrefill(config);
        if (wanted.equals("split")) {
            return prefill ? SPLIT_PREFILL : SPLIT;
        }
        return wanted.equals("prefill") || prefill ? PREFILL : FUSED;
    }

    /**
     * {@return whether a layer's experts run in pairs of blocks that share weights: by the rows
     * that an expert is expected to get and the bytes of a rank's experts}
     *
     * @param config the layer's
     */
    public static boolean isForPrefill(MoeConfig config) {
        long weights = 3L * config.shape().hidden() * config.shape().intermediate();
        long bytes = 2 * weights * config.expertsPerRank();
        return DeviceLayout.averageRows(config)
                >= (bytes < FEW_BYTES ? PREFILL_ROWS_OF_FEW_BYTES : PREFILL_ROWS);
    }

    /**
     * The rules of kernels.def.
     *
     * @param sharing ranks of the group on this GPU
     */
    static int grid(KernelCatalog.KernelDef def, MoeConfig config, int sms, int sharing) {
        // why: ranks wait for each other, so what waits must not take the GPU from what is waited
        // for
        long waiting = sharing > 1 ? sms / (2L * sharing * config.handles()) : Long.MAX_VALUE;
        long together = Math.min(waiting, sms / config.localRanks());
        long m = config.maxTokensPerRank();
        long chunks = (DeviceLayout.pad(config.shape().hidden()) + 2047) / 2048;
        long pieces = (DeviceLayout.pad(config.shape().hidden()) + 239) / 240;
        long wanted =
                switch (def.grid()) {
                    case "logits" -> {
                        long experts = config.shape().experts();
                        yield clamp(Math.max((m * experts + 7) / 8, experts), 4L * sms);
                    }
                    case "tokens" -> clamp(Math.max((m + 7) / 8, Math.min(m, sms)), 8L * sms);
                    case "rows" -> clamp(m * chunks, Math.min(waiting, 2L * sms));
                    case "slots" -> clamp(config.ranks() * m * chunks, 2L * sms);
                    case "experts" -> clamp(config.expertsPerRank(), Math.min(waiting, 4L * sms));
                    case "gemm" -> 2L * sms;
                    case "sm" -> sms;
                    case "pairs" -> Math.max(2, sms / 2 * 2);
                    case "moves" -> clamp(1 + (m * pieces + 15) / 16, together);
                    case "sums" -> clamp(1 + (m * pieces + 3) / 4, together);
                    case "pack" -> 8L * sms;
                    case "peers" -> 2L * config.ranks();
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
     * {@return the kernels of a span of phases, in order} A span that holds routing and dispatch
     * whole, or combine whole, has one kernel for it where the layer has such kernels; results are
     * the same, bit for bit.
     *
     * @param first the first phase
     * @param last the last phase, not before {@code first}
     */
    public Kernel[] flow(Phase first, Phase last) {
        return flow.bySpan()[first.ordinal()][last.ordinal()];
    }

    /**
     * {@return the kernels of a phase alone, in order}
     *
     * @param phase which phase
     */
    public Kernel[] of(Phase phase) {
        return flow.byPhase().get(phase);
    }

    /**
     * {@return whether a kernel of this layer that waits for a peer is the only one on its GPU: one
     * step in flight, and no other rank of the group}
     */
    public boolean waitsAlone() {
        return waitsAlone;
    }

    /** {@return whether rows travel in lines that carry the epoch} */
    public boolean lines() {
        return flow == lines;
    }

    /**
     * Rows travel as rows with a flag behind them from now on, also where the layer was made for
     * lines: all its buffers serve both. For the time before the first step.
     */
    public void useRows() {
        flow = rows;
    }

    /** {@return every kernel that a step may launch, in both forms of the wire: what warms up} */
    public List<Kernel> everyKernelOfAStep() {
        List<Kernel> all = new ArrayList<>();
        for (Flow form : lines == null ? List.of(rows) : List.of(rows, lines)) {
            for (Phase phase : Phase.values()) {
                all.addAll(List.of(form.byPhase().get(phase)));
            }
            Phase[] phases = Phase.values();
            all.addAll(List.of(form.bySpan()[0][phases.length - 1]));
        }
        return all;
    }

    /** {@return the kernel of gate, up and activation alone, for measuring} */
    public Kernel gateUp() {
        return gateUp;
    }

    /** {@return the kernel of the down product alone, for measuring} */
    public Kernel down() {
        return down;
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
