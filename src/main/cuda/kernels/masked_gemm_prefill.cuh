// The masked grouped GEMM with wgmma for many rows, some experts with hundreds and thousands as in
// prefill: out[row] = epilogue(W[expert of row] . in[row]), for gate_up, for down, or for both in one
// kernel.
//
// Two CTAs form a cluster. Where an expert has many tokens they work together and share weights: a tile
// of theirs is 256 outputs x up to 2 x 152 tokens of an expert, half the tokens each. Per k block of 64 a
// CTA fetches one of the two 16 KiB weight tiles for both (bulk copies to the whole cluster) and gathers
// its own token rows with cp.async, so 32 KiB pass through the L2 cache for 256 x 128 x 64 products.
// Where an expert has up to 72 tokens they work apart: 128 outputs x all tokens each, two k blocks at once;
// where tiles are enough, from 57 to 152 tokens on tall ones: 256 outputs x all tokens each.
//   warpgroups 0, 1       together and tall, 128 outputs each: two wgmma m64 n40 .. n152, A = weights,
//                         B = tokens; apart, 64 outputs each: one wgmma m64 n8 .. n72
//   warpgroup 2, warp 0   weights
//                warps 1, 2   tokens
//                warp 3   deals: which tiles this cluster works on
//   stage_ready, stage_free   barriers of a stage: all bytes landed; both CTAs' multipliers have left
//   tile_ready, tile_free     the same of a listed tile
//   claim_due                 of CTA 0: a tile nears its end, the next may be claimed
//   claim_ready, claim_free   of CTA 1's copy of a claim: it is there; of CTA 0: CTA 1 has read it
// Of a warpgroup's 128 rows of weights a warp takes 32 neighbouring ones (a wgmma takes every second
// group of 8), which are turned in shared memory and stored as 32 or 64 bytes of a row.
//
// Clusters claim tiles one after the other from a counter in device memory, so one that is late takes
// fewer. Both in one kernel: a down tile reads rows of activated that others write. Of each finished
// gate_up tile, every CTA adds one to the expert's count, with release; who gathers for a down tile polls
// it, with acquire. All tiles it waits for were claimed before it, by clusters that run.
//
// Each output is one accumulator over ascending k, 16 at a time, so the bits are those of
// masked_gemm.cuh. Launched with programmatic dependence or without.
// gridDim.x is even.
#pragma once
#include <type_traits>

#include "../ptx/bulk_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/stmatrix.cuh"
#include "../ptx/wgmma.cuh"
#include "await_rows.cuh"
#include "gemm_epilogue.cuh"

namespace moe::prefill {

constexpr int kThreads = 384;
constexpr int kMultiplyThreads = 256;
constexpr int kGatherThreads = 64;
constexpr int kClusterCtas = 2;
// why: a test builds the kernels without a body for targets that have no clusters
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MOE_IN_PAIRS
#else
#define MOE_IN_PAIRS __cluster_dims__(moe::prefill::kClusterCtas, 1, 1)
#endif
// The tile in work and the next.
constexpr int kListedTiles = 2;
// k blocks before the last of a tile is fetched at which the next is claimed.
constexpr int kClaimAhead = 6;

// Of the 168 that 384 threads may have each at launch.
constexpr int kMultiplierRegisters = 216;
constexpr int kProducerRegisters = 72;
static_assert(2 * kMultiplierRegisters + kProducerRegisters <= 3 * 168,
              "a warpgroup waits forever for registers that the CTA does not have");

constexpr int kMaxColumns = 152;  // of a CTA
constexpr int kBlocks = kMaxColumns / 8;
constexpr int kStages = 4;
constexpr int kWeightBytes = 2 * kTileBytes;
constexpr int kTokenBytes = kMaxColumns * kRowBytes;
constexpr int kRingBytes = kStages * (kWeightBytes + kTokenBytes);
constexpr int kTurned = 2;  // pieces of 512 bytes that a warp turns at a time
constexpr int kTurnBytes = 2 * kTurned * 512;
constexpr int kExtraBytes = 1024;
constexpr int kSharedBytes = kRingBytes + kMultiplyThreads / 32 * kTurnBytes + kExtraBytes;
static_assert(kSharedBytes <= 227 * 1024, "one CTA fits an SM of sm_90");

// Few tokens: the CTAs of a cluster multiply a row tile each, with all tokens of the expert, and a stage
// holds two k blocks. why so few: the weights take the time, and twice as many bytes are under way.
constexpr int kApartBlocks = 2;
constexpr int kMostApart = kTokenBytes / (kApartBlocks * kRowBytes) / 8 * 8;

// Tall tiles: the CTAs multiply two row tiles each, with all tokens of an expert that has more than so many.
// why: a k block costs the SM 32 KiB of weights and the multipliers a wait and a drain; together, these are paid for
// half as many products. But half as many tiles take 1.2 to 1.5 times as long. So there must be enough of them to
// end evenly: without tall ones, so many fifths of a round of the grid in the first product; and enough tokens for
// the tensor cores, not the memory, to take the time.
constexpr int kMostApartBesideTall = 56;
constexpr int kFifthsForTall = 8;
constexpr int kLeastMeanForTall = 48;
// Of the experts with up to kMaxColumns tokens, those with more than this come first: their tiles take longest.
constexpr int kLong = 104;
// Rounds of the grid from which on products are mixed; where tiles are fewer, gate_up of all comes before down.
constexpr int kRoundsToMix = 5;

enum Phase { kGateUp = 0, kDown = 1, kNoPhase = 2 };

// How the CTAs of a cluster share a tile.
enum Form {
    kTogether = 0,  // two row tiles; CTA 0 takes the first `width` rows of tokens and CTA 1 the rest
    kApart = 1,     // two row tiles, one each
    kTall = 2       // four row tiles, two each
};

// What a cluster works on: packed token rows first_row .. first_row + rows - 1 of an expert, and row tiles.
struct Tile {
    int phase;      // kNoPhase: there are no more tiles
    int expert;
    int row_tile;   // the first
    int first_row;
    int rows;
    int width;      // of a CTA, a multiple of 8
    Form form;
    uint32_t after; // how often its expert must have been counted before its rows are there
};

struct Shared {
    uint64_t stage_ready[kStages];
    uint64_t stage_free[kStages];
    uint64_t tile_ready[kListedTiles];
    uint64_t tile_free[kListedTiles];
    uint64_t claim_due;
    uint64_t claim_ready;
    uint64_t claim_free;
    Tile tiles[kListedTiles];
    GemmOperands operands[2];  // of gate_up, of down
    // why here: the rank's record is in device memory, and its lines do not stay in L1
    uint32_t* work;
    uint32_t* expert_done;
    uint32_t claim;
};
static_assert(sizeof(Shared) <= kExtraBytes, "barriers lie behind the rings");

// A position in a ring and the parity of its barriers' phase.
template <int kSize>
struct Position {
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void step() {
        if (++index == kSize) {
            index = 0;
            parity ^= 1;
        }
    }
};

// Shared addresses.
struct Addresses {
    uint32_t ring;
    uint32_t turn;
    uint32_t stage_ready;
    uint32_t stage_free;
    uint32_t tile_ready;
    uint32_t tile_free;
    uint32_t claim_due;
    uint32_t claim_ready;
    uint32_t claim_free;
    uint32_t claim;

    __device__ __forceinline__ uint32_t weights(int stage) const {
        return ring + stage * kWeightBytes;
    }
    __device__ __forceinline__ uint32_t tokens(int stage) const {
        return ring + kStages * kWeightBytes + stage * kTokenBytes;
    }
};

__device__ __forceinline__ uint32_t barrier_at(uint32_t barriers, int index) {
    return barriers + 8 * index;
}

// Two rows of tiles merged evenly into one; it begins with one of the first row, if there are any.
struct Merge {
    int first = 0;      // tiles of the first row
    int all = 0;        // of both
    uint32_t step = 0;  // of the first row among each, in 1 / 2^31

    Merge() = default;
    __device__ __forceinline__ Merge(int first, int second) : first(first), all(first + second) {
        // why up: so that the first row is through at the end. In float: a division of 64 bits takes 0.2 us
        step = second == 0 ? 1u << 31
                           : min(1u << 31, static_cast<uint32_t>(__fdividef(first, all) * 2147485696.0f));
    }

    // Of the first row, before this one.
    __device__ __forceinline__ int before(int number) const {
        return min(first, static_cast<int>((static_cast<uint64_t>(number) * step + 0x7fffffff) >> 31));
    }
};

// The tiles by ascending number, for one warp. Two rows of tiles are merged: those of experts with so many tokens
// that these take the time, which keep the tensor cores busy, and the others, whose weights take it. Both should be
// in work at any time, and the last tiles to start be short:
//   head     gate_up of many, among others: in the first fourth of all tiles, in whole rounds of the grid
//   gap      others, while the last of these tiles are in work; where tiles are few, all that is left of gate_up
//   middle   down of many, among others
//   tail     down of others, a round
// In a row, gate_up comes first, of the others the experts with more tokens, in three classes; then expert by
// expert, within an expert by pairs of row tiles, or fours, within these by blocks of tokens. The tokens of an
// expert fall into blocks of 16 a unit, as equal as can be.
template <int kFirstPhase, int kLastPhase>
class Tiles {
   public:
    __device__ __forceinline__ explicit Tiles(const Shared& shared) : shared_(shared) {
        const GemmOperands& g = shared.operands[kFirstPhase];
        constexpr int kBatch = 4;  // loads on their way together
        // blocks of tokens of experts with many; the others, of these who may have tall tiles; tokens of all above a
        // mean of kLeastMeanForTall
        int blocks = 0, other = 0, wide = 0, above = 0;
#pragma unroll 1
        for (int e = threadIdx.x % 32; e < g.experts; e += 32 * kBatch) {
            int rows[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                rows[i] = e + 32 * i < g.experts ? g.counts[e + 32 * i] : 0;
            }
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                const bool many = rows[i] > kMaxColumns;
                blocks += many ? blocks_of(rows[i]) : 0;
                other += rows[i] > 0 && !many ? 1 : 0;
                wide += rows[i] > kMostApartBesideTall && !many ? 1 : 0;
                above += rows[i] > 0 ? rows[i] - kLeastMeanForTall : 0;
            }
        }
        blocks = __reduce_add_sync(0xffffffffu, blocks);
        other = __reduce_add_sync(0xffffffffu, other);
        wide = __reduce_add_sync(0xffffffffu, wide);
        above = __reduce_add_sync(0xffffffffu, above);
        const int gate_up = kFirstPhase == kGateUp ? tiles_of(kTogether, kGateUp) : 0;
        const int down = kLastPhase == kDown ? tiles_of(kTogether, kDown) : 0;
        const int grid = gridDim.x / kClusterCtas;
        if (5 * (blocks + other) * tiles_of(kTogether, kFirstPhase) >= kFifthsForTall * grid && above >= 0) {
            most_apart_ = kMostApartBesideTall;
        } else {
            wide = 0;
        }
        // why in float: this is before the first tile, and nothing depends on one more or less
        const auto rounds = [grid](int tiles) { return static_cast<int>(__fdividef(tiles, grid)); };
        const int many = blocks * gate_up;
        const int others_gate_up =
            (other - wide) * gate_up + (kFirstPhase == kGateUp ? wide * tiles_of(kTall, kGateUp) : 0);
        const int others_down = (other - wide) * down + (kLastPhase == kDown ? wide * tiles_of(kTall, kDown) : 0);
        int others = others_gate_up + others_down;
        total_ = blocks * (gate_up + down) + others;
        // why one round of few: they are soon done, and what is left is the memory's
        const int head = many == 0 ? 0 : max(many, (2 * many > grid ? max(rounds(total_ / 4), 1) : 1) * grid);
        const int beside = min(others, head - many);
        head_ = Merge(many, beside);
        others -= beside;
        if (total_ < kRoundsToMix * grid) {
            gap_ = max(others_gate_up - beside, 0);
        } else if (beside > 0) {
            gap_ = 2 * static_cast<int>(__fdividef(grid * beside, head_.all));
        } else {
            const int past_rounds = many - rounds(many) * grid;
            gap_ = past_rounds > 0 ? 2 * (grid - past_rounds) : 0;
        }
        gap_ = min(others, gap_);
        others -= gap_;
        middle_ = Merge(blocks * down, max(others - min(others_down, grid), 0));
    }

    // The lane that knows the tile writes it to `to` and arrives at `ready`; without one, lane 0. All lanes get
    // its phase and expert. Numbers ascend from call to call.
    __device__ __forceinline__ void find(int number, Tile& to, uint32_t ready, int& phase, int& expert) {
        if (number >= total_) {
            phase = kNoPhase;
            expert = 0;
            if (threadIdx.x % 32 == 0) {
                to.phase = kNoPhase;
                ptx::mbarrier_arrive(ready);
            }
            return;
        }
        const bool in_head = number < head_.all;
        const Merge& merge = in_head ? head_ : middle_;
        const int place = in_head ? number : number - head_.all - gap_;  // in the merged rows; negative in the gap
        const int many_before = merge.before(max(place, 0));
        const bool many = place >= 0 && merge.before(place + 1) > many_before;
        const int first = many_before + (in_head ? 0 : head_.first);
        if (many != many_) {
            many_ = many;
            const Cursor other = at_;
            at_ = parked_;
            parked_ = other;
            stale_ = true;
        }
        const int in_row = many ? first : number - first;
        for (;;) {
            if (stale_) {
                read_group();
            }
            const unsigned after = __ballot_sync(0xffffffffu, in_row - at_.before < end_);
            if (after != 0) {
                const int lane = __ffs(after) - 1;
                if (threadIdx.x % 32 == lane) {
                    to = tile(in_row - at_.before - (end_ - tiles_));
                    ptx::mbarrier_arrive(ready);
                }
                phase = at_.phase;
                expert = at_.group + lane;
                return;
            }
            at_.before += __shfl_sync(0xffffffffu, end_, 31);
            at_.group += 32;
            if (at_.group >= shared_.operands[at_.phase].experts) {
                at_.group = 0;
                at_.row_class++;
                if (many_ || at_.row_class == kRowClasses) {
                    at_.row_class = 0;
                    at_.phase++;
                }
            }
            stale_ = true;
        }
    }

    __device__ __forceinline__ int total() const { return total_; }

   private:
    // A place in a row of tiles.
    struct Cursor {
        int phase = kFirstPhase;
        int row_class = 0;  // of the others
        int group = 0;       // of 32 experts
        int before = 0;      // tiles before the group
    };

    // Of an expert and a block of its tokens.
    __device__ __forceinline__ int tiles_of(Form form, int phase) const {
        const int row_tiles = shared_.operands[phase].row_tiles;
        return form == kTall ? (row_tiles + 3) / 4 : (row_tiles + 1) / 2;
    }

    __device__ __forceinline__ Form form_of(int rows) const {
        const bool is_tall = most_apart_ == kMostApartBesideTall && rows <= kMaxColumns;
        return rows <= most_apart_ ? kApart : is_tall ? kTall : kTogether;
    }

    static __device__ __forceinline__ int blocks_of(int rows) { return ((rows + 15) / 16 + kBlocks - 1) / kBlocks; }

    // Whether an expert's tiles come where the cursor is.
    __device__ __forceinline__ bool is_here(int rows) const {
        const int row_class = rows > kLong ? 0 : rows > most_apart_ ? 1 : 2;
        return many_ ? rows > kMaxColumns : rows <= kMaxColumns && row_class == at_.row_class;
    }

    __device__ __forceinline__ void read_group() {
        const GemmOperands& g = shared_.operands[at_.phase];
        const int lane = threadIdx.x % 32;
        const int expert = at_.group + lane;
        rows_ = expert < g.experts ? max(g.counts[expert], 0) : 0;
        blocks_ = blocks_of(rows_);
        tiles_ = is_here(rows_) ? blocks_ * tiles_of(form_of(rows_), at_.phase) : 0;
        end_ = tiles_;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, end_, offset);
            end_ += lane >= offset ? other : 0;
        }
        stale_ = false;
    }

    __device__ __forceinline__ Tile tile(int within) const {
        const GemmOperands& g = shared_.operands[at_.phase];
        const int expert = at_.group + threadIdx.x % 32;
        const int units = (rows_ + 15) / 16;
        const Form form = form_of(rows_);
        const int high = within / blocks_;
        const int block = within - high * blocks_;
        // why: 64-bit, blocks times units
        const int unit = static_cast<int>(static_cast<int64_t>(block) * units / blocks_);
        const int next = static_cast<int>((block + 1ll) * units / blocks_);
        Tile tile;
        tile.phase = at_.phase;
        tile.expert = expert;
        tile.row_tile = (form == kTall ? 4 : 2) * high;
        tile.first_row = (g.offsets != nullptr ? g.offsets[expert] : 0) + 16 * unit;
        tile.form = form;
        tile.width = form == kTogether ? 8 * (next - unit) : (rows_ + 7) / 8 * 8;
        tile.rows = min(2 * tile.width, rows_ - 16 * unit);
        tile.after =
            kFirstPhase == kGateUp && at_.phase == kDown ? blocks_ * tiles_of(form, kGateUp) * kClusterCtas : 0;
        return tile;
    }

    static constexpr int kRowClasses = 3;
    const Shared& shared_;
    Merge head_, middle_;
    int gap_, total_;
    int most_apart_ = kMostApart;
    bool many_ = false;  // which row at_ is a place in; parked_ is one in the other
    Cursor at_, parked_;
    bool stale_ = true;                // what follows is not of at_
    int rows_, blocks_, tiles_, end_;  // of the lane's expert; tiles to its end
};

// Warp 3 of warpgroup 2. CTA 0 claims tiles and tells CTA 1; each lists them for itself, and counts the
// gate_up tiles that it has finished.
template <int kFirstPhase, int kLastPhase>
__device__ __forceinline__ void deal_tiles(Shared& shared, const Addresses& at, WorkWord claimed) {
    const int lane = threadIdx.x % 32;
    const int rank = ptx::cluster_rank();
    // why before the list: the two wait for device memory together
    uint32_t claim = 0;
    if (rank == 0 && lane == 0) {
        claim = atomicAdd(shared.work + claimed, 1u);
    }
    Tiles<kFirstPhase, kLastPhase> tiles(shared);
    Position<kListedTiles> slot;
    Position<1> turn;
    int phase = kNoPhase, expert = 0;  // of the tile in work
    for (bool first = true;; first = false) {
        if (lane == 0) {
            if (rank == 0) {
                if (!first) {
                    ptx::mbarrier_wait(at.claim_due, turn.parity ^ 1);
                    claim = atomicAdd(shared.work + claimed, 1u);
                }
                ptx::mbarrier_wait(at.claim_free, turn.parity ^ 1);
                ptx::store_async_at(at.claim, claim, at.claim_ready, 1);
            } else {
                ptx::mbarrier_wait_cluster(at.claim_ready, turn.parity);
                claim = *static_cast<volatile uint32_t*>(&shared.claim);
                ptx::mbarrier_arrive_expect(at.claim_ready, sizeof(claim));
                ptx::mbarrier_arrive_at(at.claim_free, 0);
            }
        }
        turn.step();
        claim = __shfl_sync(0xffffffffu, claim, 0);
        int next_phase, next_expert;
        // why the slot is free: the tile before the one in work has been waited for below
        tiles.find(static_cast<int>(claim), shared.tiles[slot.index], barrier_at(at.tile_ready, slot.index),
                   next_phase, next_expert);
        __syncwarp();
        slot.step();
        if (!first) {
            // The other slot's
            ptx::mbarrier_wait(barrier_at(at.tile_free, slot.index), slot.parity ^ 1);
            if (kFirstPhase != kLastPhase && phase == kGateUp && lane == 0) {
                ptx::add_release_gpu(shared.expert_done + expert, 1);
            }
        }
        phase = next_phase;
        expert = next_expert;
        if (phase == kNoPhase) {
            const uint32_t clusters = gridDim.x / kClusterCtas;
            if (rank == 0 && lane == 0 && claim + 1 == static_cast<uint32_t>(tiles.total()) + clusters) {
                shared.work[claimed] = 0;  // why: a claim for each tile and each cluster, the last
            }
            break;
        }
    }
    if (kFirstPhase != kLastPhase) {
        // The last CTA that waits for no more gate_up tiles clears their counts
        uint32_t finished = 0;
        if (lane == 0) {
            finished = atomicAdd(shared.work + kFinished, 1u);
        }
        if (__shfl_sync(0xffffffffu, finished, 0) == gridDim.x - 1) {
            for (int e = lane; e < shared.operands[0].experts; e += 32) {
                shared.expert_done[e] = 0;
            }
            if (lane == 0) {
                shared.work[kFinished] = 0;
            }
        }
    }
}

// The roles step over the same list. tile_free counts the threads that do.
struct TileList {
    Shared& shared;
    uint32_t ready, free;
    Position<kListedTiles> slot;

    __device__ __forceinline__ TileList(Shared& shared, const Addresses& at)
        : shared(shared), ready(at.tile_ready), free(at.tile_free) {}

    __device__ __forceinline__ const Tile& wait() const {
        ptx::mbarrier_wait(barrier_at(ready, slot.index), slot.parity);
        return shared.tiles[slot.index];
    }
    __device__ __forceinline__ void leave() {
        ptx::mbarrier_arrive(barrier_at(free, slot.index));
        slot.step();
    }
};
constexpr int kTileReaders = kMultiplyThreads + 1 + kGatherThreads;

// Warpgroup 2, one thread: this CTA's half of the weights, for the cluster.
__device__ __forceinline__ void stream_weights(Shared& shared, const Addresses& at) {
    const int rank = ptx::cluster_rank();
    const uint64_t policy = ptx::evict_first();
    TileList list(shared, at);
    Position<kStages> stage;
    for (;;) {
        const Tile& tile = list.wait();
        if (tile.phase == kNoPhase) {
            return;
        }
        const GemmOperands& g = shared.operands[tile.phase];
        const int k_blocks = g.k_blocks;
        const int claim_at = max(k_blocks - kClaimAhead, 0);
        const Form form = tile.form;
        // why: the last tile may reach past the last row tile, which then comes more than once
        const int row_tile = min(tile.row_tile + (form == kTall ? 2 * rank : rank), g.row_tiles - 1);
        const int64_t next = row_tile + 1 < g.row_tiles ? static_cast<int64_t>(k_blocks) * kTileBytes : 0;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(
            g.weights + tile_offset(tile.expert, row_tile, 0, g.row_tiles, k_blocks));
        const int step = form == kApart ? kApartBlocks : 1;
        list.leave();
        bool due = rank == 0;
#pragma unroll 1
        for (int k = 0; k < k_blocks; k += step) {
            ptx::mbarrier_wait(barrier_at(at.stage_free, stage.index), stage.parity ^ 1);
            const uint32_t ready = barrier_at(at.stage_ready, stage.index);
            const uint32_t bytes = min(step, k_blocks - k) * kTileBytes;
            if (form == kApart) {
                ptx::mbarrier_arrive_expect(ready, bytes);
                ptx::bulk_copy(at.weights(stage.index), from, bytes, ready, policy);
            } else if (form == kTall) {
                ptx::mbarrier_arrive_expect(ready, kWeightBytes);
                ptx::bulk_copy(at.weights(stage.index), from, kTileBytes, ready, policy);
                ptx::bulk_copy(at.weights(stage.index) + kTileBytes, from + next, kTileBytes, ready, policy);
            } else {
                ptx::mbarrier_arrive_expect(ready, kWeightBytes);
                ptx::bulk_copy_to_all(at.weights(stage.index) + rank * kTileBytes, from, kTileBytes, ready,
                                      (1 << kClusterCtas) - 1);
            }
            from += bytes;
            stage.step();
            if (due && k + step > claim_at) {
                due = false;
                ptx::mbarrier_arrive(at.claim_due);
            }
        }
    }
}

// Warpgroup 2, warps 1 and 2. A thread copies 16-byte chunk c of rows r, r + 8, .. of each k block.
__device__ __forceinline__ void gather_tokens(Shared& shared, const Addresses& at, const StepParams& p,
                                              const LocalRank& me) {
    const int thread = threadIdx.x % 128 - 32;
    const int row0 = thread / 8;
    const int chunk = thread % 8;
    const uint32_t place = swizzled(row0, chunk);
    const int rank = ptx::cluster_rank();
    TileList list(shared, at);
    Position<kStages> stage;
    for (;;) {
        const Tile& tile = list.wait();
        if (tile.phase == kNoPhase) {
            return;
        }
        const GemmOperands& g = shared.operands[tile.phase];
        const int k_blocks = g.k_blocks;
        const int width = tile.width;
        const int step = tile.form == kApart ? kApartBlocks : 1;
        const int last = tile.first_row + tile.rows - 1;
        const int row = tile.first_row + (tile.form == kTogether ? rank * width : 0) + row0;
        const int64_t pitch = k_blocks * 8;
        // why addresses, a k block ahead of the copies: a copy reads its registers late, and who writes
        // them again waits for that
        const uint4* from[kBlocks];
        const uint4* in = reinterpret_cast<const uint4*>(g.in) + chunk - 8;
        const int32_t* gather = g.gather;
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
            // why: a copy of the last row is cheaper than a branch; its products are not stored
            const int packed = min(row + 8 * i, last);
            from[i] = in + (gather != nullptr ? gather[packed] : packed) * pitch;
        }
        if (tile.after != 0 && threadIdx.x % 32 == 0) {
            await_rows(shared.expert_done + tile.expert, tile.after, p, me);
        }
        __syncwarp();
        list.leave();
        int left = step;  // k blocks of the stage
#pragma unroll 1
        for (int k = 0; k < k_blocks; k++) {
#pragma unroll
            for (int i = 0; i < kBlocks; i++) {
                from[i] += 8;
                asm volatile("" : "+l"(from[i]));
            }
            if (left == step) {
                ptx::mbarrier_wait(barrier_at(at.stage_free, stage.index), stage.parity ^ 1);
            }
            const uint32_t to = at.tokens(stage.index) + place + (step - left) * width * kRowBytes;
#pragma unroll
            for (int i0 = 0; i0 < kBlocks; i0 += 4) {
                if (8 * i0 >= width) {
                    break;
                }
#pragma unroll
                for (int i = i0; i < i0 + 4 && i < kBlocks; i++) {
                    if (8 * i < width) {
                        ptx::cp_async_16(to + i * 8 * kRowBytes, from[i]);
                    }
                }
            }
            if (--left == 0 || k + 1 == k_blocks) {
                left = step;
                ptx::mbarrier_arrive_after_cp_async(barrier_at(at.stage_ready, stage.index));
                stage.step();
            }
        }
    }
}

// Lanes 0 and 1 tell the CTAs of the cluster that this warp has left a stage.
__device__ __forceinline__ void leave_stage(uint32_t barriers, int index) {
    const int lane = threadIdx.x % 32;
    if (lane < kClusterCtas) {
        ptx::mbarrier_arrive_at(barrier_at(barriers, index), lane);
    }
}

// The descriptor, known to be the same in all lanes. why: it stays in uniform registers, where wgmma wants it
__device__ __forceinline__ uint64_t uniform_descriptor(uint64_t descriptor) {
    return descriptor >> 32 << 32 | __shfl_sync(0xffffffffu, static_cast<uint32_t>(descriptor), 0);
}

// The descriptor of what lies so many 16 bytes further on; its high half never changes.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, uint32_t by) {
    return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + by);
}

// Warpgroups 0 and 1: all k blocks of a tile.
template <int kColumns>
__device__ __forceinline__ void multiply_tile(float (&acc)[2][kBlocks][4], const Addresses& at,
                                              Position<kStages>& stage, int k_blocks) {
    static_assert(kColumns <= kMaxColumns, "the accumulators are for so many");
    constexpr ptx::Columns<kColumns> columns;
#pragma unroll 1
    for (int k = 0; k < k_blocks; k++) {
        const uint64_t a = uniform_descriptor(
            ptx::wgmma_descriptor_of_alternate_rows(at.weights(stage.index) + threadIdx.x / 128 * kTileBytes));
        const uint64_t b = uniform_descriptor(ptx::wgmma_descriptor(at.tokens(stage.index)));
        ptx::mbarrier_wait(barrier_at(at.stage_ready, stage.index), stage.parity);
        // why: cp.async wrote through the generic proxy
        ptx::fence_proxy_async();
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTileCols / 16; i++) {
            const int add = i > 0 ? 1 : k;
            ptx::wgmma_k16(columns, acc[0], further(a, 2 * i), further(b, 2 * i), add);
            ptx::wgmma_k16(columns, acc[1], further(a, 2 * i + 8 * kRowBytes / 16), further(b, 2 * i), add);
        }
        ptx::wgmma_commit();
        // why not a block later: the other warpgroup's products fill the gap, and the stage is free
        // sooner
        ptx::wgmma_wait<0>();
        leave_stage(at.stage_free, stage.index);
        stage.step();
    }
}

// A stage of a tile apart: its k blocks, 64 outputs of the CTA's row tile, all tokens.
template <int kColumns, int kStageBlocks>
__device__ __forceinline__ void multiply_stage_apart(float (&acc)[2][kBlocks][4], const Addresses& at,
                                                     Position<kStages>& stage, int add) {
    constexpr ptx::Columns<kColumns> columns;
    const uint64_t a =
        uniform_descriptor(ptx::wgmma_descriptor(at.weights(stage.index) + threadIdx.x / 128 * (kTileBytes / 2)));
    const uint64_t b = uniform_descriptor(ptx::wgmma_descriptor(at.tokens(stage.index)));
    ptx::mbarrier_wait(barrier_at(at.stage_ready, stage.index), stage.parity);
    // why: cp.async wrote through the generic proxy
    ptx::fence_proxy_async();
    ptx::wgmma_fence();
#pragma unroll
    for (int block = 0; block < kStageBlocks; block++) {
#pragma unroll
        for (int i = 0; i < kTileCols / 16; i++) {
            ptx::wgmma_k16(columns, acc[0], further(a, block * (kTileBytes / 16) + 2 * i),
                           further(b, block * (kColumns * kRowBytes / 16) + 2 * i), block + i > 0 ? 1 : add);
        }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    leave_stage(at.stage_free, stage.index);
    stage.step();
}

// All k blocks of a tile apart.
template <int kColumns>
__device__ __forceinline__ void multiply_apart(float (&acc)[2][kBlocks][4], const Addresses& at,
                                               Position<kStages>& stage, int k_blocks) {
#pragma unroll 1
    for (int k = 0; k + kApartBlocks <= k_blocks; k += kApartBlocks) {
        multiply_stage_apart<kColumns, kApartBlocks>(acc, at, stage, k);
    }
    // why not in the loop: wgmmas under a condition would be run one by one
    if (k_blocks % kApartBlocks != 0) {
        multiply_stage_apart<kColumns, 1>(acc, at, stage, k_blocks - 1);
    }
}

// Calls f with a width, one of kLeast, kLeast + 8, .., kMost, as a constant.
// why by halves: in a row of comparisons the last widths wait for all others, a few hundred clocks a tile
template <int kLeast, int kMost, class F>
__device__ __forceinline__ void with_width(int width, const F& f) {
    if constexpr (kLeast == kMost) {
        f(std::integral_constant<int, kLeast>());
    } else {
        constexpr int kMiddle = (kLeast + kMost) / 16 * 8;
        if (width <= kMiddle) {
            with_width<kLeast, kMiddle>(width, f);
        } else {
            with_width<kMiddle + 8, kMost>(width, f);
        }
    }
}

// Keeps a value in its register: the compiler would compute it again wherever it is used.
__device__ __forceinline__ void keep(uint32_t& value) {
    asm volatile("" : "+r"(value));
}

// Stores what a warp has turned: pieces of 512 bytes, kLanes lanes for a row's 16 * kLanes bytes.
// Two buffers: a batch of pieces is read back while the next is made.
template <int kLanes>
class RowStores {
   public:
    static constexpr int kRows = 32 / kLanes;  // of a piece

    __device__ __forceinline__ RowStores(const GemmOperands& g, const Tile& tile, int rank, int feature0,
                                         uint32_t turn)
        : rows(min(tile.rows - rank * tile.width, tile.width)),
          step_(static_cast<int64_t>(kRows) * g.out_pitch) {
        const int lane = threadIdx.x % 32;
        const int chunk = lane % kLanes;
        row_ = lane / kLanes;
        from_ = turn + 16 * (kLanes * row_ + (chunk ^ (row_ / (8 / kLanes) % kLanes)));
        const int64_t first = tile.first_row + rank * tile.width + row_;
        out_ = g.out + first * g.out_pitch + feature0 + 8 * chunk;
        keep(from_);
    }

    // Takes the batch that lies so many bytes on; the one before must have been put.
    __device__ __forceinline__ void take(uint32_t buffer) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kTurned; i++) {
            held_[i] = ptx::load_shared_16(from_ + buffer + 512 * i);
        }
    }

    __device__ __forceinline__ void put() {
#pragma unroll
        for (int i = 0; i < kTurned; i++) {
            if (row_ < rows) {
                ptx::store_global_16(out_, held_[i]);
            }
            row_ += kRows;
            out_ += step_;
        }
    }

    const int rows;  // of this CTA

   private:
    const int64_t step_;
    int row_;
    uint32_t from_;
    __nv_bfloat16* out_;
    uint4 held_[kTurned];
};

// The epilogue of a warp: of the row tile, packed rows 32 warp + lane / 4 in acc[0][.][0..1], 8
// rows on in acc[1][.][0..1], 16 in acc[0][.][2..3], 24 in acc[1][.][2..3]. Gate and up alternate:
// 16 features.
__device__ __forceinline__ void store(const GateUpEpilogue& epilogue, const GemmOperands& g,
                                      const Tile& tile, int row_tile, int rank, uint32_t turn,
                                      const float (&acc)[2][kBlocks][4]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const int feature0 = row_tile * (kTileRows / 2) + 16 * warp;
    uint32_t real[2];  // all ones, or zero for a pad
    float gate_bias[2] = {0.0f, 0.0f};
    float up_bias[2] = {0.0f, 0.0f};
    const float* bias = g.bias == nullptr
                            ? nullptr
                            : g.bias + (static_cast<int64_t>(tile.expert) * g.row_tiles + row_tile) * kTileRows +
                                  32 * warp + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        real[half] = feature0 + 8 * half + lane / 4 < g.features ? 0xffffffffu : 0;
        keep(real[half]);
        if (bias != nullptr) {
            gate_bias[half] = bias[16 * half];
            up_bias[half] = bias[16 * half + 8];
        }
    }
    RowStores<2> stores(g, tile, rank, feature0, turn);
    // The lane's address among 16 rows of 32 bytes: matrices are (features, rows), features first
    const int row = lane / 16 * 8 + lane % 8;
    uint32_t place = turn + 32 * row + 16 * ((lane / 8 ^ row / 4) % 2);
    keep(place);
#pragma unroll
    for (int j0 = 0; j0 < kBlocks; j0 += 2 * kTurned) {
        const uint32_t buffer = j0 / (2 * kTurned) % 2 * (kTurnBytes / 2);
        if (8 * j0 < stores.rows) {
#pragma unroll
            for (int i = 0; i < kTurned; i++) {
                uint32_t m[2][2];
#pragma unroll
                for (int next = 0; next < 2; next++) {
                    const int j = min(j0 + 2 * i + next, kBlocks - 1);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float v[2];
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            v[e] = epilogue.value(acc[0][j][2 * half + e], acc[1][j][2 * half + e],
                                                  gate_bias[half], up_bias[half]);
                        }
                        m[next][half] = pack_bf16(v[0], v[1]) & real[half];
                    }
                }
                ptx::stmatrix_x4_transposed(place + buffer + 512 * i, m[0][0], m[0][1], m[1][0], m[1][1]);
            }
            if (j0 > 0) {
                stores.put();
            }
            stores.take(buffer);
        }
    }
    if (stores.rows > 0) {
        stores.put();
    }
}

// As above: 32 features.
__device__ __forceinline__ void store(const DownEpilogue& epilogue, const GemmOperands& g,
                                      const Tile& tile, int row_tile, int rank, uint32_t turn,
                                      const float (&acc)[2][kBlocks][4]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const int feature0 = row_tile * kTileRows + 32 * warp;
    if (feature0 >= g.out_pitch) {
        return;  // the last tile may overhang the rows by 64
    }
    const float* bias = g.bias == nullptr
                            ? nullptr
                            : g.bias + static_cast<int64_t>(tile.expert) * g.row_tiles * kTileRows + feature0 +
                                  lane / 4;
    uint32_t real[4];  // all ones, or zero for a pad
    float add[4];
#pragma unroll
    for (int eight = 0; eight < 4; eight++) {
        real[eight] = feature0 + 8 * eight + lane / 4 < g.features ? 0xffffffffu : 0;
        keep(real[eight]);
        add[eight] = bias == nullptr ? 0.0f : bias[8 * eight];
    }
    RowStores<4> stores(g, tile, rank, feature0, turn);
    // The lane's address among 8 rows of 64 bytes: matrices are features
    uint32_t place = turn + 64 * (lane % 8) + 16 * (lane / 8 ^ lane % 8 / 2);
    keep(place);
#pragma unroll
    for (int j0 = 0; j0 < kBlocks; j0 += kTurned) {
        const uint32_t buffer = j0 / kTurned % 2 * (kTurnBytes / 2);
        if (8 * j0 < stores.rows) {
#pragma unroll
            for (int i = 0; i < kTurned; i++) {
                const int j = min(j0 + i, kBlocks - 1);
                uint32_t m[4];
#pragma unroll
                for (int eight = 0; eight < 4; eight++) {
                    const int half = eight / 2 * 2;
                    const uint32_t pair = pack_bf16(epilogue.value(acc[eight % 2][j][half], add[eight]),
                                                    epilogue.value(acc[eight % 2][j][half + 1], add[eight]));
                    m[eight] = pair & real[eight];
                }
                ptx::stmatrix_x4_transposed(place + buffer + 512 * i, m[0], m[1], m[2], m[3]);
            }
            if (j0 > 0) {
                stores.put();
            }
            stores.take(buffer);
        }
    }
    if (stores.rows > 0) {
        stores.put();
    }
}

// Keeps the compiler from moving accumulators across the wgmmas in flight.
__device__ __forceinline__ void pin(float (&acc)[2][kBlocks][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < kBlocks; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                asm volatile("" : "+f"(acc[half][j][i])::"memory");
            }
        }
    }
}

// Warpgroups 0 and 1. The accumulators are one array for all widths, so that there is one epilogue:
// the code of one for each would not stay in the instruction cache.
template <int kFirstPhase, int kLastPhase>
__device__ __forceinline__ void multiply(Shared& shared, const Addresses& at, const GateUpEpilogue& gate_up,
                                         const DownEpilogue& down) {
    const int rank = ptx::cluster_rank();
    const uint32_t turn = at.turn + threadIdx.x / 32 * kTurnBytes;
    TileList list(shared, at);
    Position<kStages> stage;
    float acc[2][kBlocks][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < kBlocks; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[half][j][i] = 0.0f;
            }
        }
    }
#pragma unroll 1
    for (;;) {
        const Tile& tile = list.wait();
        if (tile.phase == kNoPhase) {
            return;
        }
        const GemmOperands& g = shared.operands[tile.phase];
        const int k_blocks = g.k_blocks;
        pin(acc);
        const Form form = tile.form;
        if (form == kApart) {
            with_width<8, kMostApart>(tile.width, [&](auto width) {
                multiply_apart<decltype(width)::value>(acc, at, stage, k_blocks);
            });
        } else {
            constexpr int kLeast = (kMostApart + 16) / 16 * 8;  // of one row more, together
            static_assert(kLeast <= kMostApartBesideTall + 1, "a tall tile has a width, too");
            with_width<kLeast, kMaxColumns>(tile.width, [&](auto width) {
                multiply_tile<decltype(width)::value>(acc, at, stage, k_blocks);
            });
        }
        pin(acc);
        const bool is_gate_up =
            kLastPhase == kGateUp || (kFirstPhase == kGateUp && tile.phase == kGateUp);
        const int half = threadIdx.x / 128;
        const int row_tile = tile.row_tile + (form == kApart ? rank : form == kTall ? 2 * rank + half : half);
        const int token_rank = form == kTogether ? rank : 0;
        if (row_tile < g.row_tiles) {
            if (form == kApart) {
                const scheduler::Work work = {tile.expert, row_tile, 0, tile.rows};
                if (is_gate_up) {
                    gate_up.template store_at<kMostApart, true>(g, work, tile.first_row, acc[0]);
                } else {
                    down.template store_at<kMostApart, true>(g, work, tile.first_row, acc[0]);
                }
            } else if (is_gate_up) {
                store(gate_up, g, tile, row_tile, token_rank, turn, acc);
            } else {
                store(down, g, tile, row_tile, token_rank, turn, acc);
            }
        }
        __syncwarp();
        list.leave();
    }
}

// claimed: the counter of this kernel's tiles.
template <int kFirstPhase, int kLastPhase>
__device__ __forceinline__ void masked_gemm(const GemmOperands& gate_up, const GemmOperands& down,
                                            const StepParams& p, const LocalRank& me, WorkWord claimed) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t prefill_ring[];
    Shared& shared = *reinterpret_cast<Shared*>(prefill_ring + kSharedBytes - kExtraBytes);
    Addresses at;
    at.ring = ptx::shared_address(prefill_ring);
    at.turn = at.ring + kRingBytes;
    at.stage_ready = ptx::shared_address(shared.stage_ready);
    at.stage_free = ptx::shared_address(shared.stage_free);
    at.tile_ready = ptx::shared_address(shared.tile_ready);
    at.tile_free = ptx::shared_address(shared.tile_free);
    at.claim_due = ptx::shared_address(&shared.claim_due);
    at.claim_ready = ptx::shared_address(&shared.claim_ready);
    at.claim_free = ptx::shared_address(&shared.claim_free);
    at.claim = ptx::shared_address(&shared.claim);
    if (threadIdx.x == kThreads - 1) {
        for (int i = 0; i < kStages; i++) {
            ptx::mbarrier_init(barrier_at(at.stage_ready, i), 1 + kGatherThreads);
            ptx::mbarrier_init(barrier_at(at.stage_free, i), kClusterCtas * kMultiplyThreads / 32);
        }
        for (int i = 0; i < kListedTiles; i++) {
            ptx::mbarrier_init(barrier_at(at.tile_ready, i), 1);
            ptx::mbarrier_init(barrier_at(at.tile_free, i), kTileReaders);
        }
        ptx::mbarrier_init(at.claim_due, 1);
        ptx::mbarrier_init(at.claim_ready, 1);
        ptx::mbarrier_init(at.claim_free, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect(at.claim_ready, sizeof(shared.claim));
        shared.operands[kGateUp] = gate_up;
        shared.operands[kDown] = down;
        shared.work = me.work;
        shared.expert_done = me.expert_done;
    }
    ptx::cluster_sync();
    ptx::wait_for_previous_grid();
    ptx::allow_next_grid();

    if (threadIdx.x >= kMultiplyThreads) {
        ptx::give_registers<kProducerRegisters>();
        const int warp = (threadIdx.x - kMultiplyThreads) / 32;
        if (warp == 0) {
            if (threadIdx.x % 32 == 0) {
                stream_weights(shared, at);
            }
        } else if (warp == 3) {
            deal_tiles<kFirstPhase, kLastPhase>(shared, at, claimed);
        } else {
            gather_tokens(shared, at, p, me);
        }
    } else {
        ptx::take_registers<kMultiplierRegisters>();
        multiply<kFirstPhase, kLastPhase>(shared, at, GateUpEpilogue{Activation(p.activation, p.alpha, p.limit)},
                                          DownEpilogue{});
    }
    // why: the other CTA may still arrive at barriers of this one
    __syncwarp();
    ptx::cluster_sync();
#endif
}

}  // namespace moe::prefill
