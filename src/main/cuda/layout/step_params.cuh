// What every kernel of a step is given, and where things lie. Each struct has a Java twin in
// io.moe4j.cuda.layout; a test compares sizes and offsets, so a field is added in both places.
//
//   R ranks, M max tokens per rank, K experts per token, E experts, L = ceil(E/R) experts per rank,
//   H hidden, I intermediate, S width of the shared expert (0: none).
//   Hp, Ip, Sp: H, I, S rounded up to a multiple of 64 (kPad). Pad columns of activation rows are zero.
//
// Symmetric region (one per rank, same offsets everywhere, the only memory that peers write):
//
//   dispatch_flags  u64 [R]        epoch of the newest rows of source rank s
//   combine_flags   u64 [R]        epoch of the newest results of expert rank r
//   abort_words     u64 [R]        1 + the newest generation in which rank s had a fault; above bit 32,
//                                  1 + the rank that it puts it down to
//   recv_tokens     i32 [R]        T of source rank s in that epoch
//   recv_ids        i32 [R][M][K]  local expert ids, -1: not on this rank
//   recv_weights    f32 [R][M][K]
//   recv_rows      bf16 [R][M][Hp] slot = s*M + token; written only if the token has an expert here
//   combine_rows   bf16 [R][M][Hp] at the home rank: row of (expert rank r, token)
//   dispatch_lines, combine_lines  only where the epoch travels in the data: see comm/lines.cuh
//
// An epoch is generation << 48 | step. Steps count from 1 in each generation, and the host begins a
// new generation when it recovers the group from a fault. Flags hold epochs; they only grow.
//
// Packed weights, bf16: tiles of 128 rows (outputs) x 64 columns (inputs), 16 KiB each, in the order
// [expert][row tile][column block]; pad rows and columns are zero. Within a tile row r is 128 bytes at
// r*128, and its 16-byte chunk c (8 elements) lies at chunk position c ^ (r & 7): the 128-byte swizzle
// that ldmatrix reads without bank conflicts and wgmma reads as its K-major SWIZZLE_128B layout.
// gate_up: packed row p of an expert is, with g = p / 16 and q = p % 16, gate feature 8g + q for q < 8
// and up feature 8g + q - 8 otherwise, so that one thread of an m16 or n8 pair holds both. 2*Ip rows.
// down: packed row p is output feature p; rows rounded up to a multiple of 128.
// Biases, f32, in packed row order: gate_up [L][2*Ip], down [L][Hp rounded up to 128].
#pragma once
#include <cstdint>
#include <cuda_bf16.h>

namespace moe {

constexpr int kPad = 64;
constexpr int kTileRows = 128;
constexpr int kTileCols = 64;
constexpr int kTileBytes = kTileRows * kTileCols * 2;
constexpr int kMaxTopK = 32;
constexpr int kMaxRanks = 64;
constexpr int kGenerationShift = 48;

enum DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };
enum RoutingInput : int32_t { kTopK = 0, kLogits = 1, kHidden = 2 };
enum Scoring : int32_t { kSoftmax = 0, kTopKSoftmax = 1, kSigmoid = 2 };
enum ActivationKind : int32_t { kSwiGlu = 0, kClampedSwiGlu = 1 };

// How rows travel: as rows with a flag behind them, or in lines that hold the epoch themselves.
enum Wire : int32_t { kRows = 0, kLines = 1 };

// Hard faults; soft ones are only counted. Values are part of the Java API.
enum FaultCode : uint32_t { kNoFault = 0, kTimeout = 1, kEpochMismatch = 2, kPeerAbort = 3, kInternal = 4 };
enum FaultOp : uint32_t { kOpDispatchRecv = 1, kOpCombineRecv = 2, kOpExperts = 3 };

// In pinned, device-mapped host memory, one per local rank. The first fault claims it: code is stored
// last with release, so a host that reads a nonzero code with acquire sees the rest.
struct alignas(64) ErrorRecord {
    uint32_t code;          // FaultCode
    uint32_t op;            // FaultOp
    uint32_t rank;
    uint32_t peer;
    uint64_t epoch_expected;
    uint64_t epoch_seen;
    uint64_t waited_ns;
    uint64_t valid_epoch;   // newest step of this rank that had no fault when its combine began, or ended
    uint64_t epoch;         // the step that failed: it and later ones are not valid, whatever valid_epoch says
    uint64_t reserved;
};
static_assert(sizeof(ErrorRecord) == 64, "one cache line, no sharing between ranks");

// Cumulative, in pinned, device-mapped host memory, one per local rank; written by the device with
// plain stores of totals kept in device memory, so that the host reads them without a sync.
struct alignas(64) SoftCounters {
    uint64_t steps;
    uint64_t dropped_ids;
    uint64_t duplicate_ids;
    uint64_t over_capacity_tokens;
    uint64_t lost_rows;     // not sent, because their rank is no member
    uint64_t reserved[3];
};
static_assert(sizeof(SoftCounters) == 64, "one cache line");

// What a local rank received from, and how long it waited for, each rank of the group: [R] per local
// rank, in pinned, device-mapped host memory. Plain stores, of the last step that was valid.
struct alignas(64) PeerStats {
    uint64_t rows_received;
    uint64_t waited_ns;          // for its rows
    uint64_t waited_ns_combine;  // for its results
    uint64_t waited_total_ns;    // all steps, both
    uint64_t reserved[4];
};
static_assert(sizeof(PeerStats) == 64, "one cache line");

// One per rank of the group: its symmetric region as this GPU addresses it.
struct RankView {
    uint8_t* symmetric;
};

// One per local rank: the caller's tensors (see StepTensors.java) and this rank's workspace.
struct LocalRank {
    const void* hidden;           // [M][H] hidden_dtype
    const int32_t* token_count;   // [1] T as the caller gave it
    const int32_t* topk_ids;      // [M][K] or null
    const float* topk_weights;    // [M][K] or null
    const float* router_logits;   // [M][E] or null
    void* out;                    // [M][H] out_dtype
    int32_t accumulate;
    int32_t rank;                 // this rank's number in the group
    int32_t local_experts;        // experts on this rank, <= L
    int32_t pad0;

    int32_t* home_tokens;         // [1] T clamped to [0, M], snapshot taken by route
    int32_t* home_ids;            // [M][K] sanitised global ids, -1: none
    float* home_weights;          // [M][K]
    uint64_t* home_mask;          // [M] bit r: rank r has an expert of this token
    float* logits;                // [M][E], HIDDEN input only, else null
    __nv_bfloat16* home_rows;     // [M][Hp], only with a shared expert, else null

    int32_t* expert_counts;       // [L]
    int32_t* expert_offsets;      // [L+1] exclusive scan
    int32_t* expert_rows;         // [R*M*min(K,L)] slot of each packed row, experts ascending, slots ascending
    int32_t* packed_row_of;       // [R*M*K] packed row of header entry (slot, k); valid where the id is >= 0
    __nv_bfloat16* activated;     // [R*M*min(K,L)][Ip]
    __nv_bfloat16* expert_out;    // [R*M*min(K,L)][Hp]
    __nv_bfloat16* shared_activated;  // [M][Sp] or null
    __nv_bfloat16* shared_out;    // [M][Hp] or null

    uint64_t* epoch;              // [2] device: this step's; that of the last step that ended, which
                                  // the next one continues. Recovery sets both to generation << 48
    uint32_t* arrivals;           // [8] counters of finished CTAs, always zero between kernels;
                                  // [7]: 1 once the error record is claimed (comm/signal.cuh)
    uint64_t* totals;             // [8] device totals behind SoftCounters, same order
    ErrorRecord* error;           // pinned
    SoftCounters* counters;       // pinned

    const __nv_bfloat16* w_gate_up;   // packed, this rank's experts
    const __nv_bfloat16* w_down;      // packed
    const float* bias_gate_up;        // packed order or null
    const float* bias_down;           // or null

    uint32_t* work;               // [8] WorkWord counters of the wgmma kernels, zero between kernels
    uint32_t* expert_done;        // [L] finished quarters of gate_up tiles, zero between kernels

    uint64_t* members;            // [1] device; bit r: rank r takes part. The host writes it between steps
    PeerStats* stats;             // [R] pinned
    uint64_t* peer_totals;        // [R][4] device totals behind PeerStats, same order
    uint64_t* received_totals;    // [R][L] device: rows of each source and local expert, all steps
    uint64_t* received_rows;      // [R][L] pinned, the same for the host
};

// Words of LocalRank::work.
enum WorkWord {
    kClaimedExperts = 0,  // items that CTAs have claimed, of each kernel
    kClaimedGateUp = 1,
    kClaimedDown = 2,
    kClaimedSharedGateUp = 3,
    kClaimedSharedDown = 4,
    kFinished = 5,  // warps or CTAs that wait for no more gate_up items
};

// The one kernel parameter, __grid_constant__. blockIdx.y is the index into locals.
struct StepParams {
    int32_t num_ranks;
    int32_t num_local_ranks;
    int32_t max_tokens;           // M
    int32_t top_k;                // K
    int32_t experts;              // E
    int32_t experts_per_rank;     // L
    int32_t hidden;               // H
    int32_t hidden_pad;           // Hp
    int32_t intermediate;         // I
    int32_t intermediate_pad;     // Ip
    int32_t shared;               // S
    int32_t shared_pad;           // Sp
    int32_t hidden_dtype;         // DType
    int32_t out_dtype;            // DType
    int32_t routing_input;        // RoutingInput
    int32_t scoring;              // Scoring
    int32_t renormalise;
    int32_t groups;
    int32_t topk_groups;
    float scale;
    int32_t activation;           // ActivationKind
    float alpha;
    float limit;
    int32_t wire;                 // Wire
    int32_t early_next;           // 1: nothing else on the GPU waits for a rank of the group, so what
                                  // follows combine may start while combine still waits
    int32_t pad0;
    uint64_t timeout_ns;          // bound of every wait
    uint64_t first_timeout_ns;    // the same in the first step of a generation

    uint64_t off_dispatch_flags;  // offsets into the symmetric region, bytes
    uint64_t off_combine_flags;
    uint64_t off_abort_words;
    uint64_t off_recv_tokens;
    uint64_t off_recv_ids;
    uint64_t off_recv_weights;
    uint64_t off_recv_rows;
    uint64_t off_combine_rows;
    uint64_t off_dispatch_lines;  // 0: the wire has none
    uint64_t off_combine_lines;

    const RankView* ranks;        // [R]
    const LocalRank* locals;      // [num_local_ranks]

    const float* router;          // [E][H] row-major f32, or null
    const float* router_bias;     // [E] or null
    const float* correction_bias; // [E] or null
    const __nv_bfloat16* w_shared_gate_up;  // packed as one expert, or null
    const __nv_bfloat16* w_shared_down;
    const float* shared_gate;     // [H] or null
};

}  // namespace moe
