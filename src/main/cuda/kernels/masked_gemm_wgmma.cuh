// The masked grouped GEMM with wgmma, for Hopper: out[row] = epilogue(W[expert of row] . in[row]), for
// gate_up, for down, or for both in one kernel.
//
// Weights are the A operand, tokens the B operand with 8 to 224 columns, as the expert's count asks.
// One CTA on an SM has three warpgroups. 0 and 1 multiply, each 64 of the 128 outputs of a tile. In
// warpgroup 2, warp 0 claims items (scheduler/claims.cuh) and streams their weights with bulk copies of
// 16 KiB, warp 1 counts finished ones, warps 2 and 3 gather their token rows with cp.async. The two rings
// are apart: weights need not wait for tokens, and a slot of tokens holds up to 4 k blocks.
//   item_ready                    the next item is listed, for everybody
//   weights_ready, weights_free   barriers of a weight stage: bytes landed, both warpgroups have left
//   tokens_ready, tokens_free     the same of a slot of token columns
//   item_stored, item_counted     a gate_up item's rows are stored; who counts it has seen that
// Each output is one accumulator over ascending k, 16 at a time, so the bits are those of masked_gemm.cuh,
// whatever the width and the CTA.
//
// Both in one kernel: a down item reads rows of activated that other CTAs write. Each finished gate_up item
// adds its quarters of a tile to its expert's count, with release; who gathers for a down item polls it, with
// acquire. Weights stream on across that boundary. Every gate_up item before a claimed down item is with a
// CTA that runs, so the poll ends however few of the grid's CTAs have an SM; its bound is for faults.
//
// Launched with programmatic dependence or without. What does not depend on the previous kernel is
// done first: the setup; for down alone also counts and weights.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../ptx/bulk_copy.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/wgmma.cuh"
#include "../scheduler/claims.cuh"
#include "await_rows.cuh"
#include "gemm_epilogue.cuh"

namespace moe {

constexpr int kWgmmaThreads = 384;
constexpr int kMultiplyThreads = 256;
constexpr int kGatherThreads = 64;

// What a kernel computes.
constexpr int kGateUpPhase = 1;
constexpr int kDownPhase = 2;
constexpr int kBothPhases = 3;

// The widths a shape may multiply, ascending; rows take the narrowest that holds them.
template <int... kWidths>
struct Widths {
    static constexpr int kMost = std::max({kWidths...});

    __device__ static constexpr int columns_for(int rows) {
        int columns = kMost;
        ((columns = rows <= kWidths && kWidths < columns ? kWidths : columns), ...);
        return columns;
    }

    // Calls f with the width as a constant.
    template <class F>
    __device__ __forceinline__ static void dispatch(int columns, const F& f) {
        (void)((columns == kWidths && (f(std::integral_constant<int, kWidths>()), true)) || ...);
    }
};

// For decode: few rows an expert.
struct NarrowShape {
    using Columns = Widths<8, 16, 24, 32, 48, 64, 80, 96, 128>;
    static constexpr int kNarrowRows = 64;  // an expert with more is wide (scheduler/claims.cuh)
    static constexpr int kWeightStages = 7;
    static constexpr int kTokenSlots = 6;
    static constexpr int kSlotBytes = 128 * kRowBytes;
    static constexpr int kMostParts = 4;  // of a gate_up tile in the last round
    static constexpr int kFewRows = 32;   // an expert's tile is cut into 4 up to so many: 4 k blocks fit a slot
    static constexpr int kMultiplierRegisters = 208;
    static constexpr int kProducerRegisters = 88;
};

// For many items, some of experts with many rows: products so wide that weights are read again less often.
struct WideShape {
    using Columns = Widths<8, 16, 24, 32, 48, 64, 96, 128, 176, 224>;
    static constexpr int kNarrowRows = 96;
    static constexpr int kWeightStages = 6;
    static constexpr int kTokenSlots = 4;
    static constexpr int kSlotBytes = 224 * kRowBytes;
    static constexpr int kMostParts = 1;
    static constexpr int kFewRows = 32;
    static constexpr int kMultiplierRegisters = 192;
    static constexpr int kProducerRegisters = 120;  // addresses of 28 rows
};

// k blocks in a slot of token columns.
template <class Shape>
__device__ __forceinline__ constexpr int k_blocks_of_slot(int columns) {
    const int blocks = Shape::kSlotBytes / (columns * kRowBytes);
    return blocks < 4 ? blocks : 4;
}

// Of a gate_up tile: a stage holds as many k blocks of a part.
template <class Shape>
__device__ __forceinline__ int most_parts(int k_blocks) {
    const int parts = k_blocks % 4 == 0 ? 4 : k_blocks % 2 == 0 ? 2 : 1;
    return parts < Shape::kMostParts ? parts : Shape::kMostParts;
}

// Items the thread that claims them has listed. It is at most a ring of k blocks, so of items, ahead.
constexpr int kListed = 16;
// Stored gate_up items that may wait to be counted.
constexpr int kCounted = 4;
static_assert(WideShape::kWeightStages + 2 + kCounted < kListed && NarrowShape::kWeightStages + 2 + kCounted < kListed,
              "a listed item stays until it is done and counted");
// k blocks before the end of an item at which the next is claimed.
constexpr int kClaimAhead = 4;

template <class Shape>
struct WgmmaShared {
    uint64_t weights_ready[Shape::kWeightStages];
    uint64_t weights_free[Shape::kWeightStages + 1];  // why one more, and of items: for who is not live
    uint64_t tokens_ready[Shape::kTokenSlots];
    uint64_t tokens_free[Shape::kTokenSlots];
    uint64_t item_ready[kListed + 1];
    uint64_t item_stored[kCounted];
    uint64_t item_counted[kCounted];
    scheduler::Item items[kListed + 1];
    GemmOperands operands[2];  // of gate_up, of down
    // why here: the rank's record is in device memory, and its lines do not stay in L1
    uint32_t* work;
    uint32_t* expert_done;
    scheduler::ExpertList<Shape> experts;
};

template <class Shape>
constexpr int kWgmmaRingBytes =
    Shape::kWeightStages * kTileBytes + Shape::kTokenSlots * Shape::kSlotBytes;
template <class Shape>
constexpr int kWgmmaExtraBytes = (sizeof(WgmmaShared<Shape>) + 127) / 128 * 128;
template <class Shape>
constexpr int kWgmmaSharedBytes = kWgmmaRingBytes<Shape> + kWgmmaExtraBytes<Shape>;
static_assert(kWgmmaSharedBytes<WideShape> <= 227 * 1024, "one CTA fits an SM of sm_90");
static_assert(kWgmmaSharedBytes<NarrowShape> <= 227 * 1024, "one CTA fits an SM of sm_90");

// A position in a ring and the parity of its barriers' phase.
template <int kStages>
struct RingPosition {
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void step() {
        if (++index == kStages) {
            index = 0;
            parity ^= 1;
        }
    }
};

// Shared addresses of the rings and barriers.
template <class Shape>
struct Rings {
    uint32_t weights;
    uint32_t tokens;
    uint32_t weights_ready;
    uint32_t weights_free;
    uint32_t tokens_ready;
    uint32_t tokens_free;
    uint32_t item_ready;
    uint32_t item_stored;
    uint32_t item_counted;
};

// Columns that a slot holds of each k block: those of both warpgroups if the item is part of a tile and has
// more rows than one takes in 8 columns.
template <class Shape>
__device__ __forceinline__ int slot_columns(const scheduler::Item& item) {
    const int rows = item.work.rows;
    return item.parts > 1 && rows > 8 ? 2 * Shape::Columns::columns_for((rows + 1) / 2)
                                      : Shape::Columns::columns_for(rows);
}

__device__ __forceinline__ uint32_t barrier_at(uint32_t barriers, int index) {
    return barriers + 8 * index;
}

// The weights of an item, by one thread, which claims the next item on the way. A stage holds a k block of
// a tile, two of half a tile or four of a quarter. eager: the next item may be claimed before this one is begun.
// Not live: passes over its code once.
template <class Shape>
__device__ __forceinline__ void stream_item(const Rings<Shape>& rings,
                                            RingPosition<Shape::kWeightStages>& stage, const GemmOperands& g,
                                            const scheduler::Item& item, uint32_t* claimed, uint32_t& claim,
                                            bool eager, bool live) {
    const int k_blocks = live ? g.k_blocks : 4;
    const int row_tiles = live ? g.row_tiles : 1;
    const uint8_t* tile = reinterpret_cast<const uint8_t*>(
        (live ? g.weights : nullptr) +
        tile_offset(item.work.expert, item.work.row_tile, 0, row_tiles, k_blocks));
    const uint64_t policy = item.once ? ptx::evict_first() : ptx::evict_normal();
    const int parts = Shape::kMostParts > 1 ? item.parts : 1;
    const int bytes = kTileBytes >> parts / 2;  // of a k block. why shifts: a division takes 0.1 us
    const int stages = live ? k_blocks >> parts / 2 : 1;
    tile += item.part * bytes;
    const RingPosition<Shape::kWeightStages> first = stage;
    // why: an item that is not begun may have to wait, and others could begin the next one
    const bool begun = eager || stages - kClaimAhead >= Shape::kWeightStages;
    const int claim_at = begun ? max(stages - kClaimAhead, 0) : -1;
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
        if (live && i == claim_at) {
            claim = atomicAdd(claimed, 1u);
        }
        ptx::mbarrier_wait(barrier_at(rings.weights_free, live ? stage.index : Shape::kWeightStages),
                           stage.parity ^ 1);
        const uint32_t ready = barrier_at(rings.weights_ready, stage.index);
        uint32_t to = rings.weights + stage.index * kTileBytes;
#pragma unroll 1
        for (int block = 0; block < parts; block++) {
            if (live) {
                ptx::bulk_copy(to, tile, bytes, ready, policy);
            }
            to += bytes;
            tile += kTileBytes;
        }
        if (live) {
            ptx::mbarrier_arrive_expect(ready, kTileBytes);
        }
        stage.step();
    }
    if (live && !begun) {
        // why not of more stages: they have waited for the first already, and its barrier may be a phase further
        if (stages <= Shape::kWeightStages) {
            ptx::mbarrier_wait(barrier_at(rings.weights_free, first.index), first.parity);
        }
        claim = atomicAdd(claimed, 1u);
    }
}

// Warpgroup 2, warp 0: claims items, lists them for the others and streams their weights. After the
// last it lists one of no phase. number: of the CTA's first item, in lane 0. base: items that are no claim's.
// eager: see stream_item. Not live: up to the first copy, with a barrier and an item that nobody uses.
template <class Shape>
__device__ __forceinline__ void stream_weights(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                               const scheduler::Items<Shape>& items, uint32_t* claimed,
                                               uint32_t number, uint32_t base, bool eager, bool live) {
    RingPosition<Shape::kWeightStages> stage;
    RingPosition<kListed> listed;
    const uint32_t last = items.total() + gridDim.x - 1;
    while (true) {
        if (live && threadIdx.x % 32 == 0 && number == last) {
            *claimed = 0;  // why: a number for each item and one in vain for each CTA, this was the grid's last
        }
        const scheduler::Item item = items.at(static_cast<int>(__shfl_sync(0xffffffffu, number, 0)));
        if (threadIdx.x % 32 == 0) {
            const int at = live ? listed.index : kListed;
            shared.items[at] = item;
            ptx::mbarrier_arrive(barrier_at(rings.item_ready, at));
            listed.step();
            if (item.phase != scheduler::kNoItem) {
                uint32_t claim = 0;
                stream_item(rings, stage, shared.operands[item.phase], item, claimed, claim, eager, live);
                number = base + claim;
            }
        }
        if (!live || item.phase == scheduler::kNoItem) {
            return;
        }
    }
}

// An expert's rows of activated are complete when all quarters of its gate_up tiles have been counted.
// why blocks from the item: the list of experts is another warp's, ordered before this one by nothing but
// the barrier that one of its lanes arrives at
template <class Shape>
__device__ __forceinline__ void wait_for_gate_up(const WgmmaShared<Shape>& shared, const StepParams& p,
                                                 const LocalRank& me, const scheduler::Item& item) {
    const uint32_t quarters =
        static_cast<uint32_t>(4 * item.blocks * shared.operands[scheduler::kGateUpItems].row_tiles);
    await_rows(shared.expert_done + item.work.expert, quarters, p, me);
}

constexpr int kGatherPass = kGatherThreads / 8;  // rows that the gathering threads copy at a time

// Calls f with how often the gathering threads pass over a k block, at least, as a constant.
template <class Shape, class F>
__device__ __forceinline__ void with_passes(int columns, const F& f) {
    if (columns <= kGatherPass) {
        f(std::integral_constant<int, 1>());
    } else if (columns <= 2 * kGatherPass) {
        f(std::integral_constant<int, 2>());
    } else if (columns <= 4 * kGatherPass) {
        f(std::integral_constant<int, 4>());
    } else if (columns <= 8 * kGatherPass) {
        f(std::integral_constant<int, 8>());
    } else if (columns <= 12 * kGatherPass) {
        f(std::integral_constant<int, 12>());
    } else {
        f(std::integral_constant<int, (Shape::Columns::kMost + kGatherPass - 1) / kGatherPass>());
    }
}

// The token rows of an item. A thread copies 16-byte chunk c of rows r, r + 8, .. of each k block; rows past
// the item's are left as they are, for their products are not stored.
template <int kPasses, int kPhases, class Shape>
__device__ __forceinline__ void gather_item(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                            RingPosition<Shape::kTokenSlots>& slot, const StepParams& p,
                                            const LocalRank& me, const scheduler::Item& item, int columns,
                                            const __nv_bfloat16* in, bool& waits) {
    const int thread = threadIdx.x % kGatherThreads;
    const int row0 = thread / 8;
    const int chunk = thread % 8;
    const GemmOperands& g = shared.operands[item.phase];
    const int rows = item.work.rows;
    const int k_blocks = g.k_blocks;
    const int32_t* gather = g.gather;
    const uint4* from[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
        const int packed = item.work.first_row + min(row0 + kGatherPass * i, rows - 1);
        const int64_t row = gather == nullptr ? packed : gather[packed];
        from[i] = reinterpret_cast<const uint4*>(in) + row * (k_blocks * 8) + chunk;
    }
    if (kPhases == kBothPhases && item.phase == scheduler::kDownItems && thread % 32 == 0) {
        wait_for_gate_up(shared, p, me, item);
    }
    __syncwarp();
    if (waits) {
        waits = false;
        ptx::wait_for_previous_grid();
        ptx::allow_next_grid();
    }
    const int group = k_blocks_of_slot<Shape>(columns);
    constexpr int kMostBlocks = k_blocks_of_slot<Shape>((kPasses / 2 + 1) * kGatherPass);
    const uint32_t block_bytes = columns * kRowBytes;
    static_assert(kGatherPass % 8 == 0, "the swizzle permutes a thread's rows alike");
    const uint32_t place = rings.tokens + swizzled(row0, chunk);
#pragma unroll 1
    for (int k = 0; k < k_blocks; k += group) {
        // why all addresses first: a copy reads them late, and who writes their registers again waits for that
        uint32_t to[kMostBlocks];
#pragma unroll
        for (int block = 0; block < kMostBlocks; block++) {
            to[block] = place + slot.index * Shape::kSlotBytes + block * block_bytes;
            asm volatile("" : "+r"(to[block]));
        }
        ptx::mbarrier_wait(barrier_at(rings.tokens_free, slot.index), slot.parity ^ 1);
        const int blocks = min(group, k_blocks - k);
#pragma unroll
        for (int block = 0; block < kMostBlocks; block++) {
#pragma unroll
            for (int i = 0; i < kPasses; i++) {
                if (block < blocks && row0 + kGatherPass * i < rows) {
                    ptx::cp_async_16(to[block] + i * (kGatherPass * kRowBytes), from[i] + block * 8);
                }
            }
        }
        ptx::mbarrier_arrive_after_cp_async(barrier_at(rings.tokens_ready, slot.index));
        slot.step();
#pragma unroll
        for (int i = 0; i < kPasses; i++) {
            from[i] += group * 8;
        }
    }
}

// Warpgroup 2, warps 2 and 3.
template <int kPhases, class Shape>
__device__ __forceinline__ void gather_tokens(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                              const StepParams& p, const LocalRank& me,
                                              const __nv_bfloat16* gate_up_in) {
    const int thread = threadIdx.x % kGatherThreads;
    RingPosition<Shape::kTokenSlots> slot;
    RingPosition<kListed> listed;
    bool waits = kPhases == kDownPhase;
    if (!waits) {
        ptx::wait_for_previous_grid();
    }
    while (true) {
        ptx::mbarrier_wait(barrier_at(rings.item_ready, listed.index), listed.parity);
        const scheduler::Item item = shared.items[listed.index];
        listed.step();
        if (item.phase == scheduler::kNoItem) {
            break;
        }
        const int columns = slot_columns<Shape>(item);
        with_passes<Shape>(columns, [&](auto passes) {
            gather_item<decltype(passes)::value, kPhases>(
                shared, rings, slot, p, me, item, columns,
                item.phase == scheduler::kGateUpItems ? gate_up_in : shared.operands[1].in, waits);
        });
    }
    if (waits) {
        ptx::wait_for_previous_grid();
        ptx::allow_next_grid();
    }
    if (kPhases == kBothPhases) {
        // The last warp that waits for no more gate_up items clears their counts
        const int lane = thread % 32;
        uint32_t finished = 0;
        if (lane == 0) {
            finished = atomicAdd(shared.work + kFinished, 1u);
        }
        if (__shfl_sync(0xffffffffu, finished, 0) == gridDim.x * (kGatherThreads / 32) - 1) {
            uint32_t* done = shared.expert_done;
            const int experts = shared.operands[0].experts;
            for (int expert = lane; expert < experts; expert += 32) {
                done[expert] = 0;
            }
            if (lane == 0) {
                shared.work[kFinished] = 0;
            }
        }
    }
}

// Warpgroup 2, warp 1: adds each finished gate_up item to its expert's count. why a warp of its own: a release
// takes 1 to 3 us while weights stream, and meanwhile the multipliers have their next item
template <class Shape>
__device__ __forceinline__ void count_items(const WgmmaShared<Shape>& shared, const Rings<Shape>& rings) {
    RingPosition<kListed> listed;
    RingPosition<kCounted> stored;
    while (true) {
        ptx::mbarrier_wait(barrier_at(rings.item_ready, listed.index), listed.parity);
        const scheduler::Item& item = shared.items[listed.index];
        if (item.phase != scheduler::kGateUpItems) {
            break;
        }
        uint32_t* const done = shared.expert_done + item.work.expert;
        const int quarters = 4 >> item.parts / 2;
        ptx::mbarrier_wait(barrier_at(rings.item_stored, stored.index), stored.parity);
        // why before the count: what is counted next may then be stored
        ptx::mbarrier_arrive(barrier_at(rings.item_counted, stored.index));
        ptx::add_release_gpu(done, quarters);
        listed.step();
        stored.step();
    }
}

// Keeps the compiler from moving accumulators across the wgmmas in flight.
template <int kBlocks>
__device__ __forceinline__ void pin(float (&acc)[kBlocks][4]) {
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            asm volatile("" : "+f"(acc[j][i])::"memory");
        }
    }
}

// Barriers of what a stage's products used: the stage and, if they were the last in it, a token slot.
struct Leaving {
    uint32_t weights_free;
    uint32_t tokens_free;  // 0: not the last

    __device__ __forceinline__ void leave() const {
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_arrive(weights_free);
            if (tokens_free != 0) {
                ptx::mbarrier_arrive(tokens_free);
            }
        }
    }
};

template <class Shape>
struct MultiplierPosition {
    RingPosition<Shape::kWeightStages> weights;
    RingPosition<Shape::kTokenSlots> tokens;
    int in_slot = 0;  // k blocks of the slot already used

    // Past a stage, so many k blocks. Those who use the stage arrive at what is returned.
    __device__ __forceinline__ Leaving step(const Rings<Shape>& rings, int k_blocks, int slot_k_blocks, bool last) {
        Leaving leaving = {barrier_at(rings.weights_free, weights.index), 0};
        weights.step();
        in_slot += k_blocks;
        if (in_slot == slot_k_blocks || last) {
            leaving.tokens_free = barrier_at(rings.tokens_free, tokens.index);
            tokens.step();
            in_slot = 0;
        }
        return leaving;
    }
};

// What a warpgroup multiplies of an item's tiles.
struct Share {
    uint32_t a;            // bytes into a stage where its weights begin
    uint32_t b;            // bytes into a k block's tokens where its columns begin
    uint32_t token_bytes;  // of a k block
    int slot_k_blocks;     // in a slot
};

// Whether the next stage and its tokens are there.
template <class Shape>
__device__ __forceinline__ bool tiles_are_ready(const Rings<Shape>& rings, const MultiplierPosition<Shape>& at) {
    const bool weights = ptx::mbarrier_test(barrier_at(rings.weights_ready, at.weights.index), at.weights.parity);
    const bool tokens =
        at.in_slot != 0 ||
        ptx::mbarrier_test(barrier_at(rings.tokens_ready, at.tokens.index), at.tokens.parity);
    return weights && tokens;
}

// The descriptor, known to be the same in all lanes. why: it stays in uniform registers, where wgmma wants it
__device__ __forceinline__ uint64_t uniform_descriptor(uint64_t descriptor) {
    return descriptor >> 32 << 32 | __shfl_sync(0xffffffffu, static_cast<uint32_t>(descriptor), 0);
}

// The descriptor of what lies so many 16 bytes further on; its high half never changes.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, uint32_t by) {
    return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + by);
}

template <class Shape>
__device__ __forceinline__ void wait_for_tiles(const Rings<Shape>& rings, const MultiplierPosition<Shape>& at) {
    ptx::mbarrier_wait(barrier_at(rings.weights_ready, at.weights.index), at.weights.parity);
    if (at.in_slot == 0) {
        ptx::mbarrier_wait(barrier_at(rings.tokens_ready, at.tokens.index), at.tokens.parity);
    }
}

// Starts the products of a stage, whose tiles are there if ready, else it waits for them.
template <int kColumns, int kStageBlocks, int kBlocks, class Shape>
__device__ __forceinline__ Leaving multiply_stage(float (&acc)[kBlocks][4], const Rings<Shape>& rings,
                                                  MultiplierPosition<Shape>& at, const Share& share, bool ready,
                                                  bool last) {
    if (!ready) {
        wait_for_tiles(rings, at);
    }
    if (at.in_slot == 0) {
        // why: cp.async wrote through the generic proxy
        ptx::fence_proxy_async();
    }
    const uint64_t a =
        uniform_descriptor(ptx::wgmma_descriptor(rings.weights + at.weights.index * kTileBytes + share.a));
    const uint64_t b = uniform_descriptor(ptx::wgmma_descriptor(
        rings.tokens + at.tokens.index * Shape::kSlotBytes + at.in_slot * share.token_bytes + share.b));
    const uint32_t next_b = kStageBlocks == 1 ? 0 : __shfl_sync(0xffffffffu, share.token_bytes >> 4, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int block = 0; block < kStageBlocks; block++) {
#pragma unroll
        for (int step = 0; step < kTileCols / 16; step++) {
            ptx::wgmma_k16(ptx::Columns<kColumns>(), acc,
                           further(a, block * (kTileBytes / kStageBlocks >> 4) + 2 * step),
                           further(b, block * next_b + 2 * step), 1);
        }
    }
    ptx::wgmma_commit();
    return at.step(rings, kStageBlocks, share.slot_k_blocks, last);
}

// Warpgroups 0 and 1: the products of an item, in the first columns of acc.
template <int kColumns, int kStageBlocks, int kBlocks, class Shape>
__device__ __forceinline__ void multiply_item(float (&acc)[kBlocks][4], const Rings<Shape>& rings,
                                              MultiplierPosition<Shape>& at, const Share& share, int k_blocks) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[j][i] = 0.0f;
        }
    }
    pin(acc);

    Leaving leaving = {0, 0};
#pragma unroll 1
    for (int k = 0; k < k_blocks; k += kStageBlocks) {
        // why before the wait: looking takes as long as the products
        const bool ready = tiles_are_ready(rings, at);
        ptx::wgmma_wait<0>();
        if (k > 0) {
            leaving.leave();
        }
        leaving =
            multiply_stage<kColumns, kStageBlocks>(acc, rings, at, share, ready, k + kStageBlocks == k_blocks);
    }
    ptx::wgmma_wait<0>();
    pin(acc);
    leaving.leave();
}

// Passes an item that the warpgroup has no columns of.
template <class Shape>
__device__ __forceinline__ void pass_item(const Rings<Shape>& rings, MultiplierPosition<Shape>& at,
                                          int slot_k_blocks, int stage_blocks, int k_blocks) {
#pragma unroll 1
    for (int k = 0; k < k_blocks; k += stage_blocks) {
        // why: an arrival must not count for the stage's use before
        wait_for_tiles(rings, at);
        at.step(rings, stage_blocks, slot_k_blocks, k + stage_blocks == k_blocks).leave();
    }
}

template <int kPhases, class Shape>
__device__ __forceinline__ void multiply(const WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                         const GateUpEpilogue& gate_up, const DownEpilogue& down) {
    MultiplierPosition<Shape> at;
    RingPosition<kListed> listed;
    RingPosition<kCounted> stored;
    const int group = threadIdx.x / 128;
    // why one array for all widths: so that there is one epilogue, whose code stays in the instruction cache
    constexpr int kBlocks = Shape::Columns::kMost / 8;
    float acc[kBlocks][4];
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[j][i] = 0.0f;
        }
    }
#pragma unroll 1
    while (true) {
        ptx::mbarrier_wait(barrier_at(rings.item_ready, listed.index), listed.parity);
        const scheduler::Item& item = shared.items[listed.index];
        listed.step();
        if (item.phase == scheduler::kNoItem) {
            break;
        }
        const GemmOperands& g = shared.operands[item.phase];
        const int parts = Shape::kMostParts > 1 ? item.parts : 1;
        const int columns = slot_columns<Shape>(item);
        // why not for 8: a wgmma has no fewer columns
        const bool shared_columns = parts > 1 && columns > 8;
        scheduler::Work work = item.work;
        int warp = threadIdx.x / 32;
        if (parts > 1) {
            const int skipped = group * (columns > 8 ? columns / 2 : 8);
            work.first_row += skipped;
            work.rows = min(work.rows - skipped, columns > 8 ? columns / 2 : 8);
            warp %= 4;
            // why: of a quarter's 64 outputs the second 32 are of another k block
            if (parts == 4 && warp >= 2) {
                work.rows = 0;
            }
            warp += item.part << (parts == 2 ? 2 : 1);
        }
        if (parts > 1 && group == 1 && columns == 8) {
            pass_item(rings, at, k_blocks_of_slot<Shape>(8), parts, g.k_blocks);
        } else {
            Shape::Columns::dispatch(shared_columns ? columns / 2 : columns, [&](auto width) {
                constexpr int kColumns = decltype(width)::value;
                Share share;
                share.a = parts > 1 ? 0 : group * (kTileBytes / 2);
                share.b = shared_columns ? group * (kColumns * kRowBytes) : 0;
                share.token_bytes = shared_columns ? 2 * kColumns * kRowBytes : kColumns * kRowBytes;
                share.slot_k_blocks = k_blocks_of_slot<Shape>(shared_columns ? 2 * kColumns : kColumns);
                if (kColumns <= Shape::kFewRows / 2 && Shape::kMostParts >= 4 && parts == 4) {
                    multiply_item<kColumns, 4>(acc, rings, at, share, g.k_blocks);
                } else if (kColumns <= Shape::kNarrowRows / 2 && Shape::kMostParts >= 2 && parts == 2) {
                    multiply_item<kColumns, 2>(acc, rings, at, share, g.k_blocks);
                } else {
                    multiply_item<kColumns, 1>(acc, rings, at, share, g.k_blocks);
                }
            });
            if (kPhases == kGateUpPhase || (kPhases == kBothPhases && item.phase == scheduler::kGateUpItems)) {
                gate_up.template store_at<Shape::Columns::kMost, true>(g, work, work.first_row, acc, warp);
            } else {
                down.template store_at<Shape::Columns::kMost, true>(g, work, work.first_row, acc, warp);
            }
        }
        if (kPhases == kBothPhases && item.phase == scheduler::kGateUpItems) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                // why: the item that used the barrier before must have been seen
                ptx::mbarrier_wait(barrier_at(rings.item_counted, stored.index), stored.parity ^ 1);
                ptx::mbarrier_arrive(barrier_at(rings.item_stored, stored.index));
            }
            stored.step();
        }
    }
}

// claimed: the counter of this kernel's items.
template <class Shape, int kPhases>
__device__ __forceinline__ void masked_gemm_wgmma(const GemmOperands& gate_up, const GemmOperands& down,
                                                  const StepParams& p, const LocalRank& me, WorkWord claimed) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr bool kCountsAreFinal = kPhases == kDownPhase;
    extern __shared__ __align__(1024) uint8_t wgmma_rings[];
    WgmmaShared<Shape>& shared =
        *reinterpret_cast<WgmmaShared<Shape>*>(wgmma_rings + kWgmmaRingBytes<Shape>);
    Rings<Shape> rings;
    rings.weights = ptx::shared_address(wgmma_rings);
    rings.tokens = rings.weights + Shape::kWeightStages * kTileBytes;
    rings.weights_ready = ptx::shared_address(shared.weights_ready);
    rings.weights_free = ptx::shared_address(shared.weights_free);
    rings.tokens_ready = ptx::shared_address(shared.tokens_ready);
    rings.tokens_free = ptx::shared_address(shared.tokens_free);
    rings.item_ready = ptx::shared_address(shared.item_ready);
    rings.item_stored = ptx::shared_address(shared.item_stored);
    rings.item_counted = ptx::shared_address(shared.item_counted);
    if (threadIdx.x == kWgmmaThreads - 1) {
        for (int i = 0; i < Shape::kWeightStages; i++) {
            ptx::mbarrier_init(barrier_at(rings.weights_ready, i), 1);
            ptx::mbarrier_init(barrier_at(rings.weights_free, i), kMultiplyThreads / 32);
        }
        for (int i = 0; i < Shape::kTokenSlots; i++) {
            ptx::mbarrier_init(barrier_at(rings.tokens_ready, i), kGatherThreads);
            ptx::mbarrier_init(barrier_at(rings.tokens_free, i), kMultiplyThreads / 32);
        }
        ptx::mbarrier_init(barrier_at(rings.weights_free, Shape::kWeightStages), 1);
        for (int i = 0; i < kListed + 1; i++) {
            ptx::mbarrier_init(barrier_at(rings.item_ready, i), 1);
        }
        for (int i = 0; i < kCounted; i++) {
            ptx::mbarrier_init(barrier_at(rings.item_stored, i), kMultiplyThreads / 32);
            ptx::mbarrier_init(barrier_at(rings.item_counted, i), 1);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    if (threadIdx.x >= kMultiplyThreads) {
        ptx::give_registers<Shape::kProducerRegisters>();
        const int thread = threadIdx.x - kMultiplyThreads;
        const GemmOperands& any = kPhases == kDownPhase ? down : gate_up;
        const scheduler::Dealing dealing(kPhases & kGateUpPhase ? gate_up.row_tiles : 0,
                                         kPhases & kDownPhase ? down.row_tiles : 0, gridDim.x,
                                         most_parts<Shape>(gate_up.k_blocks),
                                         kPhases == kBothPhases ? min(2, most_parts<Shape>(down.k_blocks)) : 1);
        // why a second warp does the same, not live: while the previous grid runs there is time to fetch the
        // instructions that stand between the counts and the first copy, and they come from memory as the
        // weights do. So what it must not do it does where it harms nobody, rather than skip it
        if (thread < 64) {
            const bool live = thread < 32;
            // why claimed where down waits for gate_up: a number of the CTA's own would make others wait for
            // a CTA that has not started. Alone, down must not claim before the previous grid is complete
            constexpr bool kClaimsFirst = kPhases == kBothPhases;
            uint32_t number = blockIdx.x;
            if (live) {
                if (!kCountsAreFinal) {
                    ptx::wait_for_previous_grid();
                    ptx::allow_next_grid();
                }
                // why here: the claim is on its way while the list is built
                if (kClaimsFirst && thread == 0) {
                    number = atomicAdd(me.work + claimed, 1u);
                }
            }
            const scheduler::Units units = shared.experts.build(any.counts, any.experts, live);
            // why by who lists the items: everybody else waits for these first
            if (live && thread == 0) {
                shared.operands[0] = gate_up;
                shared.operands[1] = down;
                // why: items have packed rows already
                shared.operands[0].offsets = shared.operands[1].offsets = nullptr;
                // why: a load that depends on another, and only who gathers needs it
                shared.operands[0].in = nullptr;
                shared.work = me.work;
                shared.expert_done = me.expert_done;
            }
            stream_weights(shared, rings, scheduler::Items<Shape>(shared.experts, units, any.experts, dealing, live),
                           me.work + claimed, number, kClaimsFirst ? 0 : gridDim.x, units.wide == 0, live);
        }
        if (kPhases == kBothPhases && thread == 32) {
            count_items(shared, rings);
        }
        if (thread >= 128 - kGatherThreads) {
            gather_tokens<kPhases>(shared, rings, p, me, gate_up.in);
        }
    } else {
        // why: of the 168 that 384 threads may have each at launch
        static_assert(2 * Shape::kMultiplierRegisters + Shape::kProducerRegisters <= 3 * 168,
                      "a warpgroup waits forever for registers that the CTA does not have");
        ptx::take_registers<Shape::kMultiplierRegisters>();
        multiply<kPhases>(shared, rings, GateUpEpilogue{Activation(p.activation, p.alpha, p.limit)}, DownEpilogue{});
    }
#endif
}

}  // namespace moe
