// The masked grouped GEMM with wgmma, for Hopper: out[row] = epilogue(W[expert of row] . in[row]).
//
// Weights are the A operand, tokens the B operand with 8 to 256 columns, as the expert's count asks.
// A CTA has three warpgroups. 0 and 1 multiply, each 64 of the 128 outputs of a tile. In warpgroup 2
// warp 0 streams weight tiles with bulk copies of 16 KiB, warps 1 and 2 gather token rows with cp.async. The two rings
// are apart: weights need not wait for tokens, and a slot of tokens holds up to 4 k blocks.
//   weights_ready, weights_free   barriers of a weight stage: bytes landed, both warpgroups have left
//   tokens_ready, tokens_free     the same of a slot of token columns
// scheduler/shares.cuh says which CTA does what. Each output is one accumulator over ascending k, 16
// at a time, so the bits are those of masked_gemm.cuh whatever the block or the cut.
//
// Launched with programmatic dependence or without. What does not depend on the previous kernel is
// read first: all counts and weights where kCountsAreFinal, else nothing.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../comm/signal.cuh"
#include "../ptx/bulk_copy.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/registers.cuh"
#include "../ptx/wgmma.cuh"
#include "../scheduler/shares.cuh"
#include "gemm_epilogue.cuh"

namespace moe {

#ifdef MOE_TRACE
__device__ unsigned long long moe_trace[2][264][8];
#define TRACE(down, event) do { unsigned long long t_; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t_)); moe_trace[down][blockIdx.x][event] = t_; } while (0)
#else
#define TRACE(down, event)
#endif

constexpr int kWgmmaThreads = 384;
constexpr int kMultiplyThreads = 256;
constexpr int kGatherThreads = 64;
static_assert(kMultiplyThreads == scheduler::kThreads, "the scan uses as many threads");

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

// One CTA on an SM, any count of rows.
struct ManyRows {
    using Columns = Widths<8, 16, 32, 64, 96, 128, 144, 192, 240>;
    static constexpr int kWeightStages = 6;
    static constexpr int kTokenSlots = 4;
    static constexpr int kSlotBytes = 240 * kRowBytes;
    // Registers: 384 threads may have 168 each at launch.
    static constexpr int kCtasOfSm = 1;
    static constexpr int kMultiplierRegisters = 208;
    static constexpr int kProducerRegisters = 88;
    static constexpr int kPending = 1;  // k blocks in flight when a stage is left
    // Clocks of a k block: besides its products, and least with weights from memory
    static constexpr int kOverhead = 64;
    static constexpr int kStreamed = 448;
};

// Two CTAs fit an SM: this grid's and the next one's, which may so begin to stream.
struct FewRows {
    using Columns = Widths<8, 16, 24, 32, 48, 72, 104>;
    static constexpr int kWeightStages = 4;
    static constexpr int kTokenSlots = 3;
    static constexpr int kSlotBytes = 104 * kRowBytes;
    // 80 each at launch
    static constexpr int kCtasOfSm = 2;
    static constexpr int kMultiplierRegisters = 96;
    static constexpr int kProducerRegisters = 48;
    static constexpr int kPending = 0;
    static constexpr int kOverhead = 128;
    static constexpr int kStreamed = 448;
};

// k blocks in a slot of token columns.
template <class Shape>
__device__ __forceinline__ constexpr int k_blocks_of_slot(int columns) {
    const int blocks = Shape::kSlotBytes / (columns * kRowBytes);
    return blocks < 4 ? blocks : 4;
}

// Listed by the thread that streams weights, which is at most a ring of k blocks, so of pieces, ahead.
constexpr int kPieces = 8;
static_assert(ManyRows::kWeightStages + 1 < kPieces && FewRows::kWeightStages + 1 < kPieces,
              "a listed piece stays until it is done");

template <class Shape>
struct WgmmaShared {
    uint64_t weights_ready[Shape::kWeightStages];
    uint64_t weights_free[Shape::kWeightStages];
    uint64_t tokens_ready[Shape::kTokenSlots];
    uint64_t tokens_free[Shape::kTokenSlots];
    scheduler::Counts counts;
    scheduler::Piece pieces[kPieces];
    uint32_t sources[2][Shape::Columns::kMost];  // 16-byte chunk where a token row begins
    GemmOperands operands;  // why here: in registers they would cost the multipliers theirs
};

template <class Shape>
constexpr int kWgmmaRingBytes =
    Shape::kWeightStages * kTileBytes + Shape::kTokenSlots * Shape::kSlotBytes;
template <class Shape>
constexpr int kWgmmaExtraBytes = (sizeof(WgmmaShared<Shape>) + 127) / 128 * 128;
template <class Shape>
constexpr int kWgmmaSharedBytes = kWgmmaRingBytes<Shape> + kWgmmaExtraBytes<Shape>;
static_assert(kWgmmaSharedBytes<ManyRows> <= 227 * 1024, "one CTA fits an SM of sm_90");
static_assert(2 * (kWgmmaSharedBytes<FewRows> + 1024) <= 228 * 1024,
              "two CTAs fit an SM of sm_90");

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
};

__device__ __forceinline__ uint32_t barrier_at(uint32_t barriers, int index) {
    return barriers + 8 * index;
}

// Warpgroup 2, one thread. What it arrives at with the first k block of a piece also publishes the
// piece; after the last comes one without k blocks. Not live: up to the first copy.
template <class Shape>
__device__ __forceinline__ void stream_weights(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                               scheduler::Shares<Shape> shares, bool live) {
    RingPosition<Shape::kWeightStages> stage;
    const GemmOperands& g = shared.operands;
    scheduler::Piece piece;
    int number = 0;
    while (shares.next(piece)) {
        const uint8_t* tile = reinterpret_cast<const uint8_t*>(
            g.weights + tile_offset(piece.work.expert, piece.work.row_tile, piece.k_begin, g.row_tiles,
                                    g.k_blocks));
        const uint64_t policy = piece.once ? ptx::evict_first() : ptx::evict_normal();
        if (!live) {
            ptx::keep(tile, policy);
            return;
        }
        scheduler::Piece& listed = shared.pieces[number++ % kPieces];
#pragma unroll 1
        for (int k = piece.k_begin; k < piece.k_end; k++) {
            ptx::mbarrier_wait(barrier_at(rings.weights_free, stage.index), stage.parity ^ 1);
            const uint32_t ready = barrier_at(rings.weights_ready, stage.index);
            // why: before the arrival, so that listing costs the copy no time
            ptx::bulk_copy(rings.weights + stage.index * kTileBytes, tile, kTileBytes, ready, policy);
            if (k == piece.k_begin) {
                listed = piece;
            }
            ptx::mbarrier_arrive_expect(ready, kTileBytes);
            tile += kTileBytes;
            stage.step();
        }
    }
    if (live) {
        ptx::mbarrier_wait(barrier_at(rings.weights_free, stage.index), stage.parity ^ 1);
        shared.pieces[number % kPieces].k_end = 0;
        ptx::mbarrier_arrive(barrier_at(rings.weights_ready, stage.index));
    }
}

// Warpgroup 2, warps 1 and 2. A thread copies 16-byte chunk c of rows r, r + 8, .. of each k block.
// Before its first copy it waits for the previous grid, if the caller has not. Not live: up to there.
template <bool kWaits, class Shape>
__device__ __forceinline__ void gather_tokens(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                              scheduler::Shares<Shape> shares, bool live) {
    bool waits = kWaits;
    const GemmOperands& g = shared.operands;
    const int thread = threadIdx.x % 128 - 32;
    const int row0 = thread / 8;
    const int chunk = thread % 8;
    RingPosition<Shape::kTokenSlots> slot;
    scheduler::Piece piece;
    int which = 0;
    while (shares.next(piece)) {
        const int columns = Shape::Columns::columns_for(piece.work.rows);
        const int rows = piece.work.rows;
        const int64_t first = piece.work.first_row;
        if (!live) {
            ptx::keep(g.in + first, columns);
            return;
        }
        uint32_t* sources = shared.sources[which];
        which ^= 1;
        for (int row = thread; row < columns; row += kGatherThreads) {
            // why: a copy of the last row is cheaper than a branch; its products are not stored
            const int64_t packed = first + min(row, rows - 1);
            const int64_t from = g.gather == nullptr ? packed : g.gather[packed];
            // why: 32 bits of 16-byte chunks reach 64 GiB
            sources[row] = static_cast<uint32_t>(from * (g.k_blocks * 8));
        }
        // why: also keeps one piece between the two lists
        asm volatile("bar.sync 2, %0;" ::"n"(kGatherThreads) : "memory");
        if (waits) {
            waits = false;
            ptx::wait_for_previous_grid();
            ptx::allow_next_grid();
        }
        if (threadIdx.x == kMultiplyThreads + 32 && piece.k_begin == 0) TRACE(kWaits, 6);

        const bool copies = columns > 8 || row0 < rows;
        const int group = k_blocks_of_slot<Shape>(columns);
        const uint4* in = reinterpret_cast<const uint4*>(g.in) + piece.k_begin * 8 + chunk;
        const uint32_t place = swizzled(row0, chunk);
#pragma unroll 1
        for (int k = piece.k_begin; k < piece.k_end; k += group) {
            ptx::mbarrier_wait(barrier_at(rings.tokens_free, slot.index), slot.parity ^ 1);
            uint32_t to = rings.tokens + slot.index * Shape::kSlotBytes + place;
            if (copies) {
                const int blocks = min(group, piece.k_end - k);
#pragma unroll 1
                for (int block = 0; block < blocks; block++) {
#pragma unroll 2
                    for (int row = row0; row < columns; row += 8) {
                        ptx::cp_async_16(to, in + sources[row] + block * 8);
                        to += 8 * kRowBytes;
                    }
                }
            }
            in += group * 8;
            ptx::mbarrier_arrive_after_cp_async(barrier_at(rings.tokens_ready, slot.index));
            slot.step();
        }
    }
    if (waits) {
        ptx::wait_for_previous_grid();
        ptx::allow_next_grid();
    }
}

__device__ __forceinline__ void sync_multipliers() {
    asm volatile("bar.sync 1, %0;" ::"n"(kMultiplyThreads) : "memory");
}

// Leaves the accumulators to the next CTA.
template <int kBlocks>
__device__ __forceinline__ void hand_over(const LocalRank& me, const float (&acc)[kBlocks][4]) {
    float4* to = reinterpret_cast<float4*>(me.partial_sums) +
                 static_cast<int64_t>(blockIdx.x) * (kPartialFloats / 4) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
        __stcg(to + j * kMultiplyThreads, make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]));
    }
    __threadfence();
    sync_multipliers();
    if (threadIdx.x == 0) {
        ptx::store_release_gpu(me.partial_ready + blockIdx.x, 1);
    }
}

// Goes on from those of the CTA before, whose first piece they were.
template <int kBlocks>
__device__ __forceinline__ void take_over(float (&acc)[kBlocks][4], const LocalRank& me) {
    const int giver = static_cast<int>(blockIdx.x) - 1;
    ptx::wait_for_previous_grid();  // why: until it is complete the flag may be one of its own
    while (ptx::load_acquire_gpu(me.partial_ready + giver) == 0) {
    }
    const float4* from = reinterpret_cast<const float4*>(me.partial_sums) +
                         static_cast<int64_t>(giver) * (kPartialFloats / 4) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kBlocks; j++) {
        const float4 sums = __ldcg(from + j * kMultiplyThreads);
        acc[j][0] = sums.x, acc[j][1] = sums.y, acc[j][2] = sums.z, acc[j][3] = sums.w;
    }
    sync_multipliers();  // why: every thread has seen the flag before it falls
    if (threadIdx.x == 0) {
        me.partial_ready[giver] = 0;
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

template <class Shape>
struct MultiplierPosition {
    RingPosition<Shape::kWeightStages> weights;
    RingPosition<Shape::kTokenSlots> tokens;
    int in_slot = 0;  // k blocks of the slot already used
};

// Barriers of what a k block used: its weight stage and, if it was the last in it, its token slot.
struct Leaving {
    uint32_t weights_free;  // 0: has left
    uint32_t tokens_free;   // 0: not the last

    __device__ __forceinline__ void leave() const {
        if (threadIdx.x % 32 == 0 && weights_free != 0) {
            ptx::mbarrier_arrive(weights_free);
            if (tokens_free != 0) {
                ptx::mbarrier_arrive(tokens_free);
            }
        }
    }
};

// Starts the products of a k block, waiting for its tiles.
template <int kColumns, class Shape>
__device__ __forceinline__ Leaving multiply_k_block(float (&acc)[kColumns / 8][4],
                                                    const Rings<Shape>& rings,
                                                    MultiplierPosition<Shape>& at, bool last) {
    if (at.in_slot == 0) {
        ptx::mbarrier_wait(barrier_at(rings.tokens_ready, at.tokens.index), at.tokens.parity);
        // why: cp.async wrote through the generic proxy
        ptx::fence_proxy_async();
    }
    ptx::mbarrier_wait(barrier_at(rings.weights_ready, at.weights.index), at.weights.parity);
    const uint64_t a = ptx::wgmma_descriptor(rings.weights + at.weights.index * kTileBytes +
                                             threadIdx.x / 128 * (kTileBytes / 2));
    const uint64_t b = ptx::wgmma_descriptor(rings.tokens + at.tokens.index * Shape::kSlotBytes +
                                             at.in_slot * (kColumns * kRowBytes));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileCols / 16; step++) {
        ptx::wgmma_k16(acc, a + 2 * step, b + 2 * step);
    }
    ptx::wgmma_commit();
    Leaving leaving = {barrier_at(rings.weights_free, at.weights.index), 0};
    at.weights.step();
    if (++at.in_slot == k_blocks_of_slot<Shape>(kColumns) || last) {
        leaving.tokens_free = barrier_at(rings.tokens_free, at.tokens.index);
        at.tokens.step();
        at.in_slot = 0;
    }
    return leaving;
}

// Warpgroups 0 and 1.
template <int kColumns, class Shape, class Epilogue>
__device__ __forceinline__ void multiply_piece(const Rings<Shape>& rings,
                                               MultiplierPosition<Shape>& at, const GemmOperands& g,
                                               const LocalRank& me, const scheduler::Piece& piece,
                                               const Epilogue& epilogue) {
    float acc[kColumns / 8][4];
#pragma unroll
    for (int j = 0; j < kColumns / 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[j][i] = 0.0f;
        }
    }
    if (piece.takes_over) {
        take_over(acc, me);
    }
    pin(acc);

    Leaving leaving = multiply_k_block<kColumns>(acc, rings, at, piece.k_begin + 1 == piece.k_end);
#pragma unroll 1
    for (int k = piece.k_begin + 1; k < piece.k_end; k++) {
        if constexpr (Shape::kPending == 0) {
            ptx::wgmma_wait<0>();
            leaving.leave();
        }
        const Leaving next = multiply_k_block<kColumns>(acc, rings, at, k + 1 == piece.k_end);
        if constexpr (Shape::kPending == 1) {
            ptx::wgmma_wait<1>();
            leaving.leave();
        }
        leaving = next;
    }
    ptx::wgmma_wait<0>();
    pin(acc);
    leaving.leave();

    if (piece.hands_over) {
        hand_over(me, acc);
        return;
    }
    epilogue.template store<kColumns>(g, piece.work, acc);
}

template <bool kCountsAreFinal, class Shape, class Epilogue>
__device__ __forceinline__ void multiply(const WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                         const LocalRank& me, const Epilogue& epilogue) {
    const GemmOperands& g = shared.operands;
    MultiplierPosition<Shape> at;
    for (int number = 0;; number++) {
        // Known when the first weights of the piece are
        ptx::mbarrier_wait(barrier_at(rings.weights_ready, at.weights.index), at.weights.parity);
        const scheduler::Piece& piece = shared.pieces[number % kPieces];
        if (piece.k_end == 0) {
            break;  // there is none
        }
        if (number == 0 && threadIdx.x == 0) TRACE(kCountsAreFinal, 3);
#ifdef MOE_TRACE
        if (number == 0) ptx::mbarrier_wait(barrier_at(rings.tokens_ready, at.tokens.index), at.tokens.parity);
        if (number == 0 && threadIdx.x == 0) TRACE(kCountsAreFinal, 7);
#endif
        if (threadIdx.x == 0) TRACE(kCountsAreFinal, 4);
        Shape::Columns::dispatch(Shape::Columns::columns_for(piece.work.rows), [&](auto columns) {
            multiply_piece<decltype(columns)::value>(rings, at, g, me, piece, epilogue);
        });
    }
}

template <class Shape, bool kCountsAreFinal, class Epilogue>
__device__ __forceinline__ void masked_gemm_wgmma(const GemmOperands& operands, const LocalRank& me,
                                                  const Epilogue& epilogue) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
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
    if (threadIdx.x == 0) TRACE(kCountsAreFinal, 0);
    if (threadIdx.x == kWgmmaThreads - 1) {
        for (int i = 0; i < Shape::kWeightStages; i++) {
            ptx::mbarrier_init(barrier_at(rings.weights_ready, i), 1);
            ptx::mbarrier_init(barrier_at(rings.weights_free, i), kMultiplyThreads / 32);
        }
        for (int i = 0; i < Shape::kTokenSlots; i++) {
            ptx::mbarrier_init(barrier_at(rings.tokens_ready, i), kGatherThreads);
            ptx::mbarrier_init(barrier_at(rings.tokens_free, i), kMultiplyThreads / 32);
        }
        ptx::fence_mbarrier_init();
        shared.operands = operands;
        shared.operands.offsets = nullptr;  // why: pieces have packed rows already
    }
    __syncthreads();

    if (threadIdx.x >= kMultiplyThreads) {
        ptx::give_registers<Shape::kProducerRegisters>();
        const int warp = (threadIdx.x - kMultiplyThreads) / 32;
        const bool may_cut = me.partial_sums != nullptr && gridDim.x <= kMaxShares;
        // why twice: while the previous grid runs there is time to fetch the instructions that stand
        // between the counts and the first copies, and they come from memory as the weights do
#pragma unroll 1
        for (bool live = kCountsAreFinal;; live = true) {
            if (!kCountsAreFinal && live) {
                ptx::wait_for_previous_grid();
                ptx::allow_next_grid();
                if (threadIdx.x == kMultiplyThreads) TRACE(kCountsAreFinal, 1);
            }
            shared.counts.load(operands.counts, operands.experts, threadIdx.x - kMultiplyThreads, 128);
            asm volatile("bar.sync 3, 128;" ::: "memory");
            scheduler::Shares<Shape> shares(shared.counts, operands.experts, operands.row_tiles,
                                            operands.k_blocks, may_cut);
            if (threadIdx.x == kMultiplyThreads) TRACE(kCountsAreFinal, 2);
            if (warp == 0) {
                if (threadIdx.x % 32 == 0) {
                    stream_weights(shared, rings, shares, live);
                }
            } else if (warp <= 2) {
                gather_tokens<kCountsAreFinal>(shared, rings, shares, live);
            }
            if (live) {
                break;
            }
            __syncwarp();
            asm volatile("bar.sync 3, 128;" ::: "memory");
        }
    } else {
        ptx::take_registers<Shape::kMultiplierRegisters>();
        multiply<kCountsAreFinal>(shared, rings, me, epilogue);
        if (threadIdx.x == 0) TRACE(kCountsAreFinal, 5);
    }
#endif
}

}  // namespace moe
