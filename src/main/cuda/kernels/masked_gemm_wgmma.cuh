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

constexpr int kWgmmaThreads = 384;
constexpr int kMultiplyThreads = 256;
constexpr int kGatherThreads = 64;
static_assert(kMultiplyThreads == scheduler::kThreads, "the scan uses as many threads");

// Of the 168 that 384 threads may have each at launch.
constexpr int kMultiplierRegisters = 208;
constexpr int kProducerRegisters = 88;
static_assert(2 * kMultiplierRegisters + kProducerRegisters <= 3 * 168,
              "a warpgroup waits forever for registers that the CTA does not have");

// One CTA on an SM, any count of rows.
struct ManyRows {
    static constexpr int kMaxColumns = 256;
    static constexpr int kWeightStages = 6;
    static constexpr int kTokenSlots = 4;
    static constexpr int kSlotBytes = 256 * kRowBytes;
    static constexpr bool kMovesRegisters = true;
    static constexpr bool kLeavesEarly = true;
    static constexpr bool kCuts = true;

    __device__ static constexpr int columns_for(int rows) {
        return rows <= 8     ? 8
               : rows <= 16  ? 16
               : rows <= 32  ? 32
               : rows <= 64  ? 64
               : rows <= 96  ? 96
               : rows <= 128 ? 128
               : rows <= 144 ? 144
               : rows <= 192 ? 192
               : rows <= 224 ? 224
                             : 256;
    }
};

// Two CTAs share an SM. Fewer widths, so little code: a kernel's start waits for its instructions.
struct FewRows {
    static constexpr int kMaxColumns = 32;
    static constexpr int kWeightStages = 5;
    static constexpr int kTokenSlots = 3;
    static constexpr int kSlotBytes = 64 * kRowBytes;
    static constexpr bool kMovesRegisters = false;
    static constexpr bool kLeavesEarly = false;
    static constexpr bool kCuts = false;

    __device__ static constexpr int columns_for(int rows) {
        return rows <= 8 ? 8 : (rows <= 16 ? 16 : 32);
    }
};

// As FewRows, with deeper slots for more tokens.
struct SomeRows {
    static constexpr int kMaxColumns = 64;
    static constexpr int kWeightStages = 4;
    static constexpr int kTokenSlots = 3;
    static constexpr int kSlotBytes = 128 * kRowBytes;
    static constexpr bool kMovesRegisters = false;
    static constexpr bool kLeavesEarly = false;
    static constexpr bool kCuts = false;

    __device__ static constexpr int columns_for(int rows) {
        return rows <= 16 ? 16 : (rows <= 32 ? 32 : (rows <= 48 ? 48 : 64));
    }
};

// k blocks in a slot of token columns.
template <class Shape>
__device__ __forceinline__ constexpr int k_blocks_of_slot(int columns) {
    return Shape::kSlotBytes / (columns * kRowBytes) < 4 ? Shape::kSlotBytes / (columns * kRowBytes) : 4;
}

// Listed by the thread that streams weights, which is at most a ring of k blocks, so of pieces, ahead.
constexpr int kPieces = 8;
static_assert(ManyRows::kWeightStages + 1 < kPieces && FewRows::kWeightStages + 1 < kPieces &&
                  SomeRows::kWeightStages + 1 < kPieces,
              "a listed piece stays until it is done");

template <class Shape>
struct WgmmaShared {
    uint64_t weights_ready[Shape::kWeightStages];
    uint64_t weights_free[Shape::kWeightStages];
    uint64_t tokens_ready[Shape::kTokenSlots];
    uint64_t tokens_free[Shape::kTokenSlots];
    typename scheduler::Shares<Shape>::Shared shares;
    scheduler::Piece pieces[kPieces];
    GemmOperands operands;  // why here: in registers they would cost the multipliers theirs
};

template <class Shape>
constexpr int kWgmmaRingBytes =
    Shape::kWeightStages * kTileBytes + Shape::kTokenSlots * Shape::kSlotBytes;
constexpr int kWgmmaExtraBytes = 1024;
template <class Shape>
constexpr int kWgmmaSharedBytes = kWgmmaRingBytes<Shape> + kWgmmaExtraBytes;
static_assert(sizeof(WgmmaShared<ManyRows>) <= kWgmmaExtraBytes, "barriers lie behind the rings");
static_assert(kWgmmaSharedBytes<ManyRows> <= 227 * 1024, "one CTA fits an SM of sm_90");
static_assert(2 * (kWgmmaSharedBytes<SomeRows> + 1024) <= 228 * 1024 &&
                  2 * (kWgmmaSharedBytes<FewRows> + 1024) <= 228 * 1024,
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
// piece, with the last whether it was the CTA's last.
template <class Shape>
__device__ __forceinline__ void stream_weights(WgmmaShared<Shape>& shared, const Rings<Shape>& rings,
                                               scheduler::Shares<Shape> shares) {
    RingPosition<Shape::kWeightStages> stage;
    const GemmOperands& g = shared.operands;
    scheduler::Piece piece;
    if (!shares.next(piece)) {
        shared.pieces[0].k_end = 0;
        ptx::mbarrier_arrive(rings.weights_ready);
        return;
    }
    bool more = true;
    for (int number = 0; more; number++) {
        const uint8_t* tile = reinterpret_cast<const uint8_t*>(
            g.weights + tile_offset(piece.work.expert, piece.work.row_tile, piece.k_begin, g.row_tiles,
                                    g.k_blocks));
        const int k_begin = piece.k_begin;
        const int k_end = piece.k_end;
        scheduler::Piece& listed = shared.pieces[number % kPieces];
#pragma unroll 1
        for (int k = k_begin; k < k_end; k++) {
            ptx::mbarrier_wait(barrier_at(rings.weights_free, stage.index), stage.parity ^ 1);
            const uint32_t ready = barrier_at(rings.weights_ready, stage.index);
            // why: before the arrival, so that listing costs the copy no time
            ptx::bulk_copy(rings.weights + stage.index * kTileBytes, tile, kTileBytes, ready);
            if (k == k_begin) {
                listed = piece;
            }
            if (k + 1 == k_end) {
                more = shares.next(piece);
                listed.last = !more;
            }
            ptx::mbarrier_arrive_expect(ready, kTileBytes);
            tile += kTileBytes;
            stage.step();
        }
    }
}

// A thread copies 16-byte chunk c of rows r, r + 8, .. of each k block.
template <int kColumns, class Shape>
__device__ __forceinline__ void gather_piece(const Rings<Shape>& rings,
                                             RingPosition<Shape::kTokenSlots>& slot,
                                             const GemmOperands& g, const scheduler::Piece& piece) {
    constexpr int kGroup = k_blocks_of_slot<Shape>(kColumns);
    constexpr int kPasses = kColumns / 8;
    const int thread = threadIdx.x % 128 - 32;
    const int row0 = thread / 8;
    const int chunk = thread % 8;
    const int rows = piece.work.rows;
    const int64_t first = g.first_row(piece.work);
    // why: 32 bits of 16-byte chunks reach 64 GiB, and there are many of them
    uint32_t source[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
        // why: a copy of the last row is cheaper than a branch; its products are not stored
        const int64_t packed = first + min(row0 + 8 * i, rows - 1);
        const int64_t from = g.gather == nullptr ? packed : g.gather[packed];
        source[i] = static_cast<uint32_t>(from * (g.k_blocks * 8)) + chunk;
    }
    const bool copies = kColumns > 8 || row0 < rows;
    const uint4* in = reinterpret_cast<const uint4*>(g.in) + piece.k_begin * 8;
    const uint32_t place = swizzled(row0, chunk);
#pragma unroll 1
    for (int k = piece.k_begin; k < piece.k_end; k += kGroup) {
        ptx::mbarrier_wait(barrier_at(rings.tokens_free, slot.index), slot.parity ^ 1);
        const uint32_t to = rings.tokens + slot.index * Shape::kSlotBytes + place;
        if (copies) {
#pragma unroll
            for (int block = 0; block < kGroup; block++) {
                if (block == 0 || k + block < piece.k_end) {
#pragma unroll
                    for (int i = 0; i < kPasses; i++) {
                        ptx::cp_async_16(to + (block * kColumns + 8 * i) * kRowBytes,
                                         in + source[i] + block * 8);
                    }
                }
            }
        }
        in += kGroup * 8;
        ptx::mbarrier_arrive_after_cp_async(barrier_at(rings.tokens_ready, slot.index));
        slot.step();
    }
}

// Warpgroup 2, warps 1 and 2.
template <class Shape>
__device__ __forceinline__ void gather_tokens(const Rings<Shape>& rings, const GemmOperands& g,
                                              scheduler::Shares<Shape> shares) {
    RingPosition<Shape::kTokenSlots> slot;
    scheduler::Piece piece;
    while (shares.next(piece)) {
        const int columns = Shape::columns_for(piece.work.rows);
        switch (columns) {
            case 8:
                if constexpr (Shape::kMaxColumns != 64) {
                    gather_piece<8>(rings, slot, g, piece);
                }
                break;
            case 16: gather_piece<16>(rings, slot, g, piece); break;
            case 32: gather_piece<32>(rings, slot, g, piece); break;
            default:
                if constexpr (Shape::kMaxColumns == 64) {
                    if (columns == 48) {
                        gather_piece<48>(rings, slot, g, piece);
                    } else {
                        gather_piece<64>(rings, slot, g, piece);
                    }
                }
                if constexpr (Shape::kMaxColumns > 64) {
                    switch (columns) {
                        case 64: gather_piece<64>(rings, slot, g, piece); break;
                        case 96: gather_piece<96>(rings, slot, g, piece); break;
                        case 128: gather_piece<128>(rings, slot, g, piece); break;
                        case 144: gather_piece<144>(rings, slot, g, piece); break;
                        case 192: gather_piece<192>(rings, slot, g, piece); break;
                        case 224: gather_piece<224>(rings, slot, g, piece); break;
                        default: gather_piece<256>(rings, slot, g, piece);
                    }
                }
        }
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

template <class Shape>
__device__ __forceinline__ bool tiles_are_ready(const Rings<Shape>& rings,
                                                const MultiplierPosition<Shape>& at) {
    return ptx::mbarrier_test(barrier_at(rings.weights_ready, at.weights.index), at.weights.parity) &&
           (at.in_slot != 0 ||
            ptx::mbarrier_test(barrier_at(rings.tokens_ready, at.tokens.index), at.tokens.parity));
}

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
    if constexpr (Shape::kCuts) {
        if (piece.takes_over) {
            take_over(acc, me);
        }
    }
    pin(acc);

    // A stage is freed one k block late, when its products are surely done
    Leaving leaving = multiply_k_block<kColumns>(acc, rings, at, piece.k_begin + 1 == piece.k_end);
#pragma unroll 1
    for (int k = piece.k_begin + 1; k < piece.k_end; k++) {
        if constexpr (Shape::kLeavesEarly) {
            if (!tiles_are_ready(rings, at)) {
                // why: the ring must not miss this stage while it is starving
                ptx::wgmma_wait<0>();
                leaving.leave();
                leaving.weights_free = 0;
            }
        }
        const Leaving next = multiply_k_block<kColumns>(acc, rings, at, k + 1 == piece.k_end);
        ptx::wgmma_wait<1>();
        leaving.leave();
        leaving = next;
    }
    ptx::wgmma_wait<0>();
    pin(acc);
    leaving.leave();

    if constexpr (Shape::kCuts) {
        if (piece.hands_over) {
            hand_over(me, acc);
            return;
        }
    }
    epilogue.template store<kColumns>(g, piece.work, acc);
}

template <class Shape, class Epilogue>
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
        const int columns = Shape::columns_for(piece.work.rows);
        switch (columns) {
            case 8:
                if constexpr (Shape::kMaxColumns != 64) {
                    multiply_piece<8>(rings, at, g, me, piece, epilogue);
                }
                break;
            case 16: multiply_piece<16>(rings, at, g, me, piece, epilogue); break;
            case 32: multiply_piece<32>(rings, at, g, me, piece, epilogue); break;
            default:
                if constexpr (Shape::kMaxColumns == 64) {
                    if (columns == 48) {
                        multiply_piece<48>(rings, at, g, me, piece, epilogue);
                    } else {
                        multiply_piece<64>(rings, at, g, me, piece, epilogue);
                    }
                }
                if constexpr (Shape::kMaxColumns > 64) {
                    switch (columns) {
                        case 64: multiply_piece<64>(rings, at, g, me, piece, epilogue); break;
                        case 96: multiply_piece<96>(rings, at, g, me, piece, epilogue); break;
                        case 128: multiply_piece<128>(rings, at, g, me, piece, epilogue); break;
                        case 144: multiply_piece<144>(rings, at, g, me, piece, epilogue); break;
                        case 192: multiply_piece<192>(rings, at, g, me, piece, epilogue); break;
                        case 224: multiply_piece<224>(rings, at, g, me, piece, epilogue); break;
                        default: multiply_piece<256>(rings, at, g, me, piece, epilogue);
                    }
                }
        }
        if (piece.last) {
            break;
        }
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
    }
    if constexpr (!kCountsAreFinal) {
        ptx::wait_for_previous_grid();
        ptx::allow_next_grid();
    }
    const bool may_cut = Shape::kCuts && me.partial_sums != nullptr && gridDim.x <= kMaxShares;
    const scheduler::Shares<Shape> shares(shared.shares, operands.counts, operands.experts,
                                          operands.row_tiles, operands.k_blocks, may_cut);

    if (threadIdx.x >= kMultiplyThreads) {
        if constexpr (Shape::kMovesRegisters) {
            ptx::give_registers<kProducerRegisters>();
        }
        const int warp = (threadIdx.x - kMultiplyThreads) / 32;
        if (warp == 0 && threadIdx.x % 32 == 0) {
            stream_weights(shared, rings, shares);
        } else if (warp == 1 || warp == 2) {
            if constexpr (kCountsAreFinal) {
                ptx::wait_for_previous_grid();
                ptx::allow_next_grid();
            }
            gather_tokens(rings, shared.operands, shares);
        }
    } else {
        if constexpr (Shape::kMovesRegisters) {
            ptx::take_registers<kMultiplierRegisters>();
        }
        multiply(shared, rings, me, epilogue);
    }
#endif
}

}  // namespace moe
