package io.moe4j.cuda.layout;

import java.util.List;

/** The structs of {@code step_params.cuh}, field by field in the same order. */
public final class DeviceStructs {
    /** Hard fault, in pinned memory, one per local rank. */
    public static final CStruct ERROR_RECORD =
            CStruct.of(
                    "ErrorRecord",
                    "u32 code",
                    "u32 op",
                    "u32 rank",
                    "u32 peer",
                    "u64 epoch_expected",
                    "u64 epoch_seen",
                    "u64 waited_ns",
                    "u64 valid_epoch",
                    "u64 epoch",
                    "u64 reserved");

    /** Totals of tolerated input, in pinned memory, one per local rank. */
    public static final CStruct SOFT_COUNTERS =
            CStruct.of(
                    "SoftCounters",
                    "u64 steps",
                    "u64 dropped_ids",
                    "u64 duplicate_ids",
                    "u64 over_capacity_tokens",
                    "u64 lost_rows",
                    "u64 reserved0",
                    "u64 reserved1",
                    "u64 reserved2");

    /** What a local rank received from a rank of the group, and how long it waited for it. */
    public static final CStruct PEER_STATS =
            CStruct.of(
                    "PeerStats",
                    "u64 rows_received",
                    "u64 waited_ns",
                    "u64 waited_ns_combine",
                    "u64 waited_total_ns",
                    "u64 reserved0",
                    "u64 reserved1",
                    "u64 reserved2",
                    "u64 reserved3");

    /** A rank's symmetric region as this GPU addresses it. */
    public static final CStruct RANK_VIEW = CStruct.of("RankView", "ptr symmetric");

    /** The caller's tensors and the workspace of a local rank. */
    public static final CStruct LOCAL_RANK =
            CStruct.of(
                    "LocalRank",
                    "ptr hidden",
                    "ptr token_count",
                    "ptr topk_ids",
                    "ptr topk_weights",
                    "ptr router_logits",
                    "ptr out",
                    "i32 accumulate",
                    "i32 rank",
                    "i32 local_experts",
                    "i32 pad0",
                    "ptr home_tokens",
                    "ptr home_ids",
                    "ptr home_weights",
                    "ptr home_mask",
                    "ptr logits",
                    "ptr home_rows",
                    "ptr expert_counts",
                    "ptr expert_offsets",
                    "ptr expert_rows",
                    "ptr packed_row_of",
                    "ptr activated",
                    "ptr expert_out",
                    "ptr shared_activated",
                    "ptr shared_out",
                    "ptr epoch",
                    "ptr arrivals",
                    "ptr totals",
                    "ptr error",
                    "ptr counters",
                    "ptr w_gate_up",
                    "ptr w_down",
                    "ptr bias_gate_up",
                    "ptr bias_down",
                    "ptr work",
                    "ptr expert_done",
                    "ptr members",
                    "ptr stats",
                    "ptr peer_totals",
                    "ptr received_totals",
                    "ptr received_rows");

    /** The one parameter of every kernel of a step. */
    public static final CStruct STEP_PARAMS =
            CStruct.of(
                    "StepParams",
                    "i32 num_ranks",
                    "i32 num_local_ranks",
                    "i32 max_tokens",
                    "i32 top_k",
                    "i32 experts",
                    "i32 experts_per_rank",
                    "i32 hidden",
                    "i32 hidden_pad",
                    "i32 intermediate",
                    "i32 intermediate_pad",
                    "i32 shared",
                    "i32 shared_pad",
                    "i32 hidden_dtype",
                    "i32 out_dtype",
                    "i32 routing_input",
                    "i32 scoring",
                    "i32 renormalise",
                    "i32 groups",
                    "i32 topk_groups",
                    "f32 scale",
                    "i32 activation",
                    "f32 alpha",
                    "f32 limit",
                    "i32 wire",
                    "i32 early_next",
                    "i32 pad0",
                    "u64 timeout_ns",
                    "u64 first_timeout_ns",
                    "u64 off_dispatch_flags",
                    "u64 off_combine_flags",
                    "u64 off_abort_words",
                    "u64 off_recv_tokens",
                    "u64 off_recv_ids",
                    "u64 off_recv_weights",
                    "u64 off_recv_rows",
                    "u64 off_combine_rows",
                    "u64 off_dispatch_lines",
                    "u64 off_combine_lines",
                    "ptr ranks",
                    "ptr locals",
                    "ptr router",
                    "ptr router_bias",
                    "ptr correction_bias",
                    "ptr w_shared_gate_up",
                    "ptr w_shared_down",
                    "ptr shared_gate");

    /** One expert's matrices on their way into packed tiles. */
    public static final CStruct PACK_PARAMS =
            CStruct.of(
                    "PackParams",
                    "ptr first",
                    "ptr second",
                    "ptr first_bias",
                    "ptr second_bias",
                    "ptr packed",
                    "ptr packed_bias",
                    "i32 dtype",
                    "i32 rows",
                    "i32 cols",
                    "i32 row_tiles",
                    "i32 column_blocks",
                    "i32 pad0");

    /** Random packed weights, for benches. */
    public static final CStruct FILL_PARAMS =
            CStruct.of(
                    "FillParams",
                    "ptr packed",
                    "u64 seed",
                    "i32 experts",
                    "i32 rows",
                    "i32 cols",
                    "i32 row_tiles",
                    "i32 column_blocks",
                    "i32 gate_up",
                    "f32 scale",
                    "i32 pad0");

    /** The gate that holds a stream shut, for tests. */
    public static final CStruct GATE_PARAMS =
            CStruct.of("GateParams", "ptr word", "u64 timeout_ns");

    /** What a rank has seen of a peer's lines when a group opens. */
    public static final CStruct LINE_FINDING =
            CStruct.of("LineFinding", "u64 torn", "u64 missing", "u64 epochs", "u64 pad0");

    /** The test of lines when a group opens. */
    public static final CStruct LINE_TEST_PARAMS =
            CStruct.of(
                    "LineTestParams",
                    "ptr ranks",
                    "ptr findings",
                    "u64 off_tiles",
                    "u64 hammer_ns",
                    "u64 timeout_ns",
                    "i32 num_ranks",
                    "i32 rank",
                    "i32 halves",
                    "i32 pad0");

    /** All structs, for the test that compares them with the compiler's. */
    public static final List<CStruct> ALL =
            List.of(
                    ERROR_RECORD,
                    SOFT_COUNTERS,
                    PEER_STATS,
                    RANK_VIEW,
                    LOCAL_RANK,
                    STEP_PARAMS,
                    PACK_PARAMS,
                    FILL_PARAMS,
                    LINE_FINDING,
                    LINE_TEST_PARAMS,
                    GATE_PARAMS);

    private DeviceStructs() {}
}
