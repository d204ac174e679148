package io.moe4j.cuda.layout;

import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.MoeShape;
import java.util.List;

/**
 * Every device buffer of a layer: the symmetric region that peers write, the workspace of a local
 * rank, and the packed weights. The single source of the memory plan and of all addresses.
 */
public final class DeviceLayout {
    /** Widths are padded to this many elements. */
    public static final int PAD = 64;

    /** Outputs per packed weight tile. */
    public static final int TILE_ROWS = 128;

    /** Most experts of one rank: what the scheduler's lists in shared memory hold. */
    public static final int MAX_EXPERTS_PER_RANK = 1024;

    /** Most groups of a routing rule: what the router's bitmap in shared memory holds. */
    public static final int MAX_GROUPS = 1024;

    /** What a peer writes when a group opens, to prove that it reaches this memory: one tile. */
    public static final int SELF_TEST_BYTES = TILE_ROWS * PAD * 2;

    /** why 2 MiB: another process maps whole pages of that size, so nothing else may lie there. */
    private static final long SHARED_PAGE = 2L << 20;

    /** 128 bytes: 30 words of a row and the epoch. */
    private static final int LINE_BYTES = 128;

    private static final int LINE_WORDS = 30;

    /**
     * Slots of a rank, R · M, up to which rows travel in lines: measured with two ranks, where
     * lines win at 256 tokens and lose at 512 of H 2048, since one block builds the lists.
     */
    private static final long LINES_UP_TO = 512;

    /** What the one block that builds the lists holds: 32 slots a word. */
    private static final int MAX_LISTED_SLOTS = 2048 * 32;

    /** Ids travel as 15 bits. */
    private static final int MAX_LINE_EXPERTS = 32767;

    private final MoeConfig config;
    private final Region symmetric = new Region();
    private final Region workspace = new Region();
    private final Region weights = new Region();
    private final Region pinned = new Region();

    /**
     * Lays out a layer; allocates nothing.
     *
     * @param config the layer's configuration
     * @throws IllegalArgumentException if the kernels cannot run this configuration; names the
     *     limit and the cure
     */
    public DeviceLayout(MoeConfig config) {
        this.config = config;
        requireWithinLimits();
        MoeShape shape = config.shape();
        long r = config.ranks();
        long m = config.maxTokensPerRank();
        long k = shape.topK();
        long l = config.expertsPerRank();
        long e = shape.experts();
        long hp = pad(shape.hidden());
        long ip = pad(shape.intermediate());
        long sp = pad(shape.sharedIntermediate());
        long rows = packedRows();
        boolean shared = config.usesSharedExpert();
        boolean ownRouter = config.routingInput() == RoutingInput.HIDDEN;

        symmetric.add("dispatch_flags", "R*8", r, 8);
        symmetric.add("combine_flags", "R*8", r, 8);
        symmetric.add("abort_words", "R*8", r, 8);
        symmetric.add("recv_tokens", "R*4", r, 4);
        symmetric.add("recv_ids", "R*M*K*4", r, m, k, 4);
        symmetric.add("recv_weights", "R*M*K*4", r, m, k, 4);
        symmetric.add("recv_rows", "R*M*Hp*2", r, m, hp, 2);
        symmetric.add("combine_rows", "R*M*Hp*2", r, m, hp, 2);
        if (usesLines(config)) {
            long each = (2L * (LINE_WORDS - 1)) / k;
            long idLines = (m + each - 1) / each;
            long rowLines = lines((k + 1) / 2 * 2 + hp / 2);
            symmetric.add(
                    "dispatch_lines", "R*(Li+M*Ld)*128", r, idLines + m * rowLines, LINE_BYTES);
            symmetric.add("combine_lines", "R*M*Lc*128", r, m, lines(hp / 2), LINE_BYTES);
        }

        workspace.add("home_tokens", "4", 4);
        workspace.add("home_ids", "M*K*4", m, k, 4);
        workspace.add("home_weights", "M*K*4", m, k, 4);
        workspace.add("home_mask", "M*8", m, 8);
        workspace.add("logits", "M*E*4", ownRouter ? m : 0, e, 4);
        workspace.add("home_rows", "M*Hp*2", shared ? m : 0, hp, 2);
        workspace.add("expert_counts", "L*4", l, 4);
        workspace.add("expert_offsets", "(L+1)*4", l + 1, 4);
        workspace.add("expert_rows", "rows*4", rows, 4);
        workspace.add("packed_row_of", "R*M*K*4", r, m, k, 4);
        workspace.add("activated", "rows*Ip*2", rows, ip, 2);
        workspace.add("expert_out", "rows*Hp*2", rows, hp, 2);
        workspace.add("shared_activated", "M*Sp*2", shared ? m : 0, sp, 2);
        workspace.add("shared_out", "M*Hp*2", shared ? m : 0, hp, 2);
        workspace.add("epoch", "16", 16);
        workspace.add("arrivals", "32", 32);
        workspace.add("totals", "64", 64);
        workspace.add("work", "32", 32);
        workspace.add("expert_done", "L*4", l, 4);
        workspace.add("members", "8", 8);
        workspace.add("peer_totals", "R*32", r, 32);
        workspace.add("received_totals", "R*L*8", r, l, 8);

        long held = config.localExperts();
        String h = config.group() == null ? "E" : "Er";
        weights.add("w_gate_up", h + "*2*Ip*Hp*2", held, gateUpRows(), hp, 2);
        weights.add("w_down", h + "*Hp128*Ip*2", held, downRows(), ip, 2);
        weights.add("bias_gate_up", h + "*2*Ip*4", config.expertBias() ? held : 0, gateUpRows(), 4);
        weights.add("bias_down", h + "*Hp128*4", config.expertBias() ? held : 0, downRows(), 4);
        weights.add("router", "E*H*4", ownRouter ? e : 0, shape.hidden(), 4);
        weights.add("router_bias", "E*4", ownRouter ? e : 0, 4);
        weights.add(
                "correction_bias", "E*4", config.routingInput() == RoutingInput.TOPK ? 0 : e, 4);
        weights.add("w_shared_gate_up", "2*Sp*Hp*2", shared ? 2 * sp : 0, hp, 2);
        weights.add("w_shared_down", "Hp128*Sp*2", shared ? downRows() : 0, sp, 2);
        weights.add("shared_gate", "H*4", shared ? shape.hidden() : 0, 4);

        long local = config.localRanks();
        String each = config.group() == null ? "R*" : "";
        pinned.add("errors", each + "64", local, DeviceStructs.ERROR_RECORD.size());
        pinned.add("counters", each + "64", local, DeviceStructs.SOFT_COUNTERS.size());
        pinned.add("peers", each + "R*64", local, r, DeviceStructs.PEER_STATS.size());
        pinned.add("received", each + "R*L*8", local, r, l, 8);
    }

    private static long lines(long words) {
        return (words + LINE_WORDS - 1) / LINE_WORDS;
    }

    /**
     * {@return whether rows travel in lines that carry the epoch, rather than as rows with a flag
     * behind them} A property of the layer, the same on all its ranks. Ranks of one GPU have no use
     * for it. The system property {@code moe4j.cuda.wire} may ask for {@code lines} or {@code
     * rows}.
     *
     * @param config the layer's configuration
     */
    public static boolean usesLines(MoeConfig config) {
        String wanted = System.getProperty("moe4j.cuda.wire", "");
        if (!List.of("", "rows", "lines").contains(wanted)) {
            throw new IllegalArgumentException(
                    "moe4j.cuda.wire=" + wanted + " is none of rows and lines");
        }
        boolean possible =
                config.ranks() > 1
                        && listsFitOneBlock(config)
                        && config.shape().experts() <= MAX_LINE_EXPERTS;
        if (!possible || wanted.equals("rows")) {
            return false;
        }
        long slots = (long) config.ranks() * config.maxTokensPerRank();
        return wanted.equals("lines") || (config.group() != null && slots <= LINES_UP_TO);
    }

    /**
     * {@return whether a layer's slots fit the kernels that build the lists without a second pass}
     *
     * @param config the layer's configuration
     */
    public static boolean listsFitOneBlock(MoeConfig config) {
        return (long) config.ranks() * config.maxTokensPerRank() <= MAX_LISTED_SLOTS;
    }

    private void requireWithinLimits() {
        requireAtMost(
                "experts per rank",
                config.expertsPerRank(),
                MAX_EXPERTS_PER_RANK,
                "use more ranks");
        requireAtMost("topK", config.shape().topK(), MoeShape.MAX_TOP_K, "choose fewer experts");
        if (config.routingInput() != RoutingInput.TOPK) {
            requireAtMost(
                    "groups", config.rule().groups(), MAX_GROUPS, "route outside the layer (TOPK)");
        }
        requireAtMost(
                "packed rows ranks * maxTokensPerRank * min(topK, experts per rank)",
                packedRows(),
                Integer.MAX_VALUE,
                "lower maxTokensPerRank");
    }

    private static void requireAtMost(String what, long value, long limit, String cure) {
        if (value > limit) {
            throw new IllegalArgumentException(
                    what
                            + "="
                            + value
                            + " exceeds the CUDA backend's limit "
                            + limit
                            + ": "
                            + cure);
        }
    }

    /**
     * Rounds a width up to a multiple of {@link #PAD}.
     *
     * @param width the width
     * @return the padded width
     */
    public static int pad(int width) {
        return (width + PAD - 1) / PAD * PAD;
    }

    /**
     * {@return the rows an expert is expected to get: what the configuration says, or those when
     * all tokens come and are routed evenly, R · M · K / E, rounded up}
     *
     * @param config the layer's configuration
     */
    public static long averageRows(MoeConfig config) {
        if (config.expectedRowsPerExpert() > 0) {
            return config.expectedRowsPerExpert();
        }
        long experts = config.shape().experts();
        long rows = (long) config.ranks() * config.maxTokensPerRank() * config.shape().topK();
        return (rows + experts - 1) / experts;
    }

    /** {@return most packed rows of a rank: R · M · min(K, L)} */
    public long packedRows() {
        return (long) config.ranks()
                * config.maxTokensPerRank()
                * Math.min(config.shape().topK(), config.expertsPerRank());
    }

    /** {@return the packed rows of the gate/up matrix of an expert: 2 · Ip, a multiple of 128} */
    public int gateUpRows() {
        return 2 * pad(config.shape().intermediate());
    }

    /** {@return the packed rows of the down matrix of an expert: H rounded up to 128} */
    public int downRows() {
        return (config.shape().hidden() + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    }

    /** {@return what peers write, one per rank and handle} */
    public Region symmetric() {
        return symmetric;
    }

    /**
     * {@return the bytes of the allocation that holds a symmetric region} In a group it has pages
     * of its own and room at its end for the self-test.
     */
    public long symmetricBytes() {
        if (config.group() == null) {
            return symmetric.size();
        }
        long bytes = selfTestOffset(config.ranks());
        return (bytes + SHARED_PAGE - 1) / SHARED_PAGE * SHARED_PAGE;
    }

    /**
     * {@return where rank {@code source} writes its tile of the self-test, from the start of a
     * symmetric region}
     *
     * @param source rank that writes
     */
    public long selfTestOffset(int source) {
        return symmetric.size() + (long) source * SELF_TEST_BYTES;
    }

    /** {@return what one local rank works in, one per rank and handle} */
    public Region workspace() {
        return workspace;
    }

    /** {@return the packed weights of all experts} */
    public Region weights() {
        return weights;
    }

    /** {@return the page-locked host memory of one handle} */
    public Region pinned() {
        return pinned;
    }

    /** {@return the memory plan: every buffer times the number of local ranks and handles} */
    public MemoryPlan plan() {
        MoeShape shape = config.shape();
        MemoryPlan.Builder plan =
                new MemoryPlan.Builder(
                        String.format(
                                "CUDA backend: R=%d (%s) M=%d H=%d (Hp=%d) I=%d (Ip=%d)"
                                        + " E=%d L=%d K=%d handles N=%d, rows=R*M*min(K,L)=%d",
                                config.ranks(),
                                config.group() == null
                                        ? "virtual ranks"
                                        : "rank "
                                                + config.group().rank()
                                                + " of a group, Er="
                                                + config.localExperts(),
                                config.maxTokensPerRank(),
                                shape.hidden(),
                                pad(shape.hidden()),
                                shape.intermediate(),
                                pad(shape.intermediate()),
                                shape.experts(),
                                config.expertsPerRank(),
                                shape.topK(),
                                config.handles(),
                                packedRows()));
        for (Region.Field field : weights.fields()) {
            plan.add(field.name(), field.formula(), field.bytes());
        }
        addPerRank(plan, symmetric);
        if (config.group() != null) {
            plan.add(
                    "self_test",
                    "N*(R*16384, to 2 MiB)",
                    config.handles(),
                    symmetricBytes() - symmetric.size());
        }
        addPerRank(plan, workspace);
        for (Region.Field field : pinned.fields()) {
            plan.add(
                    field.name() + " (pinned host)",
                    "N*" + field.formula(),
                    config.handles(),
                    field.bytes());
        }
        return plan.build();
    }

    private void addPerRank(MemoryPlan.Builder plan, Region region) {
        for (Region.Field field : region.fields()) {
            plan.add(
                    field.name(),
                    (config.group() == null ? "N*R*" : "N*") + field.formula(),
                    config.handles(),
                    config.localRanks(),
                    field.bytes());
        }
    }
}
